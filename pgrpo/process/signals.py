"""Ctrl-C and SIGTERM: the first one stops the run with a save, the second one ends the process at once, and all that it started."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from pathlib import Path

from pgrpo.process.stopping import StopFlag

_STOPS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_signals(flag: StopFlag) -> Iterator[None]:
    """Set ``flag`` at SIGINT and SIGTERM instead of dying of them. At a second one: kill all children and exit.

    Python runs a handler in the main thread alone, once that has come back from the call it is in; and a signal that
    another thread took does not end such a call. So a thread of its own reads the signals too: it needs nobody for the
    second one, and at the first one it interrupts the main thread's call until the handler has run.

    In a thread that is not the main one nothing is done: Python lets only the main one set handlers, so signals are the caller's.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = {s: signal.signal(s, lambda signum, _: flag.set(signum)) for s in _STOPS}
    before[signal.SIGURG] = signal.signal(signal.SIGURG, lambda *_: None)  # interrupts a call, and means nothing
    fd_before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(read, flag), name="pgrpo-signals", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(fd_before)
        for signum, handler in before.items():
            signal.signal(signum, handler)
        os.close(write)
        watcher.join()
        os.close(read)


def _watch(read: int, flag: StopFlag) -> None:
    """Read the numbers of signals from ``read`` until its other end is closed."""
    seen = 0
    while True:
        unanswered = seen and not flag.signum
        if not select.select([read], [], [], 0.1 if unanswered else None)[0]:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGURG)
            continue
        byte = os.read(read, 1)
        if not byte:
            return
        if byte[0] not in _STOPS:
            continue
        seen += 1
        if seen > 1:
            try:
                kill_children()
            finally:  # whatever went wrong in there: at once means at once
                os._exit(128 + byte[0])
        name = signal.Signals(byte[0]).name
        # Not by logging: the main thread may be in the middle of a write to the same file.
        os.write(2, f"pgrpo: {name}: stopping, with a save; once more to stop at once\n".encode())


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
