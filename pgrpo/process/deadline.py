"""A deadline for calls that cannot be interrupted from Python: a device that hangs, a collective that waits for a dead rank."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def deadline(seconds: float, what: str, key: str) -> Iterator[None]:
    """End the process with code 1 unless the block ends in time; says what hung, which key to raise, and where every thread is.

    The process cannot go on: the call may hold locks and device memory for ever. The run's last checkpoint resumes.

    Args:
        seconds: time for the block.
        what: the call, for the message.
        key: the config key that sets the time.
    """

    def give_up() -> None:
        try:
            print(
                f"{what} took longer than {key}={seconds:g} seconds and was ended; raise {key} if it was only slow. "
                "--resume auto goes on from the last checkpoint, if there is one. Where it hung:",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback(file=2, all_threads=True)
        finally:  # whatever became of stderr
            os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
