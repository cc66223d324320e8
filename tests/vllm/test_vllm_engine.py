"""The contract of the vLLM engine, against the real thing: a small Llama on the CPU, or on a GPU in bfloat16."""

import copy
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import pytest
import torch
import transformers
from making import generate

from pgrpo.admission.compare import tokens_as_samples
from pgrpo.config import Config, DataConfig, ModelConfig, RolloutConfig
from pgrpo.distributed.world import start
from pgrpo.model.policy import Policy, load_model
from pgrpo.model.weights import full_weights, weight_names
from pgrpo.packing.batch import build_batch
from pgrpo.packing.forest import Forest
from pgrpo.process.stopping import Stopped
from pgrpo.rollout.base import sample_seeds
from pgrpo.rollout.vllm import canary, offload
from pgrpo.rollout.vllm.delivery import DeliveryError
from pgrpo.rollout.vllm.engine import EngineError, VLLMEngine
from pgrpo.types import Group, Prompt, Sample, SamplingParams

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
if torch.cuda.is_available():
    pytestmark.append(pytest.mark.gpu)
LETTERS = "0123456789abcdefghijklmnopqrstuvwxyz+=.,;: "
EOS = 1
PARAMS = SamplingParams(max_completion_tokens=16)


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(i, t, [2 + LETTERS.index(c) for c in t]) for i, t in enumerate(texts)]


def seeds(count, group_size, step=0):
    return [sample_seeds(0, step, i, group_size=group_size) for i in range(count)]


