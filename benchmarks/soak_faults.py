"""``pgrpo`` with faults, which benchmarks/soak.py starts instead of ``pgrpo``. It wraps functions of pgrpo in this process, to
know the current step and to corrupt a number; pgrpo's files are not changed.

The folder ``SOAK_DIR`` has ``plan.json``, the list of faults in their order. A fault is recorded in ``events.jsonl`` before it
happens, so that it happens once, however often its step is repeated. Kinds:

- ``sigkill``, ``sigterm``: sent ``delay`` seconds after a step began or, if ``starting``, after this process did;
- ``reward_raise``: the next ``count`` calls of the reward raise. ``reward_hang``: the next call never ends;
- ``nan_loss``, ``nan_gradient``: of the next micro-batch;
- ``full_disk``: all but ``leave`` bytes of the run's disk are taken (a disk that is no mount: no file may grow past ``leave``),
  until the second start after that.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from pgrpo.rewards.answers import exact_match

FOLDER = Path(os.environ.get("SOAK_DIR", "no-soak"))
DISK, EVENTS, REWARD = FOLDER / "disk", FOLDER / "events.jsonl", FOLDER / "reward"
BALLAST = DISK / "ballast"


def reward(completions: list[str], answer: list[Any], **columns: Any) -> list[float | ValueError]:
    """Exact match, unless a fault is due. In the worker process."""
    if REWARD.exists():
        kind, _, left = REWARD.read_text().partition(" ")
        if kind == "reward_hang" or left == "1":
            REWARD.unlink()
        else:
            REWARD.write_text(f"{kind} {int(left) - 1}")
        if kind == "reward_hang":
            time.sleep(100_000)
        raise RuntimeError("injected")
    return exact_match(completions, answer=answer)


def note(event: str, **more: Any) -> None:
    """Append to ``events.jsonl`` and say it."""
    row = {"time": round(time.time(), 3), "event": event, **more}
    with EVENTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"soak: {json.dumps(row)}", file=sys.stderr, flush=True)


class Faults:
    """The faults that are left."""

    def __init__(self) -> None:
        rows = [json.loads(line) for line in EVENTS.read_text().splitlines()] if EVENTS.exists() else []
        done = {row["fault"] for row in rows if row["event"] == "fault"}
        self._left = [fault for fault in json.loads((FOLDER / "plan.json").read_text()) if fault["fault"] not in done]
        self._nan = ""
        since_full = [row["event"] for row in rows if row["event"] in ("start", "full disk")]
        if BALLAST.exists() and since_full[-2:] == ["full disk", "start"]:
            BALLAST.unlink()
            note("disk freed")
        note("start")
        if self._left and self._left[0].get("starting"):
            self._inject(step=None)

    def watch(self) -> None:
        """Know the run's steps, and its micro-batches."""
        from pgrpo import grpo
        from pgrpo.training.build import Learner, Parts
        from pgrpo.training.checkpointing import Checkpoints
        from pgrpo.training.progress import Progress

        step, restore, backward = grpo.grpo_step, Checkpoints.restore, grpo.backward

        def watched_step(parts: Parts, progress: Progress) -> Any:
            if self._left and self._left[0]["step"] <= progress.step:
                self._inject(progress.step)
            return step(parts, progress)

        def watched_restore(checkpoints: Checkpoints, resume: Any) -> Any:
            result = restore(checkpoints, resume)
            note("restored", step=checkpoints._progress.step)
            return result

        def spoiled_backward(learner: Learner, batch: Any, counts: Any) -> Any:
            sums = backward(learner, batch, counts)
            kind, self._nan = self._nan, ""
            if kind == "nan_loss":
                sums = sums._replace(loss=sums.loss * float("nan"))
            elif kind == "nan_gradient":
                gradient = next(p.grad for p in learner.policy.parameters() if p.grad is not None)
                gradient.view(-1)[0] = float("nan")
            return sums

        replaced = (
            (grpo, "grpo_step", watched_step),
            (Checkpoints, "restore", watched_restore),
            (grpo, "backward", spoiled_backward),
        )
        for owner, name, function in replaced:
            setattr(owner, name, function)

    def _inject(self, step: int | None) -> None:
        fault = self._left.pop(0)
        kind = fault["kind"]
        note("fault", **{**fault, "step": step})
        if kind in ("sigkill", "sigterm"):
            threading.Thread(target=self._send, args=(kind, fault["delay"]), daemon=True).start()
        elif kind.startswith("reward"):
            REWARD.write_text(f"{kind} {fault['count']}")
        elif kind.startswith("nan"):
            self._nan = kind
        elif DISK.is_mount():
            with BALLAST.open("w") as file:
                while True:
                    state = os.statvfs(DISK)
                    try:
                        os.posix_fallocate(file.fileno(), 0, max(1, state.f_bavail * state.f_frsize - fault["leave"]))
                        break
                    except OSError:  # a checkpoint that is being written took some of it meanwhile
                        pass
            note("full disk")
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault["leave"], resource.RLIM_INFINITY))

    def _send(self, kind: str, delay: float) -> None:
        time.sleep(delay)
        if kind == "sigterm":
            note("sigterm sent")
        os.kill(os.getpid(), signal.SIGKILL if kind == "sigkill" else signal.SIGTERM)


def main() -> None:
    """The command line of pgrpo."""
    atexit.register(note, "exit")
    faults = Faults()
    faults.watch()
    from pgrpo.cli import main as pgrpo_main

    pgrpo_main()


if __name__ == "__main__":
    main()
