"""The vLLM engine's contract with images, against the real thing: tiny random models on a CPU, or one on a GPU in bfloat16."""

import copy
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from making import generate
from seeing import qwen3_5_config
from test_vllm_engine import logprobs, perturb, samples_of, seeds

from pgrpo.config import Config, DataConfig, ModelConfig, PromptConfig, RolloutConfig
from pgrpo.config.task import EnvironmentConfig, ImageConfig, MessageConfig
from pgrpo.data import load_prompts
from pgrpo.distributed.world import start
from pgrpo.environments.episodes import ToolLoop
from pgrpo.environments.toolbox import Toolbox
from pgrpo.environments.tools import load_kinds
from pgrpo.model.families.vision import tower_parameters
from pgrpo.model.policy import Policy, load_model
from pgrpo.model.weights import full_weights, weight_names
from pgrpo.rollout.vllm import canary
from pgrpo.rollout.vllm.delivery import DeliveryError
from pgrpo.rollout.vllm.engine import EngineError, VLLMEngine
from pgrpo.training.vision import engine_images, see
from pgrpo.types import Prompt, SamplingParams
from pgrpo.vision.families import never_sampled
from pgrpo.vision.reader import ImageReader

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[2]
TINY = runpy.run_path(str(ROOT / "scripts" / "make_tiny_vision_model.py"))
SHAPES = runpy.run_path(str(ROOT / "recipes" / "shapes.py"))
GPU = torch.cuda.is_available()
MODELS = ["qwen3_vl", "qwen2_5_vl", "qwen3_5"]
if GPU:  # one engine in a process: this file runs by itself
    MODELS = MODELS[:1]
    pytestmark.append(pytest.mark.gpu)
PARAMS = SamplingParams(max_completion_tokens=8)
LIMITS = ImageConfig(min_pixels=32 * 32, max_pixels=64 * 64)


def make_model(name: str, folder: Path, vocabulary: int = len(TINY["VOCABULARY"])) -> transformers.PretrainedConfig:
    """Sizes that vLLM's attention takes."""
    config = TINY["make_config"]()
    config.text_config.vocab_size = vocabulary
    text = {"hidden_size": 128, "head_dim": 64, "initializer_range": 0.1, "max_position_embeddings": 256}
    sections = [16, 8, 8]
    for key, value in text.items():
        setattr(config.text_config, key, value)
    config.text_config.rope_parameters["mrope_section"] = sections
    tower = config.vision_config
    tower.hidden_size, tower.num_heads, tower.out_hidden_size = 128, 2, 128
    if name == "qwen3_5":
        states = {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
        towers = {"hidden_size": 128, "num_heads": 2, "out_hidden_size": 128}
        config = qwen3_5_config({"vocab_size": vocabulary, **text, **states}, towers)
        config.text_config.rope_parameters["mrope_section"] = [8, 4, 4]
    if name == "qwen2_5_vl":
        texts = {
            "vocab_size": config.text_config.vocab_size, "hidden_size": 256, "intermediate_size": 192, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": config.text_config.eos_token_id,
            "pad_token_id": 0, "bos_token_id": None, "tie_word_embeddings": False, "initializer_range": 0.1,
            "max_position_embeddings": 256,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections},
        }  # fmt: skip
        towers = {
            "depth": 2, "hidden_size": 128, "intermediate_size": 96, "num_heads": 2, "out_hidden_size": 256, "patch_size": 8,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 32, "fullatt_block_indexes": [1],
        }  # fmt: skip
        ids = {key: value for key, value in config.to_dict().items() if key.endswith("token_id")}
        config = transformers.Qwen2_5_VLConfig(
            text_config=texts, vision_config=towers, **ids, tie_word_embeddings=False
        )
    torch.manual_seed(0)
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    TINY["make_tokenizer"]().save_pretrained(folder)
    TINY["make_processor"]().save_pretrained(folder)
    return transformers.AutoConfig.from_pretrained(folder)


def tolerance(policy: Policy) -> float:
    """Of a log-prob. Those of a bfloat16 hybrid differed by 0.125 at most, and by 1.5 and more where an image or the tower did."""
    if policy.model.dtype == torch.float32:
        return 1e-3
    return 0.2 if policy.model.config.model_type == "qwen3_5" else 0.1


