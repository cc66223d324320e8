"""Two ranks agree on what a fault on one of them means."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pgrpo import checkpoint

pytestmark = pytest.mark.faults
ROOT = Path(__file__).resolve().parents[2]
REWARD = """\
import os, time
from pathlib import Path
seen = 0
def reward(completions, **_):
    global seen
    seen += len(completions)
    step = -(-seen // 8)  # this rank's two groups of four are scored in one call or in two
    values = [float(c.count("1")) for c in completions]
    if os.environ["RANK"] == "1":
        if "NAN" in os.environ and step in (2, 3):
            values[0] = 1e60
        if "RAISE" in os.environ and step == 3:
            raise ValueError("odd")
        if "SLEEP" in os.environ and step == 2:
            Path(os.environ["SLEEP"]).write_text(str(os.getppid()))
            time.sleep(60)
    return values
"""


def arguments(model, folder, *more):
    (folder / "own.py").write_text(REWARD)
    keys = [f"model.path={model}", f"run_dir={folder / 'run'}", "train.steps=4", "rollout.prompts_per_step=4"]
    keys += ["rollout.group_size=4", "eval.every=0", "track.console=false", "loss.scale_advantages=none"]
    keys += [f"rewards.functions[0].function={folder / 'own.py'}:reward", "checkpoint.every=1", *more]
    return ["-m", "pgrpo", "train", "--config", "quickstart", *keys]


@pytest.fixture
def start(warm, tiny_model, tmp_path):
    return lambda *more, **environment: warm.start_on_ranks(arguments(tiny_model, tmp_path, *more), 2, environment)


def wait(ranks, seconds):
    """What each rank exited with, and what it printed."""
    return [rank.wait(seconds) for rank in ranks], [rank.stderr for rank in ranks]


def rank_1(processes, marker):
    deadline = time.monotonic() + 120
    while not marker.exists() or not marker.read_text():
        assert all(process.poll() is None for process in processes) and time.monotonic() < deadline
        time.sleep(0.05)
    return int(marker.read_text())


def test_nan_on_one_rank_skips_the_update_on_both(start, tmp_path):
    codes, printed = wait(start(NAN="1"), 200)
    assert codes == [0, 0], printed
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped_updates"] for row in rows] == [0, 1, 1, 0]
    saved, _ = checkpoint.load(tmp_path / "run" / "checkpoints" / "step_4")
    assert {t.item() for name, t in saved["optimizer"].items() if name.endswith(".step")} == {2}


def test_a_signal_to_one_rank_stops_both_with_a_save(start, tmp_path):
    ranks = start("checkpoint.every=0", SLEEP=str(tmp_path / "marker"))
    assert rank_1(ranks, tmp_path / "marker") == ranks[1].pid
    sent = time.monotonic()
    ranks[1].send_signal(signal.SIGTERM)
    codes, printed = wait(ranks, 60)
    print(f"both out after {time.monotonic() - sent:.1f} s")
    assert codes == [143, 143], printed
    assert "stopped after step 1 of 4, saved" in printed[0] and "stopped after" not in printed[1]
    assert checkpoint.latest(tmp_path / "run" / "checkpoints") == tmp_path / "run" / "checkpoints" / "step_1"
    assert time.monotonic() - sent < 20


def test_when_one_rank_dies_the_other_exits_in_bounded_time(tiny_model, tmp_path):
    """Under torchrun itself, which ends the ranks of a failed run."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "SLEEP": str(tmp_path / "marker")}
    # Not through a pipe, which a killed rank's reward worker would hold open.
    process = subprocess.Popen(
        [sys.executable, *launch, *arguments(tiny_model, tmp_path)],
        cwd=ROOT, env=os.environ | environment, stderr=(tmp_path / "stderr").open("w"),
    )  # fmt: skip
    pid = rank_1([process], tmp_path / "marker")
    died = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    code = process.wait(timeout=100)
    print(f"out after {time.monotonic() - died:.1f} s")
    assert code == 1, (tmp_path / "stderr").read_text()
    assert time.monotonic() - died < 60
    assert checkpoint.latest(tmp_path / "run" / "checkpoints") == tmp_path / "run" / "checkpoints" / "step_1"


def assert_both_stopped_after_step_2(ranks, folder, message):
    """Non-zero, the reason once and by the rank that has it, the last finished step saved."""
    codes, printed = wait(ranks, 200)
    assert codes == [1, 1], printed
    assert printed[1].count(message) == 1 and message not in printed[0]
    assert "pgrpo: RankFailed: rank 1 failed; its own log has the reason" in printed[0]
    assert "failed after step 2 of 4, saved; --resume auto continues" in printed[0] and "failed after" not in printed[1]
    assert f'File "{ROOT}/pgrpo' not in "".join(printed), "a traceback of ours"
    assert checkpoint.latest(folder / "run" / "checkpoints") == folder / "run" / "checkpoints" / "step_2"


def test_a_reward_that_raises_on_one_rank_stops_both_with_a_save(start, tmp_path):
    assert_both_stopped_after_step_2(start("checkpoint.every=0", RAISE="1"), tmp_path, "it raised ValueError: odd")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("step:5@1", "EngineError: vLLM failed in rollout: RuntimeError: the device is lost"),
        ("push:3@1", "EngineError: vLLM failed in weight push: RuntimeError: the device is lost"),
        ("stale:3@1", "CanaryError: canary: the slope of (engine - new) on (old - new) log-probs is "),
    ],
)
def test_an_engine_that_fails_on_one_rank_stops_both_with_a_save(start, tmp_path, fault, message):
    """In a rollout, in the middle of a push in which both ranks gather each tensor, and in the canary (see tests/fakes/vllm)."""
    more = [
        "checkpoint.every=0",
        "rollout.engine=vllm",
        "rollout.canary_every=1",
        "optim.lr=1e-2",
        "rollout.group_size=8",
    ]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "fakes")])
    assert_both_stopped_after_step_2(start(*more, PYTHONPATH=paths, FAULT=fault), tmp_path, message)
