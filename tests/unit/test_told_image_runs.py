"""Runs in which an environment shows images, in worker processes: sampled as they are trained on, kept between turns, resumed, and
the same on two ranks."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
import torch
from seeing import VISION, picture, seeing_config, seeing_reader, seeing_tokenizer
from test_vision_runs import check_two_ranks_train_as_one, metrics_of, weights_of
from transformers import AutoModelForImageTextToText

import pgrpo
from pgrpo.commands.check import check
from pgrpo.config import Config, ConfigError, load_config
from pgrpo.model.policy import Policy, load_model
from pgrpo.rollout.embedded.engine import EmbeddedEngine
from pgrpo.types import Completion, Image, Request, SamplingParams
from pgrpo.vision.rows import Block, ImageRows, shown_tokens

OWN = """
from PIL import Image
def picture(number):
    return Image.frombytes("RGB", (64, 32), bytes((number * 31 + i) % 251 for i in range(64 * 32 * 3)))
class Shows:
    def reset(self, row, **more):
        self.row = row
        return [" see ", picture(row)]
    async def converse(self, conversation):
        for turn in range(2):
            await conversation.generate()
            conversation.say({"role": "user", "content": [f"and ", picture(10 * self.row + turn), "?"]})
        said = await conversation.generate()
        self.said = len(said.content)
    def get_reward(self):
        return float(sum(map(ord, str(self.said)))) + self.row
def length(completions):
    return [float(sum(map(ord, text)) % 7) for text in completions]
def rows(split):
    return [{"row": i, "images": [picture(90 + i)] if i % 2 else None} for i in range(8)]
