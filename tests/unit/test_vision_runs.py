"""Runs with images from end to end: what is trained, sampled alike, resumed, exported and refused."""

from __future__ import annotations

import json
import re
import runpy
import time
from pathlib import Path
from threading import current_thread

import pytest
import torch
from PIL import Image as pillow
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from warm import Warm

import pgrpo
from pgrpo import checkpoint
from pgrpo.commands.check import check
from pgrpo.commands.export import export
from pgrpo.commands.plan import plan_text
from pgrpo.commands.plot import plot
from pgrpo.config import Config, ConfigError, load_config, to_yaml
from pgrpo.data import load_prompts
from pgrpo.distributed.world import World
from pgrpo.model.families.vision import Vision
from pgrpo.model.policy import Policy
from pgrpo.rollout.embedded.engine import EmbeddedEngine
from pgrpo.rollout.vllm.images import EngineImages, as_prompt, check_expanded, start_arguments
from pgrpo.rollout.vllm.requests import EngineError
from pgrpo.training import build as building
from pgrpo.training import sums, vision
from pgrpo.types import Image, PromptImages, Request
from pgrpo.vision.pixels import PixelStore
from pgrpo.vision.processors import Processor

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "make_tiny_vision_model.py"))
CALCULATOR = f"tools=['{ROOT / 'recipes' / 'calculator.py'}:multiply']"
ROWS = """
import runpy
def rows(split):
    made = runpy.run_path({recipe!r})
    made["SIZES"][split] = 12
    found = made["rows"](split)
    return [*found, {{"images": [found[0]["images"][0], found[1]["images"][0]], "question": "which colour?", "answer": "red"}}]
def mixed(split):
    return [row if i % 2 else row | {{"images": None}} for i, row in enumerate(rows(split))]
def chats(split):
    def say(row):
        parts = [{{"type": "image", "image": row["images"][0]}}, {{"type": "text", "text": row["question"]}}]
        return {{"role": "user", "content": parts}}
    return [{{"chat": [say(row)], "answer": row["answer"]}} for row in rows(split)]
def likes_red(completions):
    return [float("red" in text) + 0.1 * len(text) for text in completions]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    tmp = tmp_path_factory.mktemp("vision_runs")
    torch.manual_seed(0)
    model = SCRIPT["Qwen3VLForConditionalGeneration"](SCRIPT["make_config"]())
    for part in (model, SCRIPT["make_tokenizer"](), SCRIPT["make_processor"]()):
        part.save_pretrained(tmp / "model")
    (tmp / "own.py").write_text(ROWS.format(recipe=str(ROOT / "recipes" / "shapes.py")))
    return tmp


def config_of(folder: Path, run: Path, *changes: str):
    keys = [
        f"model.path={folder / 'model'}", f"run_dir={run}", f"data.path={folder / 'own.py'}:rows", "data.max_prompt_tokens=50",
        f"rewards.functions=[{{function: '{folder / 'own.py'}:likes_red'}}]", "rollout.prompts_per_step=6",
        "rollout.group_size=4", "model.train_vision=false", "model.train_projector=false", "train.steps=2", "eval.every=0",
        "track.console=false",
    ]  # fmt: skip
    return load_config("vision_quickstart", [*keys, *changes])


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(checkpoint.latest(run / "checkpoints") or run)[0]["model"]


def metrics_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_computes_each_image_once_a_step_and_samples_what_it_scores(folder, tmp_path, monkeypatch):
    """With a KL term to a second model and two updates a step: a frozen tower runs once for all of that in each model, and the
    sampler's log-probs are the trainer's."""
    ran: list[tuple[int, int]] = []
    run_tower = Vision._run

    def counted(self, pixels):
        if self.dummy is not None:  # not one of a proof
            ran.append((id(self), len(pixels)))
        return run_tower(self, pixels)

    monkeypatch.setattr(Vision, "_run", counted)
    keys = (
        "loss.kl_coef=0.1",
        "train.updates_per_step=2",
        "data.shuffle=false",
        "train.token_budget=150",
        "train.steps=1",
    )
    run = pgrpo.train(config_of(folder, tmp_path / "run", *keys))
    (row,) = metrics_of(run)
    assert row["sampling/sampling_logp_difference/max"] < 1e-4
    assert row["tokens/rho"] > 2
    policy, reference = ({i: sum(n for j, n in ran if j == i) for i, _ in ran}).values()
    assert (policy, reference) == (6, 6)  # images of six prompts, however many micro-batches there were
    assert len(weights_of(run)) == len([n for n, _ in loaded(folder / "model") if "visual" not in n])
    logged = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    assert {tuple(image["size"]) for row in logged for image in row["images"]} == {(64, 64)}
    assert {image["key"] for row in logged for image in row["images"]} == {p.stem for p in run.glob("thumbnails/*.jpg")}


@pytest.mark.parametrize(
    ("keys", "forwards"),
    [((), (0, 0)), (("model.train_projector=true",), (1, 3)), (("model.train_vision=true",), (3, 3))],
)
def test_flops_of_a_step_are_also_those_of_its_images(folder, tmp_path, monkeypatch, keys, forwards):
    """Of six images of 64 patches, 16 tokens, in the update: a frozen tower ran in the rollout. Layers that the backward computes
    again are not counted again."""
    monkeypatch.setattr(sums, "work_flops", lambda *_: 0)
    keys = (*keys, "data.shuffle=false", "train.steps=1", "model.activation_checkpointing=full")
    run = pgrpo.train(config_of(folder, tmp_path / "run", *keys))
    (row,) = metrics_of(run)
    layers = 2 * (48 * 144 + 48 * 48 + 2 * 48 * 96)
    tower = 2 * 64 * (layers + 3 * 2 * 8 * 8 * 48) + 2 * 4 * 48 * 64 * 64
    mergers = 2 * 16 * 2 * (192 * 192 + 192 * 64)  # one for deepstack
    flops = row["perf/tflops"] * 1e12 * (row["time/update"] + row["time/old_logprobs"])
    assert flops == pytest.approx(6 * (forwards[0] * tower + forwards[1] * mergers), rel=1e-6)


def test_a_dry_run_counts_images(folder, tmp_path):
    """Six prompts of 49 tokens: of one square image of 196 patches each, at most."""
    keys = ("data.max_prompt_tokens=49", "rollout.prompts_per_step=6")
    frozen, trained = (
        plan_text(config_of(folder, tmp_path, *keys, key)) for key in ("train.steps=2", "model.train_vision=true")
    )
    layers = 2 * (48 * 144 + 48 * 48 + 2 * 48 * 96)
    one = 2 * 196 * (layers + 3 * 2 * 8 * 8 * 48) + 2 * 4 * 48 * 196 * 196 + 2 * 49 * 2 * (192 * 192 + 192 * 64)
    assert f"; up to {6 * one / 1e12:.3g} more for images" in frozen
    assert f"; up to {18 * one / 1e12:.3g} more for images" in trained
    text = plan_text(config_of(folder, tmp_path, "prompt.images_column=null"))
    assert "for images" not in text and "kept prefixes" not in text


def test_a_run_whose_groups_are_cut_says_that_prompts_with_images_are_not_kept(folder, tmp_path):
    settings = config_of(folder, tmp_path / "run", "train.token_budget=55", "train.steps=1")
    run = pgrpo.train(settings)
    text = "none, as the model sees images: a group that train.token_budget cuts computes its prompt in each of its micro-batches"
    assert f"kept prefixes: {text}\n" in (run / "log.txt").read_text()
    assert f"\nkept prefixes {text}\n" in plan_text(settings)
    (row,) = metrics_of(run)
    assert row["grad_norm"] > 0 and row["tokens/rho"] > 1


def loaded(path: Path) -> list[tuple[str, torch.nn.Parameter]]:
    return list(AutoModelForImageTextToText.from_pretrained(path).named_parameters())


@pytest.mark.parametrize(
    "keys", [(), ("model.lora_rank=2",), ("model.train_vision=true",), ("model.train_projector=true",)]
)
def test_what_was_trained_is_exported_and_nothing_else_changed(folder, tmp_path, keys):
    """The export loads with its image processor, and says what the policy would."""
    run = pgrpo.train(config_of(folder, tmp_path / "run", *keys))
    out = export(run, tmp_path / "out")
    before, after = dict(loaded(folder / "model")), dict(loaded(out))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    tower = {n for n in before if "visual" in n and "merger" not in n}
    projector = {n for n in before if "merger" in n}
    assert changed - tower - projector
    assert bool(changed & tower) == (keys == ("model.train_vision=true",))
    assert bool(changed & projector) == (keys == ("model.train_projector=true",))
    processor = AutoImageProcessor.from_pretrained(out)
    assert processor.size == SCRIPT["make_processor"]().size
    assert AutoTokenizer.from_pretrained(out).get_vocab() == SCRIPT["make_tokenizer"]().get_vocab()
    assert Policy(AutoModelForImageTextToText.from_pretrained(out, attn_implementation="eager")).vision is not None


def test_a_run_with_images_resumes_to_the_bit(folder, tmp_path):
    """The reference too is that of the step before, with its tower."""
    keys = (
        "checkpoint.every=1",
        "model.train_vision=true",
        "loss.kl_coef=0.1",
        "loss.ref_refresh_every=1",
        "train.steps=3",
    )
    whole = pgrpo.train(config_of(folder, tmp_path / "whole", *keys))
    part = pgrpo.train(config_of(folder, tmp_path / "part", *keys, "train.steps=2"))
    pgrpo.train(config_of(folder, part, *keys), resume="auto")
    a, b = weights_of(whole), weights_of(part)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def check_two_ranks_train_as_one(one: Config, two: Config, warm: Warm) -> dict[str, torch.Tensor]:
    """Train with both configs, with the second one on two ranks: all weights are equal. Returns them."""
    alone = pgrpo.train(one)
    file = Path(f"{two.run_dir}.yaml")
    file.write_text(to_yaml(two))
    for rank in warm.run_on_ranks(["-m", "pgrpo", "train", "--config", file], 2):
        assert rank.returncode == 0, rank.stderr
    wanted, got = weights_of(alone), weights_of(Path(two.run_dir))
    assert wanted.keys() == got.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(got[name], weight, rtol=0, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
    return wanted


@pytest.mark.parametrize("size", [1, 2])
def test_a_rank_without_images_keeps_in_step(folder, tmp_path, warm, size):
    """Two ranks, of which one has prompts of text only, or the last rows of all: the same weights as one rank, with a tower that is
    trained."""
    keys = (
        f"data.path={folder / 'own.py'}:mixed", "data.shuffle=false", "rollout.prompts_per_step=2", "optim.lr=1e-3",
        "model.train_vision=true", "model.train_projector=true", "loss.scale_advantages=none", "optim.eps=1e-3",
    )  # fmt: skip
    two = config_of(folder, tmp_path / "two", *keys, f"model.sequence_parallel_size={size}")
    wanted = check_two_ranks_train_as_one(config_of(folder, tmp_path / "alone", *keys), two, warm)
    start = dict(loaded(folder / "model"))
    moved = {name for name in wanted if not torch.equal(wanted[name], start[name])}
    assert any("visual" in name for name in moved)


def test_images_of_an_evaluation_have_thumbnails_too(folder, tmp_path):
    keys = ("train.steps=1", "eval.every=1", "eval.rows=3", "track.completions=0")
    run = pgrpo.train(config_of(folder, tmp_path / "run", *keys))
    rows = [json.loads(line) for line in (run / "eval" / "step_1" / "samples.jsonl").read_text().splitlines()]
    keys = {image["key"] for row in rows for image in row["images"]}
    assert len(keys) == 3 and keys == {path.stem for path in run.glob("thumbnails/*.jpg")}
    plot(run)
    text = (run / "report.html").read_text()
    assert text.count('"/9j/') == 3, "JPEGs in base64"


def test_check_shows_images_and_compares_with_the_untouched_model(folder, tmp_path, capsys):
    check(config_of(folder, tmp_path / "run", "data.shuffle=false"))
    shown = capsys.readouterr().out
    assert "tokens, images of 16 (64 x 64))" in shown
    assert "seeded bug, an image of the neighbour: " in shown
    assert "all checks passed" in shown


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ((CALCULATOR,), "leaves out calls or results of tools; use a model that was trained with tools"),
        (
            ("prompt.images_column=null", "model.train_vision=true"),
            "model.train_vision: true has no effect on prompts without images",
        ),
        (("model.lora_rank=2", "model.train_vision=true"), "model.train_vision: true together with model.lora_rank=2"),
        (
            ("prompt.images_column=null", "data.image.max_pixels=4096"),
            "data.image.max_pixels: 4096 has no effect on prompts without images; leave it out",
        ),
        (("data.image.max_pixels=100", "data.image.min_pixels=200"), "min_pixels: 200 is more than the largest image, 100"),
        (("prompt.images_column=pictures",), "the data has no column `pictures`"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_images_is_refused_before_weights_are_loaded(folder, tmp_path, monkeypatch, keys, said):
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", lambda *_, **__: pytest.fail("weights"))
    with pytest.raises(ConfigError, match=re.escape(said)):
        pgrpo.train(
            config_of(folder, tmp_path / "run", *(k.replace("CHATS", f"{folder / 'own.py'}:chats") for k in keys))
        )


def test_vllm_is_refused_for_families_that_it_was_not_tested_on(folder, tmp_path):
    config = config_of(folder, tmp_path / "run", "rollout.engine=vllm")
    said = "rollout.engine=vllm: vLLM was not tested to sample what a llava_next model computes (qwen2_5_vl, qwen3_vl, qwen3_5"
    with pytest.raises(ConfigError, match=re.escape(said)):
        vision.image_reader(config, AutoConfig.for_model("llava_next"), None, World(0, 1, torch.device("cpu")))  # pyright: ignore[reportArgumentType]


def test_vllm_needs_torchvision_for_images(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(vision, "find_spec", lambda _: None)
    config, world = config_of(folder, tmp_path / "run", "rollout.engine=vllm"), World(0, 1, torch.device("cpu"))
    hf_config, tokenizer = AutoConfig.from_pretrained(folder / "model"), SCRIPT["make_tokenizer"]()
    with pytest.raises(
        ConfigError, match=r"^rollout\.engine=vllm: vLLM needs torchvision for a qwen3_vl model: install"
    ):
        vision.image_reader(config, hf_config, tokenizer, world)
    monkeypatch.setattr(vision, "find_spec", lambda _: object())
    assert vision.image_reader(config, hf_config, tokenizer, world) is not None


def test_pixels_of_a_step_are_made_once_and_while_vllm_samples(folder, tmp_path, monkeypatch):
    """In threads, of each distinct image, before the sampler is done; a run that makes them when it needs them has the same
    weights. The sampler waits here until all of its step are there."""
    threads, make, sample = list[str](), Processor.pixels, EmbeddedEngine.sample

    def counted(self, image):
        threads.append(current_thread().name)
        return make(self, image)

    def slow(self, *args, **kwargs):
        until, wanted = time.monotonic() + 60, 6 * (1 + len(waited))
        while len(threads) < wanted and time.monotonic() < until:
            time.sleep(0.01)
        waited.append(len(threads))
        return sample(self, *args, **kwargs)

    waited = list[int]()
    keys = ("data.shuffle=false", "model.train_vision=true", "train.updates_per_step=2")
    wanted = weights_of(pgrpo.train(config_of(folder, tmp_path / "as needed", *keys)))
    monkeypatch.setattr(Processor, "pixels", counted)
    monkeypatch.setattr(EmbeddedEngine, "sample", slow)
    monkeypatch.setattr(building, "engine_name", lambda *_: "vllm")
    got = weights_of(pgrpo.train(config_of(folder, tmp_path / "ahead", *keys)))
    assert waited == [6, 12]
    assert len(threads) == 12 and all(name.startswith("pgrpo-images") for name in threads)
    assert wanted.keys() == got.keys() and all(torch.equal(wanted[name], got[name]) for name in wanted)


@pytest.mark.parametrize(("keys", "count"), [((), 0), (("loss.kl_coef=0.1",), 6), (("model.train_vision=true",), 6)])
def test_an_update_announces_the_images_that_it_needs(folder, tmp_path, monkeypatch, keys, count):
    """All of its micro-batches, in order, before the first. What the rollout computed is kept, and the reference had no rollout."""
    announced, used, prepare, get = list[list[str]](), list[str](), PixelStore.prepare, PixelStore.__call__

    def record(self, names):
        used.clear()
        announced.append(list(names))
        prepare(self, names)

    def take(self, key):
        used.append(key)
        return get(self, key)

    monkeypatch.setattr(PixelStore, "prepare", record)
    monkeypatch.setattr(PixelStore, "__call__", take)
    more = ("train.updates_per_step=2", "data.shuffle=false", "train.token_budget=60", "train.steps=1")
    pgrpo.train(config_of(folder, tmp_path / "run", *keys, *more))
    (names,) = announced
    assert len(names) == count and set(names) == set(used)
    if keys != ("model.train_vision=true",):  # its old log-probs of the second update come first
        assert names == used


@pytest.mark.parametrize("ahead", [True, False])
def test_an_image_that_is_broken_after_the_start_is_named_with_its_row(folder, tmp_path, monkeypatch, ahead):
    """Wherever its pixels are made."""
    for i, colour in enumerate(("red", "blue", "green")):
        pillow.new("RGB", (64, 64), colour).save(tmp_path / f"{i}.png")
    rows = [{"images": [f"{i}.png"], "question": "which colour?"} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = config_of(
        folder,
        tmp_path / "run",
        f"data.path={tmp_path / 'rows.jsonl'}",
        "rollout.prompts_per_step=3",
        "data.shuffle=false",
    )
    see = building.see

    def break_it(*args, **kwargs):
        (tmp_path / "1.png").write_bytes(b"no image")
        see(*args, **kwargs)

    monkeypatch.setattr(building, "see", break_it)
    if ahead:
        monkeypatch.setattr(building, "engine_name", lambda *_: "vllm")
    with pytest.raises(ConfigError, match=r"^row 1, column `images`, 1\.png: this is no image that Pillow reads$"):
        pgrpo.train(config)


def test_vllm_may_be_given_as_many_images_as_the_data_has(folder, tmp_path):
    config = config_of(folder, tmp_path / "run", "data.image.max_pixels=4096")
    hf_config, tokenizer = AutoConfig.from_pretrained(folder / "model"), SCRIPT["make_tokenizer"]()
    reader = vision.image_reader(config, hf_config, tokenizer, World(0, 1, torch.device("cpu")))
    prompts = load_prompts(config.data, config.prompt, tokenizer, reader=reader).prompts
    made = vision.engine_images(hf_config, reader, prompts)
    first = prompts[0].images
    assert made is not None and reader is not None and first is not None
    assert (made.most, made.processor) == (2, reader.processor.size)
    assert made.picture(first.images[0].key).size == (64, 64)
    known = ["mm_processor_kwargs", "mm_device_do_normalize"]
    given = start_arguments(made, known)
    assert given["limit_mm_per_prompt"] == {"image": 2, "video": 0} and given["mm_device_do_normalize"] is False
    assert given["mm_processor_kwargs"] == {"size": {"shortest_edge": 1024, "longest_edge": 4096}}
    text = vision.engine_images(hf_config, None, [])
    assert text is not None and start_arguments(text, [])["limit_mm_per_prompt"] == {"image": 0, "video": 0}
    assert vision.engine_images(AutoConfig.for_model("qwen3"), None, []) is None and start_arguments(None, known) == {}


def test_what_vllm_is_given_of_a_prompt_with_images():
    images = PromptImages(
        (Image("a", ((1, 4),)), Image("b", ((5, 7),))), [1, 9, 2, 9, 3], None, "row 3, column `images`"
    )
    request = Request([1, 9, 9, 9, 2, 9, 9, 3], [0], images=images)
    assert as_prompt(request, EngineImages(str.upper, 2)) == {
        "prompt_token_ids": [1, 9, 2, 9, 3], "multi_modal_data": {"image": ["A", "B"]}, "multi_modal_uuids": {"image": ["a", "b"]},
    }  # fmt: skip
    check_expanded(request, request.token_ids)
    said = "row 3, column `images`: vLLM makes 7 tokens of this prompt with its images, the trainer 8; they differ from token 3 on"
    with pytest.raises(EngineError, match=re.escape(said)):
        check_expanded(request, [1, 9, 9, 2, 9, 9, 3])
    check_expanded(Request([1, 2], [0]), [1, 2, 3])  # without images vLLM expands nothing


def test_a_model_without_a_tower_takes_no_images(tiny_model, folder, tmp_path):
    hosts = "data.image.allowed_hosts=[a.org]"
    for key in ("prompt.images_column=images", "model.train_vision=true", "model.train_projector=true", hosts):
        change = [key] if "images" in key else ["prompt.images_column=null", key]
        with pytest.raises(ConfigError, match=f"^{key.partition('=')[0]}: .* is a qwen3 model, without a vision tower"):
            pgrpo.train(config_of(folder, tmp_path / "run", f"model.path={tiny_model}", *change))
