"""A deadline for calls that Python cannot interrupt: a device that hangs, a collective call that waits for a dead rank."""

from __future__ import annotations

import faulthandler
import os
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
