"""A vLLM engine that dies, hangs, loses weights or gives completions up, in a run as a user starts it (see tests/fakes/vllm)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from making import save_caller

import pgrpo
from pgrpo import checkpoint, grpo
from pgrpo.rollout.vllm.canary import CanaryError
from pgrpo.rollout.vllm.delivery import DeliveryError
from pgrpo.rollout.vllm.engine import EngineError

pytestmark = pytest.mark.faults
ROOT = Path(__file__).resolve().parents[2]
FAKES = ROOT / "tests" / "fakes"


def reward(completions, **_):
    """Above 0 for any text: a completion that was given up would be the only 0."""
    return [float(c.count("1")) + 0.01 * len(c) for c in completions]


def keys(model, folder, *more):
    """Four steps of four prompts: decoding is called four times a step, loading once."""
    keys = [f"model.path={model}", f"run_dir={folder / 'run'}", "train.steps=4", "rollout.prompts_per_step=4"]
    keys += ["rollout.group_size=4", "eval.every=0", "track.console=false", "optim.lr=1e-2", "rollout.engine=vllm"]
    return [*keys, "rollout.canary_every=1", *more]


@pytest.fixture
def train(tiny_model, tmp_path, monkeypatch):
    """``train(fault, *keys)`` in this process. Returns the run's folder."""
    torch.set_num_threads(1)
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("FAULT", "")):
        monkeypatch.setenv(name, value)  # also so that what the engine sets is taken back
    monkeypatch.syspath_prepend(FAKES)
    assert not any(name.partition(".")[0] == "vllm" for name in sys.modules)

    def run(fault, *more, resume=None, tools=()):
        monkeypatch.setenv("FAULT", fault)
        try:
            return pgrpo.train(
                "quickstart", keys(tiny_model, tmp_path, *more), rewards=[reward], tools=tools, resume=resume
            )
        finally:
            for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
                del sys.modules[name]

    return run


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def saved(folder):
    """Names of the checkpoints, all of them whole."""
    paths = sorted((folder / "run" / "checkpoints").iterdir())
    return [path.name for path in paths if checkpoint.verify(path)]


def f(n: int) -> int:
    """Say it.

    Args:
        n: A number.
    """
    return n


def test_turns_with_tools_join_vllms_steps_and_are_sampled_again_if_aborted(train, tmp_path, caplog, tmp_path_factory):
    model = tmp_path_factory.mktemp("caller")
    save_caller(model)
    chat = ["prompt.template=null", "prompt.messages=[{role: user, content: '{a}+{b}'}]", "data.max_prompt_tokens=20"]
    keys = ["environment.max_turns=3", "rollout.max_completion_tokens=14", "rollout.group_size=2", "train.steps=2"]
    train("give_up:5", f"model.path={model}", *chat, *keys, "track.completions=8", tools=[f])
    assert caplog.text.count("(abort): it is sampled again") == 1
    rows = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 16 and all(row["episodes/turns/mean"] > 1 for row in metrics)
    told = [m for row in rows for m in row["messages"] if m["role"] == "tool" and m["content"] == "1"]
    assert len(told) > 16
    # Of sampled tokens alone; a step of equal rewards has none.
    assert all(row.get("sampling/sampling_logp_difference/max", 0.0) < 1e-4 for row in metrics)


def test_an_engine_that_dies_ends_the_run_with_the_last_step_saved(train, tmp_path, caplog):
    with pytest.raises(EngineError, match=r"^vLLM failed in rollout: RuntimeError: the device is lost$"):
        train("step:11")  # in the third step
    assert "failed after step 2 of 4, saved; --resume auto continues" in caplog.text
    assert steps(tmp_path) == [1, 2] and saved(tmp_path) == ["step_2"]
    train("", resume="auto")
    assert steps(tmp_path) == [1, 2, 3, 4] and saved(tmp_path) == ["step_2", "step_4"]


@pytest.mark.parametrize(("fault", "what"), [("hang:9", "a vLLM rollout"), ("stall:3", "vLLM's weight push")])
def test_an_engine_that_hangs_ends_the_run_at_its_deadline(warm, tiny_model, tmp_path, fault, what):
    more = keys(tiny_model, tmp_path, "rollout.vllm_deadline_s=4", "checkpoint.every=1")
    done = warm.run(
        ["-m", "pgrpo", "train", "--config", "quickstart", *more], {"PYTHONPATH": str(FAKES), "FAULT": fault}
    )
    assert done.returncode == 1 and steps(tmp_path) == [1, 2], done.stderr
    assert f"{what} took longer than rollout.vllm_deadline_s=4 seconds and was ended; raise" in done.stderr
    assert saved(tmp_path)[-1] in ("step_1", "step_2")


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("push", EngineError, "vLLM failed in weight push: RuntimeError: the device is lost"),
        ("drop", DeliveryError, r"the engine did not load model\.layers\.1\.mlp\.up_proj\.weight \(1 in all\)"),
        ("lie", DeliveryError, r"checksums of model\.layers\.1\.mlp\.up_proj\.weight \(1 in all\)"),
        ("stale", CanaryError, r"the slope of \(engine - new\) on \(old - new\) log-probs is (1\.0|0\.9)"),
    ],
)
def test_weights_that_do_not_arrive_stop_the_run(train, tmp_path, fault, error, message):
    with pytest.raises(error, match=message):
        train(f"{fault}:3")
    assert steps(tmp_path) == [1, 2] and saved(tmp_path) == ["step_2"]


def test_a_completion_that_vllm_aborts_is_sampled_again(train, tmp_path, caplog, monkeypatch):
    versions, update = [], grpo.update_policy

    def noting(learner, progress, groups):
        versions.append({sample.weights_version for group in groups for sample in group.samples})
        return update(learner, progress, groups)

    monkeypatch.setattr(grpo, "update_policy", noting)
    train("give_up:6", "track.completions=16")
    assert caplog.text.count("of 4 (abort): it is sampled again") == 1
    rows = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    assert [sum(row["step"] == step for row in rows) for step in (1, 2, 3, 4)] == [16] * 4
    assert all((row["reward"] > 0) == bool(row["completion"]) for row in rows)
    assert versions == [{0}, {1}, {2}, {3}]  # of the weights: the steps behind them


def test_a_completion_that_vllm_always_aborts_stops_the_run(train, tmp_path):
    with pytest.raises(EngineError, match=r"gave up a completion of prompt \d of 4 \(abort\), 3 times in a row"):
        train("refuse:12")
    assert steps(tmp_path) == [1, 2] and saved(tmp_path) == ["step_2"]