def make_tokenizer(folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {"<pad>": 0, "</s>": EOS} | {c: i + 2 for i, c in enumerate(LETTERS)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    return tokenizer


MODELS = ["llama tied", "qwen3 untied"]
# Where an engine can sleep there is one in a process: the other model's tests run in another.
if torch.cuda.is_available():
    MODELS = [os.environ.get("PGRPO_TEST_MODEL", MODELS[0])]
SLEEPS = os.environ.get("PGRPO_TEST_SLEEP", "yes") == "yes"


@pytest.fixture(scope="module", params=MODELS)
def engine(request, tmp_path_factory) -> Iterator[tuple[VLLMEngine, Policy]]:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(LETTERS) + 2, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "initializer_range": 0.1,
        "eos_token_id": EOS, "pad_token_id": 0, "bos_token_id": None, "max_position_embeddings": 24,
    }  # fmt: skip
    make = transformers.LlamaConfig if request.param == "llama tied" else transformers.Qwen3Config
    hf_config = make(**sizes, tie_word_embeddings=request.param == "llama tied")
    transformers.AutoModelForCausalLM.from_config(hf_config).save_pretrained(folder)
    tokenizer = make_tokenizer(folder)
    with start() as world, pytest.MonkeyPatch.context() as patch:
        gpu = world.device.type == "cuda"
        if gpu:
            from pgrpo.rollout.vllm.shared_layout import DecodeLayout

            sizes = DecodeLayout.__init__.__kwdefaults__ or {}
            patch.setitem(sizes, "shared_tokens", 16)  # these prompts have 32 at most
        config = Config(
            model=ModelConfig(path=str(folder), dtype="bfloat16" if gpu else "float32", max_positions=64),
            data=DataConfig(max_prompt_tokens=32),
            rollout=RolloutConfig(
                max_completion_tokens=16,
                enforce_eager=True,
                max_concurrent=32,
                shared_decode="always" if gpu else "auto",
            ),
        )
        dtype = torch.bfloat16 if gpu else torch.float32
        policy = Policy(load_model(config.model, dtype))
        policy.to(world.device)
        weights = partial(full_weights, policy.model, dtype)
        names = weight_names(policy.model)
        engine = VLLMEngine(config, world, tokenizer, [EOS], weights, names, memory_share=0.2, sleeps=SLEEPS)
        yield engine, policy
        engine.close()


@pytest.fixture
def awake(engine):
    vllm, policy = engine
    with vllm.awake(0):
        yield vllm, policy


def samples_of(groups: list[Group]) -> list[Sample]:
    return [sample for group in groups for sample in group.samples]


def logprobs(policy: Policy, samples: list[Sample], temperature=1.0) -> list[float]:
    policy.temperature = temperature
    with torch.no_grad():
        return policy(
            build_batch(Forest.of(samples), device=policy.device, attention=policy.attention)
        ).logprobs.tolist()


def tolerance(policy):
    return 1e-3 if policy.model.dtype == torch.float32 else 0.1


def perturb(policy, by=0.02):
    """What is trained."""
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(by * torch.randn_like(p))


def test_n_samples_and_their_logprobs(awake):
    engine, policy = awake
    params = SamplingParams(max_completion_tokens=16, temperature=0.7)
    groups = generate(engine, prompts("1+1=", "some words"), params, seeds(2, 4))
    assert [len(g.episodes) for g in groups] == [4, 4]
    assert [g.prompt.text for g in groups] == ["1+1=", "some words"]
    assert len({tuple(c.token_ids) for g in groups for c in g.episodes}) == 8
    reported = [x for g in groups for s in g.samples for x in s.rollout_logprobs]
    ours = logprobs(policy, samples_of(groups), temperature=0.7)
    print(f"max |rollout - policy| log-prob: {max(abs(a - b) for a, b in zip(reported, ours, strict=True)):.1e}")
    assert reported == pytest.approx(ours, abs=tolerance(policy))
    assert reported != pytest.approx(logprobs(policy, samples_of(groups)), abs=tolerance(policy)), (
        "the temperature counts"
    )


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(16, top_k=1),
        SamplingParams(16, top_p=1e-4),
        SamplingParams(16, top_k=5, top_p=0.9),
        SamplingParams(16, temperature=0.6, top_k=5),
        SamplingParams(16, temperature=1.7, top_p=0.7),
        SamplingParams(16, temperature=0.0, top_k=5),
    ],
    ids=str,
)
def test_logprobs_are_of_the_whole_distribution_whatever_top_k_and_top_p_cut(awake, params):
    """At the sampling temperature: what the trainer's are of."""
    engine, policy = awake
    asked = prompts("1+1=", "some words", "abc")
    groups = generate(engine, asked, params, seeds(3, 4))
    reported = [x for g in groups for s in g.samples for x in s.rollout_logprobs]
    ours = logprobs(policy, samples_of(groups), temperature=params.temperature or 1.0)
    assert reported == pytest.approx(ours, abs=tolerance(policy))
    assert max(reported) < -0.01, "there is something to cut"
    if params.top_k == 1 or params.top_p < 0.1:
        assert all(g.samples[0].token_ids == g.samples[1].token_ids for g in groups)
    scored = engine.score(samples_of(groups)).logprobs  # at temperature 1, right after another one
    assert scored == pytest.approx(logprobs(policy, samples_of(groups)), abs=tolerance(policy))


def test_the_same_seed_samples_the_same(awake):
    engine, _ = awake
    state = torch.get_rng_state()

    def sample(step):
        groups = generate(engine, prompts("abc", "def"), PARAMS, seeds(2, 3, step))
        return [s.token_ids for g in groups for s in g.samples]

    assert sample(0) == sample(0) != sample(1)
    assert torch.equal(state, torch.get_rng_state()), "the trainer's generators are left alone"


def test_greedy(awake):
    engine, policy = awake
    (group,) = generate(engine, prompts("abc"), SamplingParams(max_completion_tokens=4, temperature=0.0), seeds(1, 2))
    first, second = group.samples
    assert first.token_ids == second.token_ids
    with torch.no_grad():
        ids = torch.tensor([group.prompt.token_ids], device=policy.device)
        reference = policy.model
        reference.set_attn_implementation("sdpa")
        assert reference(ids).logits[0, -1].argmax().item() == first.token_ids[0]
        reference.set_attn_implementation("pgrpo")


def test_a_stop_signal_ends_the_rollout_and_the_engine_can_go_on(awake):
    engine, _ = awake
    engine.world.stop.signum = 15
    with pytest.raises(Stopped):
        generate(engine, prompts("abc", "def"), PARAMS, seeds(2, 3))
    engine.world.stop.signum = 0
    assert not engine.llm.llm_engine.has_unfinished_requests()
    assert len(generate(engine, prompts("abc"), PARAMS, seeds(1, 3))[0].episodes) == 3


