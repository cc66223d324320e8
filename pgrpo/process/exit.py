"""Exit of a process that took part in collective calls."""

from __future__ import annotations

import atexit
import ctypes
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn


def run_and_leave(main: Callable[[], object]) -> NoReturn:
    """Run ``main`` and exit the process with its exit code (0 if it returns).

    A gloo thread may hold a tensor for a while after a collective call, and needs the interpreter to release it. If the
    interpreter is finalizing by then, CPython before 3.14 ends the thread inside C++ and the process aborts with "terminate called
    without an active exception" and exit code -6, although its work is done (https://github.com/pytorch/pytorch/issues/190489).
    ``destroy_process_group`` does not end these threads while DTensor's caches refer to the group. So if there are gloo threads,
    this runs all exit handlers, of Python and of C (vLLM removes shared memory there), but does not finalize the interpreter. On
    GPUs it exits as usual: there gloo carries only a few numbers, which were released long before.
    """
    code: str | int | None = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    if not gloo_threads() or on_gpu():
        sys.exit(code)
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue] - as Python ends: idle executors, then all other threads
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # a pipe that nobody reads, a full disk
        code = code or 120  # as Python exits
    ctypes.PyDLL(None).exit(code or 0)  # C's exit, by this thread, which keeps the interpreter
    raise AssertionError("C's exit does not return")


def gloo_threads() -> int:
    """Number of gloo threads in this process; 0 on systems other than Linux."""
    count = 0
    for thread in Path("/proc/self/task").glob("*"):
        with suppress(OSError):  # the thread has ended
            count += (thread / "comm").read_text().startswith("pt_gloo")
    return count


def on_gpu() -> bool:
    """Whether this process has used a GPU."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()