"""
STOPS = list(string.ascii_letters + string.digits)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    tmp = tmp_path_factory.mktemp("told")
    tokenizer = seeing_tokenizer()
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(seeing_config(tokenizer))
    for part in (model, tokenizer, VISION["make_processor"]()):
        part.save_pretrained(tmp / "model")
    (tmp / "own.py").write_text(OWN)
    return tmp


def config_of(folder: Path, run: Path, *changes: str) -> Config:
    keys = [
        f"model.path={folder / 'model'}", f"run_dir={run}", f"data.path={folder / 'own.py'}:rows", "data.max_prompt_tokens=80",
        "data.eval_split=null", f"rewards.functions=[{{function: '{folder / 'own.py'}:length'}}]",
        "rollout.prompts_per_step=4", "rollout.group_size=3", "rollout.max_completion_tokens=12", f"rollout.stop={STOPS}",
        "model.train_vision=false", "model.train_projector=false", "train.steps=2", "eval.every=0", "track.console=false",
        "prompt.messages=[{role: user, content: '{row}'}]", f"environment.factory={folder / 'own.py'}:Shows",
        "environment.max_images=3", "environment.max_episode_tokens=120", "optim.lr=1e-3", "optim.eps=1e-3",
        "loss.scale_advantages=none", "train.token_budget=600",
    ]  # fmt: skip
    return load_config("vision_quickstart", [*keys, *changes])


@pytest.mark.parametrize("keys", [(), ("model.train_vision=true", "loss.kl_coef=0.1"), ("model.lora_rank=2",)])
def test_told_images_are_sampled_as_they_are_trained_on(folder, tmp_path, keys):
    run = pgrpo.train(config_of(folder, tmp_path / "run", *keys, "track.completions=12"))
    for row in metrics_of(run):
        assert row["sampling/sampling_logp_difference/max"] < 1e-4
        assert row["episodes/turns/mean"] > 1.5 and row["episodes/end/environment"] == 0
    rows = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    told = [image for row in rows for image in row.get("told_images", ())]
    assert told and {tuple(image["size"]) for image in told} == {(64, 32)}
    assert any("[user] and [image 64x32]?" in row["completion"] for row in rows)
    keys_of = {image["key"] for row in rows for name in ("images", "told_images") for image in row.get(name, ())}
    assert keys_of == {path.stem for path in run.glob("thumbnails/*.jpg")}


def test_a_resumed_run_with_told_images_is_bit_equal(folder, tmp_path):
    keys = ("checkpoint.every=1", "model.train_vision=true", "train.steps=2")
    whole = pgrpo.train(config_of(folder, tmp_path / "whole", *keys))
    part = pgrpo.train(config_of(folder, tmp_path / "part", *keys, "train.steps=1"))
    pgrpo.train(config_of(folder, part, *keys), resume="auto")
    a, b = weights_of(whole), weights_of(part)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_told_images_travel_between_ranks(folder, tmp_path, warm):
    """A sample may be trained on by the rank that did not play its episode; that has its images."""
    keys = ("train.steps=1", "rollout.prompts_per_step=4", "model.train_vision=true", "train.token_budget=300")
    one, two = (config_of(folder, tmp_path / name, *keys) for name in ("alone", "two"))
    wanted = check_two_ranks_train_as_one(one, two, warm)
    start = dict(AutoModelForImageTextToText.from_pretrained(folder / "model").named_parameters())
    assert any("visual" in name and not torch.equal(wanted[name], start[name]) for name in wanted)


def test_check_shows_what_was_told_and_compares_it(folder, tmp_path, capsys):
    check(config_of(folder, tmp_path / "run"))
    shown = capsys.readouterr().out
    assert "template, an answer and a user message with an image: its tokens are exact" in shown
    assert "[image 64x32, 8 tokens]" in shown and "all checks passed" in shown


def test_images_that_cannot_be_had_are_refused_by_name(folder, tiny_model, tmp_path):
    alone = ("environment.factory=null", "environment.max_episode_tokens=null")
    with pytest.raises(ConfigError, match=r"environment\.max_images: 3 has no effect without tools or environment"):
        config_of(folder, tmp_path / "run", *alone)
    blind = (f"model.path={tiny_model}", "prompt.images_column=null", "data.max_prompt_tokens=20", "rollout.stop=[]")
    small = ("environment.max_episode_tokens=30", "train.token_budget=60")
    with pytest.raises(
        ConfigError, match=r"environment\.max_images: 3: model\.path=.* without a vision tower that is known"
    ):
        pgrpo.train(config_of(folder, tmp_path / "run", *blind, *small))


# ---- keys and values kept between turns ----


def test_a_kept_beginning_is_that_of_its_images(folder, tmp_path):
    """Two prompts with equal ids and other images, and turns that go on from them behind another image: log-probs as without what
    was kept."""
    tokenizer, config = seeing_tokenizer(), None
    config = seeing_config(tokenizer)
    reader = seeing_reader(tmp_path, tokenizer, config)
    policy = Policy(load_model(config_of(folder, tmp_path / "run").model))
    assert policy.vision is not None
    policy.vision.pixels = reader.pixels
    files = {}
    for number in range(4):
        picture(64, 32, number).save(tmp_path / f"{number}.png")
        files[number] = (
            reader.told((tmp_path / f"{number}.png").read_bytes()),
            (tmp_path / f"{number}.png").read_bytes(),
        )
    pad = config.image_token_id

    def request(ids: list[int], numbers: list[int], continued: int) -> Request:
        runs, images = [i for i, t in enumerate(ids) if t == pad and ids[i - 1] != pad], []
        for start, number in zip(runs, numbers, strict=True):
            read, content = files[number]
            images.append(Image(read.key, ((start, start + 8),), read.size, content))
        return Request(ids, [3], 4, reader.gathered(images, [], len(ids), "here"), continued)

    begun = [5, 6, *[pad] * 8, 7]

    def play(keep: bool) -> list[list[Completion]]:
        engine = EmbeddedEngine(policy, tokenizer, [tokenizer.eos_token_id])
        found: dict[int, list[Completion]] = {}
        state = {"asked": False}

        def more(_):
            if state["asked"]:
                return []
            state["asked"] = True
            again = []
            for i in range(2):
                whole = begun + found[i][0].token_ids
                again.append(request([*whole, 9, *[pad] * 8, 8], [i, 2 + i], len(whole) * keep))
            return again

        engine.sample(
            [request(begun, [0], 0), request(begun, [1], 0)],
            SamplingParams(4, temperature=0.0),
            found.__setitem__,
            more,
        )
        return [found[i] for i in range(4)]

    kept, fresh = play(True), play(False)
    assert kept[0][0].rollout_logprobs != kept[1][0].rollout_logprobs
    for one, other in zip(kept, fresh, strict=True):
        assert one[0].token_ids == other[0].token_ids
        assert one[0].rollout_logprobs == pytest.approx(other[0].rollout_logprobs, abs=1e-4)
    a, b = (shown_tokens(request(begun, [i], 0)) for i in range(2))
    assert a != b and a[:2] == b[:2] == (5, 6) and len(a) == len(begun) and a[2:10] == (files[0][0].key,) * 8


def test_images_among_some_rows():
    """By hand: rows 2 to 4 are image a, 7 and 8 are b, 10 and 11 are a again."""
    images = ImageRows(
        ["a", "b"], [2, 2], torch.tensor([2, 3, 7, 8, 10, 11]), torch.tensor([0, 1, 2, 3, 0, 1]),
        [Block(2, 4, ((0, 2),)), Block(7, 9, ((5, 7),)), Block(10, 12, ((5, 7), (7, 10)))], torch.arange(36).view(3, 12),
    )  # fmt: skip
    found = images.among(torch.tensor([5, 6, 7, 8, 9]))
    assert found is not None and found.keys == ["b"] and found.counts == [2]
    assert found.rows.tolist() == [2, 3] and found.features.tolist() == [0, 1]
    assert found.blocks == [Block(2, 4, ((0, 2),))]
    assert found.position_ids is not None and found.position_ids[0].tolist() == [5, 6, 7, 8, 9]
    assert images.among(torch.tensor([0, 1, 9])) is None
    whole = images.among(torch.arange(12))
    assert whole is not None and (whole.keys, whole.blocks) == (images.keys, images.blocks)
    assert whole.features.tolist() == images.features.tolist() and whole.rows.tolist() == images.rows.tolist()
