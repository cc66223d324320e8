"""Right answers are read when the data is loaded, of training rows and held-out rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pgrpo.config import ConfigError, load_config
from pgrpo.distributed.world import World
from pgrpo.training.build import build

ROWS = [{"a": a, "b": 7, "answer": {"text": f"{a + 7}"}} for a in range(10, 22)]
BAD = {"a": 1, "b": 1, "answer": {"text": None}}


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def parts(tiny_model: Path, tmp_path: Path, *keys: str, train: list, held_out: list):
    config = load_config("quickstart", [
        f"model.path={tiny_model}", f"run_dir={tmp_path / 'run'}", "rollout.prompts_per_step=8", "eval.every=1",
        f"data.path={write(tmp_path / 'train.jsonl', train)}", f"data.eval_path={write(tmp_path / 'held.jsonl', held_out)}",
        "rewards.functions=[{function: exact_match, args: {column: answer.text}}]", *keys,
    ])  # fmt: skip
    return build(config, World(0, 1, torch.device("cpu")))


def test_a_row_without_a_right_answer_stops_the_run_before_it_begins(tiny_model, tmp_path):
    for train, held_out, kind in (([*ROWS, BAD, BAD], ROWS, "14 training"), (ROWS, [*ROWS, BAD], "13 held-out")):
        number = 1 + (kind == "14 training")
        message = rf"cannot read the answers of {number} of {kind} rows \(row 12: exact_match: .*`answer\.text` is empty.*=drop"
        with pytest.raises(ConfigError, match=message):
            parts(tiny_model, tmp_path, train=train, held_out=held_out)


def test_such_rows_are_dropped_counted_and_named(tiny_model, tmp_path, caplog):
    keys = ["rewards.bad_gold=drop"]
    with parts(tiny_model, tmp_path, *keys, train=[BAD, *ROWS], held_out=[*ROWS[:3], BAD, *ROWS[3:]]) as built:
        assert sorted(prompt.index for prompt in built.stream.take(12)) == list(range(1, 13))
        assert [prompt.index for prompt in built.held_out] == [0, 1, 2, *range(4, 13)]
    assert "the answers of 1 of 13 training rows (row 0: exact_match: " in caplog.text
    assert "the answers of 1 of 13 held-out rows (row 3: exact_match: " in caplog.text
    with pytest.raises(ConfigError, match=r"the data set has only 4 prompt\(s\)"):
        parts(tiny_model, tmp_path, *keys, train=[BAD] * 9 + ROWS[:4], held_out=ROWS)
    with pytest.raises(ConfigError, match=r"cannot read the answers of 9 of 9 training rows .*; \.\.\.\)"):
        parts(tiny_model, tmp_path, *keys, train=[BAD] * 9, held_out=ROWS)