def test_eos_ends_a_completion_and_is_its_last_token(awake):
    engine, _ = awake
    groups = generate(engine, prompts(*"abcdefgh"), PARAMS, seeds(8, 8))
    completions = [e for g in groups for e in g.episodes]
    stopped = [c for c in completions if c.finish_reason == "stop"]
    assert 0 < len(stopped) < len(completions)
    assert all(c.token_ids[-1] == EOS and EOS not in c.token_ids[:-1] for c in stopped)
    assert all(len(c.token_ids) == 16 and EOS not in c.token_ids for c in completions if c.finish_reason == "length")
    empty = [c for c in stopped if c.token_ids == [EOS]]
    assert empty and all(c.text == "" and len(c.samples[0].rollout_logprobs) == 1 for c in empty)
    assert all(c.text == "".join(LETTERS[t - 2] for t in c.token_ids if t > 1) for c in completions)


def test_stop_strings(awake):
    engine, _ = awake
    params = SamplingParams(max_completion_tokens=16, stop=("e", "7"))
    groups = generate(engine, prompts(*"abcdefgh"), params, seeds(8, 8))
    cut = [c for g in groups for c in g.episodes if c.token_ids[-1] in (2 + LETTERS.index("e"), 2 + LETTERS.index("7"))]
    assert cut
    for c in cut:
        assert c.finish_reason == "stop" and len(c.text) == len([t for t in c.token_ids if t > 1]) - 1
        assert "e" not in c.text and "7" not in c.text


def test_special_tokens_are_kept_where_they_are_asked_for(awake):
    engine, _ = awake
    params = SamplingParams(max_completion_tokens=16, stop=("e7",), keep_special_tokens=True)
    episodes = [e for g in generate(engine, prompts(*"abcdefgh"), params, seeds(8, 8)) for e in g.episodes]
    assert any(0 in e.token_ids for e in episodes)
    for e in episodes:
        ids = e.token_ids[:-1] if e.token_ids[-1] == EOS else e.token_ids
        assert e.text == "".join("<pad>" if t == 0 else LETTERS[t - 2] for t in ids).partition("e7")[0]


def test_an_overlong_prompt_is_refused(awake):
    engine, _ = awake
    with pytest.raises(EngineError, match="a prompt of 33 tokens and a completion of up to 16 exceed the engine's 48"):
        generate(engine, prompts("a" * 33), PARAMS, seeds(1, 2))
    assert generate(engine, prompts("a" * 32), PARAMS, seeds(1, 2))


def test_scores_are_the_policys_logprobs(awake):
    engine, policy = awake
    samples = tokens_as_samples([[3, 4, 5], [6]], [[[7, 8, 9], [10]], [[11, 12], []]])
    assert engine.score(samples).logprobs == pytest.approx(logprobs(policy, samples), abs=tolerance(policy))


def slope(engine, policy, samples, push=True):
    old = logprobs(policy, samples)
    perturb(policy, 0.01)
    if push:
        engine.push()
    lengths = [len(sample.token_ids) for sample in samples]
    return canary.regress(old, logprobs(policy, samples), engine.score(samples).logprobs, lengths)


def test_the_warm_up_samples_as_rollouts_do(engine):
    """vLLM's own settings for it use penalties, biases, a grammar, log-probs of prompts: kernels that no rollout calls."""
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
    from vllm.v1.worker.gpu import warmup  # pyright: ignore[reportMissingImports]

    params = SamplingParams.for_sampler_warmup()
    assert (params.temperature, params.top_p, params.top_k, params.logprobs) == (1.0, 1.0, 0, 0)
    assert (params.min_p, params.repetition_penalty, params.logit_bias, params.prompt_logprobs) == (
        0.0,
        1.0,
        None,
        None,
    )
    assert "SamplingParams.for_sampler_warmup()" in inspect.getsource(warmup)


