"""Runs of an environment of the long form in worker processes, with LoRA: resumed, evaluated, exported, checked, reported."""

from __future__ import annotations

import json

import pytest
import torch
from leading import save_led
from transformers import AutoModelForCausalLM

import pgrpo
from pgrpo import checkpoint
from pgrpo.commands.check import check
from pgrpo.commands.generate import generate
from pgrpo.commands.report import page
from pgrpo.config import load_config


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The config, and the folder of a run of it."""
    folder = tmp_path_factory.mktemp("led")
    config = save_led(folder)
    return config, pgrpo.train(config)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_resumed_run_is_bit_equal(whole, tmp_path):
    config, run = whole
    part = [f"run_dir={tmp_path / 'part'}"]
    pgrpo.train(config, [*part, "train.steps=2"])
    pgrpo.train(config, part, resume="auto")
    first, second = (
        checkpoint.load(folder / "checkpoints" / "step_3")[0]["model"] for folder in (run, tmp_path / "part")
    )
    assert first and all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert (run / "completions.jsonl").read_text() == (tmp_path / "part" / "completions.jsonl").read_text()


def test_episodes_have_the_samples_of_rewritten_and_branched_histories(whole):
    _, run = whole
    metrics = rows(run / "metrics.jsonl")
    trained = [row for row in metrics if "loss" in row]
    # The first turn, its sequel and the branch, where no turn reached its limit.
    assert len(trained) == 3 and all(2 < row["episodes/samples/mean"] <= 3 for row in trained)
    assert all(row["grad_norm"] > 0 and row["tokens/rho"] > 1 for row in trained)
    assert {"eval/reward", "eval/rewards/Led/mean"} <= metrics[-1].keys()
    shown = [row for row in rows(run / "completions.jsonl") if row["finish_reason"] == "stop"]
    roles = ["assistant", "user", "assistant", "environment", "assistant"]
    assert shown and all([m["role"] for m in row["messages"]] == roles for row in shown)
    assert all(row["parts"]["Led"] == row["reward"] > 0 for row in shown)
    assert rows(run / "eval" / "step_3" / "samples.jsonl")[0]["messages"]


def test_an_export_is_the_model_that_was_trained(whole, tmp_path):
    _, run = whole
    out = pgrpo.export(run, tmp_path / "export")
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (run.parent / "model", out))
    moved = [
        n for (n, a), b in zip(before.named_parameters(), after.parameters(), strict=True) if not torch.equal(a, b)
    ]
    assert moved and all(".layers." in name for name in moved)


def test_it_is_checked_and_generates_and_is_reported(whole, tmp_path, capsys):
    path, run = whole
    config = load_config(path, [f"run_dir={tmp_path / 'run'}"])
    check(config)
    shown = capsys.readouterr().out
    assert shown.count("--- completion (") == 4 and shown.endswith("all checks passed\n")
    assert "template, an answer behind reasoning and a user message: its tokens are exact" in shown
    prompts = tmp_path / "rows.jsonl"
    prompts.write_text('{"row": 5}\n')
    generate(config, str(run / "checkpoints" / "step_3"), prompts, samples=2, out=tmp_path / "out.jsonl")
    assert [row["messages"][1]["content"] for row in rows(tmp_path / "out.jsonl")] == ["abc"] * 2
    assert "branch 1" in page(run, rows(run / "metrics.jsonl"))
