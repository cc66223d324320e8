"""SIGTERM and Ctrl-C in every part of a step: out within seconds, saved, and the resumed run equals the uninterrupted one."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import pgrpo
from pgrpo import checkpoint

pytestmark = pytest.mark.faults
REWARD = """\
import os, subprocess, sys, time
from pathlib import Path
seen = 0
def reward(completions, **_):
    global seen
    seen += len(completions)
    marker = Path(os.environ["MARKER"])
    # The last call of step 2: the evaluation before step 1 scores 16 x 4 sampled and 16 greedy completions, a step 16 x 4.
    if os.environ["PHASE"] == "reward" and seen == 208 and not marker.exists():
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
        marker.write_text(f"{os.getpid()} {child.pid}")
        time.sleep(300)
    return [float(c.count("1")) for c in completions]
"""
# Only watches: writes the marker when the phase of the second step begins.
WATCH = """\
import os, sys
from pathlib import Path
from pgrpo import grpo
from pgrpo.__main__ import run
from pgrpo.rollout.embedded.engine import EmbeddedEngine
from pgrpo.training import session
phase, marker, now = os.environ["PHASE"], Path(os.environ["MARKER"]), []
def watch(owner, name, begins):
    function = getattr(owner, name)
    def call(*args, **kwargs):
        if begins(*args) and not marker.exists():
            marker.write_text(str(os.getpid()))
        return function(*args, **kwargs)
    setattr(owner, name, call)
watch(grpo, "grpo_step", lambda parts, progress: now.append(progress.step))
watch(session, "evaluate_held_out", lambda *args: (now.append("eval"), phase == "eval" and args[5] == 2)[1])
watch(EmbeddedEngine, "_sample_wave", lambda *_: phase == "rollout" and now[-1] == 1)
watch(grpo, "backward", lambda *_: phase == "update" and now[-1] == 1)
run()
"""


@pytest.fixture
def start(warm, tiny_model):
    """``start(run_dir, phase)``: a training in a process of its own, which leaves a marker when that phase of step 2 begins."""

    def start(run_dir, phase):
        environment = {"PHASE": phase, "MARKER": f"{run_dir}.marker"}
        return warm.start(
            ["-c", WATCH, "train", "--config", "quickstart", "--resume", "auto", *keys(tiny_model, run_dir)],
            environment,
        )

    return start


def keys(model, run_dir):
    own = run_dir.parent / "own.py"
    own.write_text(REWARD)
    keys = [f"model.path={model}", f"run_dir={run_dir}", "train.steps=3", "rollout.prompts_per_step=16"]
    keys += ["rollout.group_size=4", "rollout.max_concurrent=4", "train.token_budget=30", "track.console=false"]
    keys += ["eval.every=2", "eval.rows=16", "eval.samples=4", f"rewards.functions[0].function={own}:reward"]
    return keys


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists() or not path.read_text():
        assert process.poll() is None, process.stderr
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return [int(pid) for pid in path.read_text().split()]


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PHASE", "")
        patch.setenv("MARKER", "")
        return pgrpo.train("quickstart", keys(tiny_model, run_dir))


@pytest.mark.parametrize(
    ("phase", "signum", "code"),
    [
        ("rollout", signal.SIGTERM, 143),
        ("reward", signal.SIGTERM, 143),
        ("reward", signal.SIGINT, 130),
        ("update", signal.SIGTERM, 143),
        ("eval", signal.SIGTERM, 143),
    ],
)
def test_a_signal_in_any_phase_stops_with_a_save(start, tmp_path, whole, phase, signum, code):
    run_dir = tmp_path / "run"
    process = start(run_dir, phase)
    wait_for(Path(f"{run_dir}.marker"), process)
    sent = time.monotonic()
    process.send_signal(signum)
    assert process.wait(timeout=30) == code, process.stderr
    took = time.monotonic() - sent
    print(f"{phase}: out after {took:.2f} s")
    assert took < 5
    done = 2 if phase == "eval" else 1  # the step that was begun is dropped
    assert checkpoint.latest(run_dir / "checkpoints") == run_dir / "checkpoints" / f"step_{done}"
    assert [row["step"] for row in rows(run_dir)] == [0, 1]

    process = start(run_dir, phase)
    assert process.wait(timeout=120) == 0, process.stderr
    (got, scalars), (want, uninterrupted) = (
        checkpoint.load(folder / "checkpoints" / "step_3") for folder in (run_dir, whole)
    )
    assert got.keys() == want.keys()
    for name, named in want.items():
        assert all(torch.equal(got[name][n], tensor) for n, tensor in named.items()), name
    assert scalars["stream"] == uninterrupted["stream"]
    stable = [
        [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows(folder)]
        for folder in (run_dir, whole)
    ]
    assert stable[0] == stable[1]


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_ends_everything_at_once(start, tmp_path, first):
    """Also what a reward's worker process had started."""
    process = start(tmp_path / "run", "reward")
    pids = wait_for(Path(f"{tmp_path / 'run'}.marker"), process)
    assert all(alive(pid) for pid in pids)
    process.send_signal(signal.SIGSTOP)  # so that both signals are there before either is answered
    process.send_signal(first)
    process.send_signal(signal.SIGTERM if first == signal.SIGINT else signal.SIGINT)
    sent = time.monotonic()
    process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=10) in (130, 143)
    assert time.monotonic() - sent < 2
    time.sleep(0.2)
    assert not any(alive(pid) for pid in pids)