@pytest.mark.faults
def test_the_canary_detects_a_skipped_push(awake):
    engine, policy = awake
    samples = canary.pick(generate(engine, prompts(*"abcdefgh"), PARAMS, seeds(8, 2)), 15)
    pushed = slope(engine, policy, samples)
    print(f"slope after a push: {pushed}")
    canary.check(pushed)
    assert abs(pushed.slope) < 0.2
    stale = slope(engine, policy, samples, push=False)
    print(f"slope without one: {stale}")
    assert stale.slope == pytest.approx(1.0, abs=0.2)
    with pytest.raises(canary.CanaryError, match="still samples with the weights from before"):
        canary.check(stale)


def test_waking_pushes(engine):
    vllm, policy = engine
    perturb(policy, 0.05)
    samples = tokens_as_samples([[3, 4, 5]], [[[7, 8, 9], [10, 11]]])
    with vllm.awake(0):
        assert vllm.score(samples).logprobs == pytest.approx(logprobs(policy, samples), abs=tolerance(policy))
    with pytest.raises(EngineError, match="the engine is asleep"):
        vllm.score(samples)
    assert {"time/wake", "time/weight_sync", "time/sleep"} <= vllm.metrics.keys()
    assert vllm.metrics["time/weight_sync"] > 0


def test_no_keys_and_values_outlive_a_push(engine):
    """The same prompt of several blocks with other weights: an engine that does not sleep has its blocks still."""
    vllm, policy = engine
    for _ in range(2):
        perturb(policy, 0.05)
        with vllm.awake(0):
            (group,) = generate(vllm, prompts("abcdefghijklmnopqrstuvwxyz012345"), PARAMS, seeds(1, 4))
        ours = logprobs(policy, samples_of([group]))
        rollout = [x for s in group.samples for x in s.rollout_logprobs]
        assert rollout == pytest.approx(ours, abs=tolerance(policy))


@pytest.mark.faults
def test_a_push_that_cannot_drop_old_keys_and_values_is_an_error(engine):
    vllm, _ = engine
    pool = vllm.llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    with vllm.awake(0):
        taken = pool.get_new_blocks(1)  # as by a request that is not finished
        with pytest.raises(EngineError, match="weight push: keys and values of the weights before are still in use"):
            vllm.push()
        pool.free_blocks(taken)
        vllm.push()


@pytest.mark.skipif(not SLEEPS or not torch.cuda.is_available(), reason="only an engine that sleeps frees its weights")
def test_a_push_to_sleeping_weights_is_refused(engine):
    vllm, _ = engine
    with pytest.raises(EngineError, match="the engine's weights are asleep"):
        vllm.push()


def test_an_offloaded_policy_is_gone_while_the_engine_samples_and_back_after(engine, monkeypatch):
    vllm, policy = engine
    for parameter in policy.parameters():
        parameter.data = parameter.data.clone()  # on a CPU it lies in the model's file, whose memory is not PyTorch's

    def sample():
        with vllm.awake(0):
            gone = [p.untyped_storage().nbytes() == 0 for p in policy.parameters()]
            (group,) = generate(vllm, prompts("abc"), PARAMS, seeds(1, 4))
            return [s.token_ids for s in group.samples], gone

    before, (expected, gone) = [p.detach().clone() for p in policy.parameters()], sample()
    assert not any(gone)
    monkeypatch.setattr(offload, "LEAST", 0)
    monkeypatch.setattr(vllm, "offload", offload.Offload(policy.parameters))
    sampled, gone = sample()
    assert all(gone) and sampled == expected
    assert all(map(torch.equal, policy.parameters(), before))
    assert vllm.metrics["time/offload"] > 0


def test_preemptions_are_counted_and_change_no_completion(engine):
    """All blocks of the cache but a few are taken away: completions preempt each other as they grow."""
    vllm, _ = engine
    scheduler = vllm.llm.llm_engine.engine_core.engine_core.scheduler
    pool, block = scheduler.kv_cache_manager.block_pool, scheduler.block_size
    if block >= 48:
        pytest.skip(f"a completion never outgrows a block of {block} tokens here")
    with vllm.awake(0):
        taken = pool.get_new_blocks(pool.get_num_free_blocks() - 5)
        groups = generate(vllm, prompts("abcdefghijkl", "0123456789ab"), PARAMS, seeds(2, 4))
        pool.free_blocks(taken)
    assert all(len(g.episodes) == 4 for g in groups)
    assert vllm.metrics["rollout/preemptions"] > 0
    with vllm.awake(0):
        generate(vllm, prompts("abc"), PARAMS, seeds(1, 4))
    assert vllm.metrics["rollout/preemptions"] == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has no sleep")