def rows() -> list[dict]:
    """Pictures of several sizes, of which the first is beyond the limit of pixels: one, two, none."""
    made = SHAPES["rows"]("eval")[:4]
    pictures = [
        row["images"][0].resize(size) for row, size in zip(made, [(160, 96), (64, 64), (48, 64), (64, 32)], strict=True)
    ]
    asked = [row["question"] for row in made]
    return [
        {"images": [pictures[0]], "question": asked[0]},
        {"images": pictures[1:3], "question": asked[1]},
        {"images": None, "question": asked[2]},
        {"images": [pictures[3]], "question": asked[3]},
    ]


@pytest.fixture(scope="module", params=MODELS)
def engine(request, tmp_path_factory) -> Iterator[SimpleNamespace]:
    if GPU and "PGRPO_TEST_IMAGES" not in os.environ:
        pytest.skip("runs in a process of its own")
    folder = tmp_path_factory.mktemp("model")
    hf_config = make_model(request.param, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    is_hybrid = request.param == "qwen3_5"  # vLLM's Gated DeltaNet on a CPU computes in bfloat16 only
    name = "bfloat16" if GPU or is_hybrid else "float32"
    dtype = getattr(torch, name)
    config = Config(
        model=ModelConfig(path=str(folder), dtype=name, load_vision=is_hybrid),
        data=DataConfig(max_prompt_tokens=64, image=LIMITS),
        prompt=PromptConfig(images_column="images", messages=[MessageConfig("user", "{question}")]),
        rollout=RolloutConfig(max_completion_tokens=8, enforce_eager=True, max_concurrent=32),
    )
    with start() as world:
        policy = Policy(load_model(config.model, dtype))
        policy.to(world.device)
        reader = ImageReader(config.model, hf_config, tokenizer, config.data.image)
        see(policy, reader)
        prompts = load_prompts(config.data, config.prompt, tokenizer, dataset=rows(), reader=reader).prompts
        vllm = VLLMEngine(
            config, world, tokenizer, [TINY["VOCABULARY"].index("<eos>")], partial(full_weights, policy.model, dtype),
            weight_names(policy.model), memory_share=0.2, images=engine_images(hf_config, reader, prompts, told=1),
            banned=never_sampled(hf_config),
        )  # fmt: skip
        yield SimpleNamespace(
            vllm=vllm, policy=policy, prompts=prompts, reader=reader, config=config, tokenizer=tokenizer
        )
        vllm.close()


@pytest.fixture
def awake(engine):
    with engine.vllm.awake(0):
        yield engine


def sample(engine, prompts: list[Prompt], group_size=3, step=0, temperature=1.0):
    params = SamplingParams(max_completion_tokens=8, temperature=temperature)
    return generate(engine.vllm, prompts, params, seeds(len(prompts), group_size, step))


def reported(groups) -> list[float]:
    return [x for s in samples_of(groups) for x in s.rollout_logprobs]


def test_samples_have_the_policys_log_probs(awake):
    """At a temperature, of images that both make smaller, of two images, and of text; another image is another matter."""
    groups = sample(awake, awake.prompts, temperature=0.7)
    assert [len(g.prompt.images.images) if g.prompt.images else 0 for g in groups] == [1, 2, 0, 1]
    samples = samples_of(groups)
    ours = logprobs(awake.policy, samples, temperature=0.7)
    print(
        f"max |rollout - policy| log-prob: {max(abs(a - b) for a, b in zip(reported(groups), ours, strict=True)):.1e}"
    )
    assert reported(groups) == pytest.approx(ours, abs=tolerance(awake.policy))
    pixels = awake.policy.vision.pixels
    keys = {image.key: pixels(image.key) for p in awake.prompts if p.images for image in p.images.images}
    awake.policy.vision.forget()
    awake.policy.vision.pixels = lambda key, content=None: {
        k: x.flip(0) if x.is_floating_point() else x for k, x in keys[key].items()
    }
    other = logprobs(awake.policy, samples, temperature=0.7)
    awake.policy.vision.pixels = pixels
    awake.policy.vision.forget()
    assert max(abs(a - b) for a, b in zip(other, ours, strict=True)) > 5 * tolerance(awake.policy)


def test_an_image_is_processed_once_a_group_and_its_tower_runs_once(awake, monkeypatch):
    made = []
    kind = type(awake.reader.processor.images)
    preprocess = kind.preprocess

    def counted(self, images, *args, **kwargs):
        made.append(len(images) if isinstance(images, list) else 1)
        return preprocess(self, images, *args, **kwargs)

    monkeypatch.setattr(kind, "preprocess", counted)
    grids = []
    hook = awake.vllm._model().visual.register_forward_pre_hook(
        lambda module, args, kwargs: grids.extend(kwargs["grid_thw"]), with_kwargs=True
    )
    awake.vllm.push()
    awake.vllm.llm.llm_engine.reset_mm_cache()
    sample(awake, awake.prompts, group_size=8, step=7)
    assert (sum(made), len(grids)) == (4, 4)  # images of three prompts
    sample(awake, awake.prompts, group_size=8, step=8)
    hook.remove()
    assert (sum(made), len(grids)) == (4, 4), "processed images and features are kept by name"


def test_prompts_wait_for_room_for_their_images(awake, monkeypatch):
    """With room for one image a prompt begins whole, or up to an image behind one that it brings: its group finds its keys."""
    scheduler = awake.vllm.llm.llm_engine.engine_core.engine_core.scheduler
    schedule, kept, begun = scheduler.schedule, scheduler.encoder_cache_manager, []

    def watched(*args, **kwargs):
        output = schedule(*args, **kwargs)
        for new in output.scheduled_new_reqs:
            name, left = new.req_id, len(new.prompt_token_ids) - new.num_computed_tokens
            begun.append(output.num_scheduled_tokens[name] == left or name in output.scheduled_encoder_inputs)
        return output

    monkeypatch.setattr(scheduler, "schedule", watched)
    monkeypatch.setattr(kept, "cache_size", 16)
    prompts = [awake.prompts[i] for i in (0, 1, 3, 2)]
    try:
        awake.vllm.push()  # forgets features
        groups = sample(awake, prompts, group_size=6, step=13)
    finally:
        monkeypatch.undo()
        awake.vllm.push()
    assert begun == [True] * 24
    ours = logprobs(awake.policy, samples_of(groups))
    assert reported(groups) == pytest.approx(ours, abs=tolerance(awake.policy))


class Shows:
    """Leads, and shows a picture as the user."""

    async def converse(self, conversation) -> None:
        self.turns = [await conversation.generate()]
        row = SHAPES["rows"]("eval")[7]
        conversation.say({"role": "user", "content": ["a", row["images"][0].resize((64, 32)), "?"]})
        self.turns.append(await conversation.generate())


@pytest.mark.parametrize("history", ["append", "fork"])
def test_an_episode_is_told_an_image(awake, history):
    """Behind prompts with one image, with two, and with none: vLLM's log-probs of both turns are the policy's. This template leaves
    the colon in front of a turn out of the history, so that a fork begins another sample."""
    tokenizer, end = copy.deepcopy(awake.tokenizer), TINY["VOCABULARY"].index("<eos>")
    tokenizer.chat_template = str(tokenizer.chat_template).replace(
        "{% endif %}{% endfor %}", "{% endif %}<eos>{% endfor %}"
    )
    kinds = load_kinds(None, {}, Shows)
    chats = Toolbox([], kinds).chats(tokenizer, [end], {}, None, awake.reader, 1)
    loop = ToolLoop(
        awake.vllm, [], kinds, chats, EnvironmentConfig(max_images=1, history=history), 40, 64, lambda: False
    )
    data, prompt = awake.config.data, awake.config.prompt
    prompts = load_prompts(data, prompt, tokenizer, dataset=rows(), reader=awake.reader).prompts
    words = [word for word in TINY["WORDS"] if word.isalnum()]
    params = SamplingParams(max_completion_tokens=6, stop=tuple(words))
    groups = loop.generate(prompts, params, seeds(len(prompts), 3, 11), len(prompts), lambda *_: None)
    loop.check(groups)
    loop.close()
    samples = samples_of(groups)
    told = [image for s in samples for image in (s.images.images if s.images else ()) if image.content]
    assert len(samples) == 12 if history == "append" else len(samples) > 16
    assert len(told) > 8 and {image.size for image in told} == {(64, 32)}
    most = [max(len(s.images.images) if s.images else 0 for e in group.episodes for s in e.samples) for group in groups]
    assert most == [2, 3, 1, 2]
    own = [x for s in samples for x, sampled in zip(s.rollout_logprobs, s.mask, strict=True) if sampled]
    ours = iter(logprobs(awake.policy, samples))
    theirs = [x for s in samples for sampled in s.mask if (x := next(ours)) is not None and sampled]
    print(f"max |rollout - policy| log-prob: {max(abs(a - b) for a, b in zip(own, theirs, strict=True)):.1e}")
    assert own == pytest.approx(theirs, abs=tolerance(awake.policy))


def test_placeholders_are_never_sampled(awake):
    banned = set(never_sampled(awake.policy.model.config))
    groups = sample(awake, awake.prompts, group_size=8, step=3, temperature=20.0)
    ids = [token for s in samples_of(groups) for token in s.token_ids]
    assert len(banned) == 2 and len(ids) > 150 and not banned & set(ids)
    assert len(set(ids)) > 20, "nearly all others are"
    ours = logprobs(awake.policy, samples_of(groups), temperature=20.0)
    assert reported(groups) == pytest.approx(ours, abs=tolerance(awake.policy))


def test_a_prompt_that_vllm_expands_otherwise_names_its_row(awake):
    limits = ImageConfig(min_pixels=32 * 32, max_pixels=48 * 48)
    reader = ImageReader(awake.config.model, awake.policy.model.config, awake.tokenizer, limits)
    data = DataConfig(max_prompt_tokens=64, image=limits)
    prompts = load_prompts(data, awake.config.prompt, awake.tokenizer, dataset=rows(), reader=reader).prompts
    with pytest.raises(
        EngineError, match=r"row 0: vLLM makes \d+ tokens of this prompt with its images, the trainer \d+; they"
    ):
        sample(awake, prompts[:1])
    sample(awake, awake.prompts[:1])


def test_a_push_brings_the_tower_and_drops_what_the_old_one_made(engine):
    vllm, policy = engine.vllm, engine.policy
    tower = [parameter for _, parameter in tower_parameters(policy.model, policy.vision.family)]
    before = [p.detach().clone() for p in tower]
    try:
        with vllm.awake(0):
            samples = samples_of(sample(engine, engine.prompts, step=5))
            old = logprobs(policy, samples)
        perturb(SimpleNamespace(parameters=lambda: tower), 0.05)
        policy.vision.forget()
        with vllm.awake(1):
            groups = sample(engine, engine.prompts, step=5)
        new = logprobs(policy, samples_of(groups))
        assert reported(groups) == pytest.approx(new, abs=tolerance(policy))
        changed = [abs(a - b) for a, b in zip(old, logprobs(policy, samples), strict=True)]
        assert max(changed) > 5 * tolerance(policy)
    finally:
        for parameter, value in zip(tower, before, strict=True):
            parameter.data.copy_(value)
        policy.vision.forget()


@pytest.mark.faults
def test_each_dropped_tensor_of_the_tower_is_detected(awake, monkeypatch):
    whole = awake.vllm.weights
    names = [n for n in weight_names(awake.policy.model) if "visual" in n and "blocks.1" not in n]
    assert any("merger" in name for name in names)
    for dropped in names:
        monkeypatch.setattr(awake.vllm, "weights", lambda d=dropped: ((n, t) for n, t in whole() if n != d))
        with pytest.raises(DeliveryError, match="weight push"):
            awake.vllm.push()
    monkeypatch.setattr(
        awake.vllm, "weights", lambda: ((n, t * (1 if "merger.linear_fc2.weight" not in n else 2)) for n, t in whole())
    )
    awake.vllm.push()
    monkeypatch.setattr(awake.vllm, "weights", whole)
    awake.vllm.push()


@pytest.mark.faults
def test_the_canary_scores_prompts_with_images_by_their_text(awake):
    policy = awake.policy
    samples = canary.pick(sample(awake, awake.prompts, group_size=8, step=9), 7)
    banned = set(never_sampled(policy.model.config))
    assert samples and all(s.prompt_ids and not banned & set(s.prompt_ids) and s.images is None for s in samples)
    lengths = [len(s.token_ids) for s in samples]
    weights = [p.detach().clone() for p in policy.parameters()]
    for is_pushed, wanted in ((True, 0.0), (False, 1.0)):
        old = logprobs(policy, samples)
        perturb(policy, 0.01)
        if is_pushed:
            awake.vllm.push()
        slope = canary.regress(old, logprobs(policy, samples), awake.vllm.score(samples).logprobs, lengths)
        print(f"slope {'after a push' if is_pushed else 'without one'}: {slope}")
        assert slope.slope == pytest.approx(wanted, abs=0.2)
    for parameter, value in zip(policy.parameters(), weights, strict=True):
        parameter.data.copy_(value)
    awake.vllm.push()


@pytest.mark.skipif(not GPU, reason="on a CPU they ran here")
@pytest.mark.skipif("PGRPO_TEST_IMAGES" in os.environ, reason="this is that process")
def test_in_a_process_of_its_own():
    tests = [sys.executable, "-m", "pytest", "-m", "vllm and gpu", "-q", "-rP", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(tests, env=os.environ | {"PGRPO_TEST_IMAGES": "1"}, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-5000:]
