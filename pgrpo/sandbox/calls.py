"""Tests that call a program's functions: the program in one sandbox, the tests in another, and plain data between them."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from pathlib import Path

from pgrpo.sandbox.run import Limits, Sandbox

INSIDE = (Path(__file__).parent / "inside.py").read_text()


def run_tests(
    sandbox: Sandbox, program: str, tests: Sequence[str], functions: Sequence[str], limits: Limits
) -> str | None:
    """Run ``tests`` (Python statements) one after the other, where ``functions`` are the program's.

    The process of the program holds neither tests nor verdict: it is told a function and arguments, and says what it
    returned or raised. ``limits.wall_s`` is for all tests together.

    Returns:
        A mark each, as ``inside.ask`` prints them; None if the tests did not come to an end.

    Raises:
        SandboxError: one of the two sandboxes failed.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        candidate = f"{INSIDE}\nanswer({theirs.fileno()}, {program!r})"
        judge = f"{INSIDE}\nask({ours.fileno()})"
        work = json.dumps({"tests": tests, "functions": functions})
        with (
            sandbox.start(candidate, "", limits, [theirs.fileno()]) as answering,
            sandbox.start(judge, work, limits, [ours.fileno()]) as asking,
        ):
            ours.close()  # so that either end sees it when the other one is gone
            theirs.close()
            answering.wait_ready()
            result = asking.result()
            answering.raise_if_killed()
    marks = result.stdout.rstrip("\n").rpartition("\n")[2]
    return marks if result.end == "exit" and result.status == 0 and len(marks) == len(tests) else None