@pytest.mark.parametrize("blocked", ["in its work", "elsewhere"])
def test_signals_are_answered_without_a_terminal(warm, blocked):
    """Whoever read stderr is gone."""
    done = warm.run(["-c", f"import os; os.close(2)\n{TAKEN_ELSEWHERE}", blocked])
    assert (done.returncode, done.stdout) == ((0, "Stopped 15\n") if blocked == "in its work" else (130, ""))


@pytest.mark.parametrize("blocked", ["in its work", "elsewhere"])
def test_a_signal_taken_by_another_thread_reaches_the_main_thread(warm, blocked):
    """As after SIGCONT. Python's own handler runs in the main thread only, which waits for a lock here, without end."""
    done = warm.run(["-c", TAKEN_ELSEWHERE, blocked])
    assert (done.returncode, done.stdout) == ((0, "Stopped 15\n") if blocked == "in its work" else (130, ""))
    assert done.stderr == "pgrpo: SIGTERM: stopping, with a save; once more to stop at once\n"


TAKEN_ELSEWHERE = """\
import signal, sys, threading, time
from pgrpo.process.stopping import StopFlag, Stopped
from pgrpo.process.signals import stop_signals
flag, lock = StopFlag(), threading.Lock()
other = threading.Thread(target=time.sleep, args=(100,), daemon=True)
def send():
    for signum in (signal.SIGTERM, signal.SIGINT)[: 1 if sys.argv[1] == "in its work" else 2]:
        time.sleep(0.5)
        signal.pthread_kill(other.ident, signum)
with stop_signals(flag), lock:
    other.start()
    threading.Thread(target=send, daemon=True).start()
    if sys.argv[1] == "elsewhere":
        lock.acquire()
    try:
        with flag.breaking_off():
            lock.acquire()
    except Stopped as stopped:
        print("Stopped", stopped.signum)
"""


def test_a_training_runs_in_a_thread_whose_signals_are_the_callers(tiny_model, tmp_path):
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGURG)}
    config = {
        "recipe": "addition", "run_dir": str(tmp_path / "run"), "model": {"path": str(tiny_model), "dtype": "float32"},
        "rollout": {"prompts_per_step": 2, "group_size": 2, "max_completion_tokens": 2}, "train": {"steps": 1, "token_budget": 100},
        "rewards": {"functions": [{"function": "math"}, {"function": str(write_own(tmp_path)) + ":reward"}]},
        "eval": {"every": 1, "rows": 2}, "track": {"console": False},
    }  # fmt: skip
    with ThreadPoolExecutor(1) as pool:
        folder = pool.submit(pgrpo.train, config, rewards=[later]).result(timeout=120)
    assert [row["step"] for row in rows(folder)] == [0, 1]
    assert checkpoint.latest(folder / "checkpoints") == folder / "checkpoints" / "step_1"
    assert {signum: signal.getsignal(signum) for signum in before} == before


def write_own(folder):
    """A reward of a worker process."""
    (folder / "own.py").write_text("def reward(completions):\n    return [1.0 for _ in completions]\n")
    return folder / "own.py"


async def later(completions, **_):
    await asyncio.sleep(0)
    return [float(i) for i, _ in enumerate(completions)]