def test_asleep_it_gives_its_memory_back(engine):
    vllm, _ = engine
    if not SLEEPS:
        pytest.skip("this one does not sleep")
    total = torch.cuda.mem_get_info()[1]
    asleep = torch.cuda.mem_get_info()[0]
    with vllm.awake(0):
        awake = torch.cuda.mem_get_info()[0]
    print(f"awake it takes {(asleep - awake) / 2**30:.1f} GiB of {total / 2**30:.0f}")
    assert asleep - awake > 0.15 * total
    assert abs(torch.cuda.mem_get_info()[0] - asleep) < 2**30
    ours = sum(p.numel() * p.element_size() for p in engine[1].parameters())
    assert vllm.counted_bytes > asleep - awake - 2**30, "PyTorch counts what is asleep"
    assert ours <= torch.cuda.memory_allocated() - vllm.counted_bytes < ours + 2**30


@pytest.mark.skipif(SLEEPS or not torch.cuda.is_available(), reason="this one sleeps, or has no memory of its own")
def test_an_engine_that_does_not_sleep_keeps_its_memory(engine):
    vllm, policy = engine
    before, total = torch.cuda.mem_get_info()
    with vllm.awake(0):
        awake = torch.cuda.mem_get_info()[0]
    assert abs(awake - before) < 2**30 and vllm.counted_bytes > 0.1 * total
    ours = sum(p.numel() * p.element_size() for p in policy.parameters())
    assert ours <= torch.cuda.memory_allocated() - vllm.counted_bytes < ours + 2**30


def tokens_of_two_steps(engine) -> list[list[int]]:
    """Sampled with weights that depend on nothing before."""
    vllm, policy = engine
    tokens = []
    for step in range(2):
        torch.manual_seed(step)
        with torch.no_grad():
            for p in policy.parameters():
                p.copy_(0.1 * torch.randn(p.shape) + (p.dim() == 1))
        with vllm.awake(step):
            groups = generate(vllm, prompts("abcdefghijklmnopqrstuvwxyz012345", "0123"), PARAMS, seeds(2, 8, step))
        tokens += [s.token_ids for s in samples_of(groups)]
    return tokens


def test_two_steps_sample_something(engine):
    tokens = tokens_of_two_steps(engine)
    print(f"tokens of two steps: {tokens}")
    assert len({*map(tuple, tokens)}) > 16


def every_name(policy):
    """One of every kind: names of layer 1, and those outside of layers."""
    return [n for n in weight_names(policy.model) if ".layers.0." not in n]


@pytest.mark.faults
def test_each_dropped_tensor_is_detected(engine, monkeypatch):
    vllm, policy = engine
    whole = vllm.weights
    with vllm.awake(0):
        for dropped in every_name(policy):
            monkeypatch.setattr(vllm, "weights", lambda d=dropped: ((n, t) for n, t in whole() if n != d))
            with pytest.raises(DeliveryError, match="weight push"):
                vllm.push()
        monkeypatch.setattr(
            vllm, "weights", lambda: ((n + "s" if n.endswith("norm.weight") else n, t) for n, t in whole())
        )
        with pytest.raises((DeliveryError, EngineError), match="weight push"):
            vllm.push()
        monkeypatch.setattr(vllm, "weights", whole)
        vllm.push()


@pytest.mark.faults
def test_a_tensor_that_the_engine_does_not_write_is_detected(engine, monkeypatch):
    vllm, _ = engine
    with vllm.awake(0):
        model = type(vllm._model())
        load = model.load_weights

        def lossy(self, weights):
            return load(self, ((n, t * 0 if n == "model.norm.weight" else t) for n, t in weights))

        monkeypatch.setattr(model, "load_weights", lossy)
        with pytest.raises(DeliveryError, match=r"checksums of model\.norm\.weight"):
            vllm.push()


