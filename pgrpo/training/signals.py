"""Ctrl-C and SIGTERM: the first one stops the run with a save, the second one ends the process at once, and all that it started."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from pathlib import Path

from pgrpo.stopping import StopFlag


@contextmanager
def stop_signals(flag: StopFlag) -> Iterator[None]:
    """Set ``flag`` at SIGINT and SIGTERM instead of dying of them. At a second one: kill all children and exit."""

    def note(signum: int, _: object) -> None:
        if flag.signum:
            try:
                kill_children()
            finally:  # whatever went wrong in there: at once means at once
                os._exit(128 + signum)
        # Not by logging: the signal may have come in the middle of a write to the same file.
        os.write(
            2, f"pgrpo: {signal.Signals(signum).name}: stopping, with a save; once more to stop at once\n".encode()
        )
        flag.set(signum)

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def kill_children() -> None:
    """SIGKILL every process that descends from this one: reward workers, what they started, an engine."""
    children = {child.pid for child in active_children() if child.pid} | set(_descendants(os.getpid()))
    for pid in children:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _descendants(pid: int) -> list[int]:
    """Linux only: elsewhere those that multiprocessing knows must do."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):  # gone meanwhile: the file is not there, or is empty
            # After the name, which may hold spaces and brackets: state, parent.
            parents.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
    found = [pid]
    for parent in found:
        found += parents.get(parent, [])
    return found[1:]
