"""A deadline for calls that Python cannot interrupt: a device that hangs, a collective call that waits for a dead rank.
And a limit for work that it can interrupt.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def deadline(seconds: float, what: str, key: str) -> Iterator[None]:
    """End the process with code 1 unless the block ends in time. Prints the name of the call, the key to raise, and all stacks.

    The process cannot continue, as the call may never release its locks and device memory. The last checkpoint can be resumed.

    Args:
        seconds: limit for the block.
        what: name of the call, for the message.
        key: the config key that sets the time.
    """

    def give_up() -> None:
        try:
            print(
                f"{what} took longer than {key}={seconds:g} seconds and was ended; raise {key} if it was only slow. "
                "--resume auto continues from the last checkpoint, if there is one. Where it hung:",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback(file=2, all_threads=True)
        finally:  # even if stderr is closed
            os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class TimeUp(BaseException):
    """The time of a block is up. A ``BaseException``, so that no ``except Exception`` in the block takes it for an error."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise ``TimeUp`` in this thread unless the block ends in time, and each second from then on, should the block swallow it.

    In the main thread a signal (SIGALRM) interrupts even a call that waits. In others Python raises after the current call only.
    """
    thread, ended = threading.current_thread(), threading.Event()
    is_main = thread is threading.main_thread()

    def give_up(*_: object) -> None:
        if not ended.is_set():
            raise TimeUp

    def raise_there(kind: object) -> None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), kind)

    def watch() -> None:
        wait = seconds
        while not ended.wait(wait):
            if is_main:
                signal.pthread_kill(thread.ident or 0, signal.SIGALRM)
            else:
                raise_there(ctypes.py_object(TimeUp))
            wait = 1.0

    before = signal.signal(signal.SIGALRM, give_up) if is_main else None
    watcher = threading.Thread(target=watch, name="pgrpo-time-limit", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        if is_main:
            signal.signal(signal.SIGALRM, before)
        else:
            raise_there(None)  # one that came as the block ended
