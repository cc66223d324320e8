"""Checkpoints of sharded runs: whole, in float32, and good for any number of ranks."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pgrpo import checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("model") / "tiny")
    (folder / "reward.py").write_text(
        "def ones(completions, **_):\n    return [float(c.count('1')) for c in completions]\n"
    )
    return folder


@pytest.fixture(scope="module")
def train(warm, model):
    """``train(run_dir, *changes)``: four steps, evaluated and saved after each; returns what the run printed."""

    def train(run_dir, *changes, ranks=1, resume=False):
        command = ["-m", "pgrpo", "train", "--config", "quickstart", f"model.path={model}", f"run_dir={run_dir}"]
        command += [
            f"rewards.functions[0].function={model}/reward.py:ones",
            "train.steps=4",
            "eval.every=1",
            "eval.rows=5",
        ]
        command += ["rollout.prompts_per_step=4", "rollout.group_size=4", "checkpoint.every=1", "checkpoint.keep=9"]
        command += ["track.console=false", *changes, *(["--resume", "auto"] if resume else [])]
        return printed(warm.run_on_ranks(command, ranks) if ranks > 1 else [warm.run(command)])

    return train


def printed(processes):
    text = "\n".join(process.stderr for process in processes)
    assert not any(process.returncode for process in processes), text
    return text


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    train(run_dir)
    return run_dir


@pytest.mark.parametrize(("ranks", "dtype", "far"), [(2, "float32", 1e-5), (1, "bfloat16", 5e-3)])
def test_a_sharded_checkpoint_after_an_evaluation_is_whole_and_float32(train, whole, tmp_path, ranks, dtype, far):
    train(tmp_path / "run", f"model.dtype={dtype}", "train.steps=1", ranks=ranks)
    got, _ = checkpoint.load(tmp_path / "run" / "checkpoints" / "step_1")
    want, _ = checkpoint.load(whole / "checkpoints" / "step_1")
    assert len(want["optimizer"]) == 3 * len(want["model"])
    for name in ("model", "optimizer"):
        assert got[name].keys() == want[name].keys()
        assert {t.dtype for t in got[name].values()} == {torch.float32}
    for name, weight in want["model"].items():
        # Adam's first step moves every entry by the learning rate, 5e-4: what rounding turns around differs by two of them.
        assert (got["model"][name] - weight).abs().max() <= 1.1e-3, name
        assert (got["model"][name] - weight).abs().mean() <= far, name
    assert [k for k in got if k.startswith("rng_")] == [f"rng_{r}" for r in range(ranks)]


def test_adapters_of_one_rank_go_on_with_two(train, tmp_path):
    """Checkpoints hold whole float32 adapters, nothing else, and the two runs' weights stay together."""
    lora = ["model.lora_rank=4", "optim.lr=1e-3", "optim.eps=1e-3", "eval.every=0"]
    train(tmp_path / "whole", *lora, "train.steps=3")
    train(tmp_path / "parts", *lora, "train.steps=1")
    assert "resuming on 2" in train(tmp_path / "parts", *lora, "train.steps=3", ranks=2, resume=True)
    (got, _), (want, _) = (checkpoint.load(tmp_path / name / "checkpoints" / "step_3") for name in ("parts", "whole"))
    first, _ = checkpoint.load(tmp_path / "parts" / "checkpoints" / "step_1")
    assert got["model"].keys() == want["model"].keys()
    assert len(want["optimizer"]) == 3 * len(want["model"])
    for name, weight in want["model"].items():
        assert ".lora_" in name
        assert got["model"][name].dtype == torch.float32
        assert (got["model"][name] - weight).norm() <= 1e-2 * (weight - first["model"][name]).norm(), name


@pytest.mark.faults
def test_a_checkpoint_of_one_rank_resumes_on_two(train, whole, tmp_path):
    train(tmp_path / "run", "train.steps=2")
    shown = train(tmp_path / "run", ranks=2, resume=True)
    assert "saved on 1 ranks, resuming on 2" in shown
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1, 2, 3, 4]
    for got, want in zip(rows(tmp_path / "run"), rows(whole), strict=True):
        for name in ("reward", "loss", "grad_norm", "epoch", "entropy", "eval/reward"):
            if name in want:
                assert got[name] == pytest.approx(want[name], rel=1e-3, abs=1e-5), (got["step"], name)
    (got, scalars), (want, uninterrupted) = (
        checkpoint.load(run / "checkpoints" / "step_4") for run in (tmp_path / "run", whole)
    )
    assert scalars["stream"] == uninterrupted["stream"]
    for name, moment in want["optimizer"].items():
        assert torch.allclose(got["optimizer"][name], moment, rtol=1e-2, atol=1e-5), name


@pytest.mark.faults
def test_shards_are_read_by_any_other_number_of_ranks(warm, tmp_path):
    """Each reads what the one before wrote, weights and moments, bit for bit, and writes its own shards; with two copies of
    the weights on 4 ranks, the first copy's ranks do."""
    worker, before = Path(__file__).with_name("shard_worker.py"), ""
    for step, (ranks, fsdp_size) in enumerate([(1, ""), (3, ""), (2, ""), (4, ""), (4, 2), (4, 1), (1, "")]):
        command = [worker, before, tmp_path, step, fsdp_size]
        printed(warm.run_on_ranks(command, ranks) if ranks > 1 else [warm.run(command)])
        before = str(tmp_path / f"step_{step}")
    first, last = (checkpoint.load(tmp_path / f"step_{step}") for step in (0, 6))
    assert first[1] == last[1] == {"ranks": 1}
    for set_name in ("model", "optimizer"):
        assert first[0][set_name].keys() == last[0][set_name].keys()
        assert all(torch.equal(first[0][set_name][n], last[0][set_name][n]) for n in first[0][set_name])
    of_four, scalars = checkpoint.load(tmp_path / "step_3")
    assert scalars == {"ranks": 4} and [of_four[f"rng_{r}"]["seed"].item() for r in range(4)] == [0, 1, 2, 3]
    parts = [load_file(tmp_path / "step_3" / f"optimizer.{r}.safetensors")["long.exp_avg"] for r in range(4)]
    assert [len(part) for part in parts] == [4, 4, 4, 1]  # each rank wrote its own
