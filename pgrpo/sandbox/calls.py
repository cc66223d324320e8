"""Runs tests in one sandbox and the program that they call in another; only plain data passes between them."""

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
    """Run ``tests`` (Python statements) in order. They may call ``functions`` of the program.

    The program's process holds neither the tests nor the verdict: it receives a function name and arguments, and replies with the
    result or the exception. ``limits.wall_s`` applies to all tests together.

    Returns:
        One mark per test (see ``inside.ask``); None if the tests did not finish.

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
            ours.close()  # so that each end sees end-of-file when the other process dies
            theirs.close()
            answering.wait_ready()
            result = asking.result()
            answering.raise_if_killed()
    marks = result.stdout.rstrip("\n").rpartition("\n")[2]
    return marks if result.end == "exit" and result.status == 0 and len(marks) == len(tests) else None