@pytest.mark.faults
def test_an_engine_that_dies_while_decoding_is_reported_and_leaves_no_processes(engine):
    """A layer raises at the third forward: the middle of a rollout. The fault gone, the engine goes on."""
    vllm, _ = engine
    calls = 0

    def die(*_):
        nonlocal calls
        calls += 1
        if calls >= 3:
            raise RuntimeError("the device is lost")

    hook = vllm._model().model.layers[0].register_forward_pre_hook(die)
    try:
        with (
            pytest.raises(EngineError, match="vLLM failed in rollout: RuntimeError: the device is lost"),
            vllm.awake(0),
        ):
            generate(vllm, prompts("abc", "def"), PARAMS, seeds(2, 3))
    finally:
        hook.remove()
    assert calls >= 3 and not vllm.is_awake
    with vllm.awake(0):
        assert not vllm.llm.llm_engine.has_unfinished_requests()
        assert [len(g.episodes) for g in generate(vllm, prompts("abc", "def"), PARAMS, seeds(2, 3))] == [3, 3]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="shared decoding needs a GPU")
def test_groups_are_decoded_together_no_further_from_float32_than_alone(awake, monkeypatch):
    from pgrpo.rollout.vllm.shared_backend import SharedBuilder
    from pgrpo.rollout.vllm.shared_layout import DecodeLayout

    engine, policy = awake
    model = copy.deepcopy(policy.model).float()
    model.set_attn_implementation("sdpa")
    sizes, update = set(), DecodeLayout.update

    def note(layout, block_table, lengths):
        update(layout, block_table, lengths)
        sizes.update(layout.members[: len(lengths)].tolist())

    monkeypatch.setattr(DecodeLayout, "update", note)

    def distance():
        groups = generate(engine, prompts(*(f"{i:02}" * 16 for i in range(32))), PARAMS, seeds(32, 8))
        apart = []
        for sample in (sample for group in groups for sample in group.samples):
            ids = torch.tensor([sample.prompt_ids + sample.token_ids], device=policy.device)
            with torch.no_grad():
                logits = model(ids).logits[0, len(sample.prompt_ids) - 1 : -1]
            exact = logits.log_softmax(-1).gather(1, ids[0, len(sample.prompt_ids) :, None])[:, 0].tolist()
            apart += [abs(a - b) for a, b in zip(sample.rollout_logprobs, exact, strict=True)]
        return sum(apart) / len(apart)

    together = distance()
    assert 8 in sizes
    sizes.clear()
    monkeypatch.setattr(SharedBuilder, "build", SharedBuilder.__base__.build)  # vLLM's own
    alone = distance()
    print(f"mean |rollout - float32| log-prob: {together:.2e} together, {alone:.2e} alone")
    assert not sizes and together <= 1.05 * alone


@pytest.mark.skipif(not torch.cuda.is_available(), reason="both models had their turn")
@pytest.mark.skipif("PGRPO_TEST_MODEL" in os.environ, reason="this is the other process")
@pytest.mark.parametrize(("model", "sleep"), [("qwen3 untied", "yes"), ("qwen3 untied", "no"), ("llama tied", "no")])
def test_the_other_model_and_an_engine_that_does_not_sleep(engine, model, sleep):
    """Where only the sleep differs, the samples of two steps do not."""
    tests = [sys.executable, "-m", "pytest", "-m", "vllm and gpu", "-q", "-rP", "-p", "no:cacheprovider", __file__]
    own = {"PGRPO_TEST_MODEL": model, "PGRPO_TEST_SLEEP": sleep}
    done = subprocess.run(tests, env=os.environ | own, capture_output=True, text=True)
    print(done.stdout)
    if model == MODELS[0]:
        assert f"tokens of two steps: {tokens_of_two_steps(engine)}\n" in done.stdout
    assert done.returncode == 0, done.stdout[-5000:]
    assert "CUDA Error" not in done.stdout + done.stderr, "of vLLM's allocator, at the end"
