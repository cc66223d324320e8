"""Losses and gradients that are not finite: the update is skipped and counted, and too many in a row stop the run.

The fault: a reward of 1e60, which no check of rewards refuses, is infinite as a float32 advantage.
"""

from __future__ import annotations

import itertools
import json
import math
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from making import episode, group

import pgrpo
from pgrpo import checkpoint
from pgrpo.config import load_config, secrets
from pgrpo.distributed.world import World
from pgrpo.training.messages import _dump
from pgrpo.training.progress import Progress
from pgrpo.training.update import NonFiniteError
from pgrpo.types import Prompt

pytestmark = pytest.mark.faults


def spoiled(*calls):
    """A reward that is 1e60 for one completion in these calls (one a step, counted from 1)."""
    count = 0

    def reward(completions, **_):
        nonlocal count
        count += 1
        values = [float(c.count("1")) for c in completions]
        return [1e60 if count in calls else values[0], *values[1:]]

    return reward


def train(model, run_dir, *more, reward):
    torch.set_num_threads(1)
    keys = [f"model.path={model}", f"run_dir={run_dir}", "train.steps=6", "rollout.prompts_per_step=4", "eval.every=0"]
    keys += ["track.console=false", "checkpoint.every=1", "checkpoint.keep=9", "loss.scale_advantages=none"]
    return pgrpo.train("quickstart", [*keys, "rollout.group_size=4", *more], rewards=[reward])


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_nan_or_inf_updates_are_skipped_and_counted(tiny_model, tmp_path):
    run = train(tiny_model, tmp_path / "run", "train.max_skipped_updates=2", reward=spoiled(2, 3, 5))
    assert [row["skipped_updates"] for row in rows(run)] == [0, 1, 1, 0, 1, 0]
    saved = [checkpoint.load(run / "checkpoints" / f"step_{step}")[0] for step in range(1, 7)]
    for step, (before, after) in enumerate(itertools.pairwise(saved), start=2):
        for name in ("model", "optimizer"):
            equal = all(torch.equal(tensor, after[name][n]) for n, tensor in before[name].items())
            assert equal == (step in (2, 3, 5)), (step, name)
    assert all(t.isfinite().all() for named in saved for t in (named["model"] | named["optimizer"]).values())


def test_too_many_skipped_updates_in_a_row_stop_the_run_with_the_batch(tiny_model, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(NonFiniteError, match=r"3 updates in a row .*max_skipped_updates=2\).*bad_batch_step_5\.json"):
        train(tiny_model, run, "train.max_skipped_updates=2", reward=spoiled(1, 3, 4, 5))
    assert [row["skipped_updates"] for row in rows(run)] == [1, 0, 1, 1]
    batch = json.loads((run / "bad_batch_step_5.json").read_text())
    assert len(batch) == 4 and len(batch[0]["episodes"]) == 4
    spoiled_one = max(
        (episode for group in batch for episode in group["episodes"]), key=lambda episode: episode["reward"]
    )
    assert spoiled_one["reward"] == 1e60 and spoiled_one["samples"][0]["token_ids"] and batch[0]["prompt"]["text"]
    newest = checkpoint.latest(run / "checkpoints")
    assert newest is not None and newest == run / "checkpoints" / "step_4"
    assert all(t.isfinite().all() for t in checkpoint.load(newest)[0]["model"].values())


def test_a_batch_that_cannot_be_written_does_not_hide_the_failure(tiny_model, tmp_path):
    run, spoil = tmp_path / "run", spoiled(2)

    def reward(completions, **columns):
        (run / "bad_batch_step_2.json").mkdir(exist_ok=True)
        return spoil(completions, **columns)

    message = r"grad_norm=.* in a row .*bad_batch_step_2\.json: cannot be written \(Is a directory\)"
    with pytest.raises(NonFiniteError, match=message):
        train(tiny_model, run, "train.max_skipped_updates=0", reward=reward)
    newest = checkpoint.latest(run / "checkpoints")
    assert newest is not None and newest.name == "step_1"


def dump(tmp_path, group):
    """Where the batch of step 5 is."""
    config = load_config("quickstart", [f"run_dir={tmp_path}"])
    parts: Any = SimpleNamespace(config=config, world=World(0, 1, torch.device("cpu")))
    return _dump(parts, Progress(step=4), [group])


def test_the_batch_holds_all_of_its_numbers_whatever_its_rows_hold(tmp_path):
    """Log-probs of the sampler that are nan, and columns that JSON has no form for and that cannot be copied."""
    columns = {"lock": threading.Lock(), "of pairs": {(1, 2): 3}, "set": {1}, "half": "\ud83d", "answer": "4"}
    done = episode(
        [5, 6, 7], math.nan, mask=[True, True, False], logprobs=[-0.5, math.nan, -math.inf], advantage=0.25,
        text="2+2", parts={"f": None},
    )  # fmt: skip
    told = dump(tmp_path, group(Prompt(3, "2+2=", [1, 2], columns), done))
    assert told.endswith("bad_batch_step_5.json has the batch")
    [read] = json.loads((tmp_path / "bad_batch_step_5.json").read_text())
    [only] = read["episodes"]
    [sample] = only["samples"]
    assert str(sample["rollout_logprobs"]) == "[-0.5, nan, -inf]" and str(only["reward"]) == "nan"
    assert sample["token_ids"] == [5, 6, 7] and sample["mask"] == [True, True, False]
    assert read["prompt"]["token_ids"] == [1, 2] and read["prompt"]["index"] == 3 and sample["advantages"] == [0.25] * 3
    assert read["prompt"]["columns"]["half"] == "\ud83d" and read["prompt"]["columns"]["answer"] == "4"


def test_a_dumped_batch_holds_no_secret_and_is_not_written_through_a_link(tmp_path, monkeypatch):
    """Neither in a text, however JSON escapes it, nor in a column's own types, nor as token ids."""
    secret = 'ab"c\\d'
    monkeypatch.setattr(secrets, "_spellings", [])
    secrets.remember(secret)
    columns = {"set": {secret}, "list": [(secret,)], secret: 1, "n": 0.123456789}
    texts = [secret, "4"]
    done = [episode([5 + i], 1.0 - i, logprobs=[-0.5], text=text) for i, text in enumerate(texts)]
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "bad_batch_step_5.json").symlink_to(tmp_path / "victim")
    assert dump(tmp_path, group(Prompt(3, f"key {secret}", [1, 2], columns), *done)).endswith("has the batch")
    text = (tmp_path / "bad_batch_step_5.json").read_text()
    [read] = json.loads(text)
    assert "ab" not in text.replace('"bad', "") and "c\\\\d" not in text
    assert read["prompt"]["columns"] == {
        "set": "{'(redacted)'}", "list": [["(redacted)"]], "(redacted)": 1, "n": 0.123456789
    }  # fmt: skip
    samples = [sample for one in read["episodes"] for sample in one["samples"]]
    assert [part["token_ids"] for part in (read["prompt"], *samples)] == ["(redacted)", "(redacted)", [6]]
    assert {sample["prompt_ids"] for sample in samples} == {"(redacted)"}
    assert (tmp_path / "victim").read_text() == "precious"
