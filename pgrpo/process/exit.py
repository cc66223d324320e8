"""How a process ends that has taken part in collective calls."""

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
    """Call ``main`` as the whole of this process, and exit with what it exits with (0 when it returns).

    A thread of gloo may hold a tensor of a collective call for a while after the call, and needs the interpreter to let go of
    it. If that is being taken down by then, CPython before 3.14 ends the thread inside C++, and the process aborts: "terminate
    called without an active exception", -6 as the exit code of work that is done (https://github.com/pytorch/pytorch/issues/190489).
    ``destroy_process_group`` ends the threads only where nothing refers to the group any more; caches of DTensor do. So where
    there are such threads, all that was registered for the exit is done, in Python and in C (vLLM removes shared memory there),
    but the interpreter is not taken down: the thread waits for it until the process has ended. Not on a GPU, where gloo carries
    a few numbers that were let go of long before, and what libraries do at the exit is best done in its usual order.
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
    """How many threads of this process run gloo's collective calls. Linux tells; elsewhere 0."""
    count = 0
    for thread in Path("/proc/self/task").glob("*"):
        with suppress(OSError):  # it has ended since
            count += (thread / "comm").read_text().startswith("pt_gloo")
    return count


def on_gpu() -> bool:
    """Whether this process has used one."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()
