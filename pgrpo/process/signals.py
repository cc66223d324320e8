"""Ctrl-C and SIGTERM: the first signal stops the run with a save, the second kills this process and all its descendants at once."""

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
    """The first SIGINT or SIGTERM inside this block sets ``flag``. The second kills all children and exits.

    Python runs signal handlers only in the main thread, after its current call returns, and a signal that another thread receives
    does not interrupt that call. So a watcher thread reads the signals too: at the first it interrupts the main thread until the
    handler has run, and at the second it exits by itself.

    In another thread than the main one this does nothing, as Python allows handlers there only: signals are up to the caller.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = {s: signal.signal(s, lambda signum, _: flag.set(signum)) for s in _STOPS}
    before[signal.SIGURG] = signal.signal(signal.SIGURG, lambda *_: None)  # only interrupts calls
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
    """Read signal numbers from the pipe ``read`` until its other end is closed."""
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
            finally:  # exit even if that fails
                if os.isatty(2):
                    tell("\x1b[?25h")  # a progress bar hides the cursor
                os._exit(128 + byte[0])
        tell(f"pgrpo: {signal.Signals(byte[0]).name}: stopping, with a save; once more to stop at once\n")


def tell(text: str) -> None:
    """Write to stderr, not by logging, whose lock another thread may hold. Nobody may read it: the terminal is closed."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


def kill_children() -> None:
    """SIGKILL all descendants of this process: reward workers, their children, an engine."""
    children = {child.pid for child in active_children() if child.pid} | set(_descendants(os.getpid()))
    for pid in children:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _descendants(pid: int) -> list[int]:
    """All descendants on Linux; elsewhere none, and only children of multiprocessing are killed."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):  # the process has ended: no file, or an empty one
            # Fields after the name, which may contain spaces and brackets: state, parent.
            parents.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
    found = [pid]
    for parent in found:
        found += parents.get(parent, [])
    return found[1:]
