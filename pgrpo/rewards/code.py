"""Rewards for programs: run the completion's code against the row's tests, in a sandbox. Nothing runs without one."""

from __future__ import annotations

import json
import logging
import secrets
import textwrap
from functools import cache, lru_cache
from typing import Any, Literal

from pgrpo.rewards.pool import GradingThreads, graders
from pgrpo.sandbox.called import called
from pgrpo.sandbox.calls import run_tests
from pgrpo.sandbox.find import find_sandbox
from pgrpo.sandbox.run import Limits, Sandbox

log = logging.getLogger("pgrpo")
Isolation = Literal["process", "same_process"]
_LANGUAGES = ("", "python", "python3", "py")

# The program of ``isolation: same_process``: the completion's code first (not as __main__, so that its own demo does not
# run), then, read only now, each test in the same names.
_HARNESS = """
import io, json, sys
_code, _input, sys.stdin = {code!r}, sys.stdin, io.StringIO()
_names = {{"__name__": "solution"}}
exec(compile(_code, "solution.py", "exec"), _names)
_work = json.load(_input)
_passed = ""
for _test in _work["tests"]:
    try:
        exec(compile(_test, "test.py", "exec"), _names)
        _passed += "1"
    except Exception:
        _passed += "0"
sys.__stdout__.write("\\n" + _work["mark"] + _passed + "\\n")
"""


class Code:
    """1.0 when the last code block of the completion passes every test of the row, else 0.0.

    A row's tests are Python statements (a text, or a list of texts: ``assert add(1, 2) == 3``), or pairs of what the
    program reads and what it must print (``[{"input": ..., "output": ...}]``, or ``{"inputs": [...], "outputs": [...]}``),
    as values or as JSON text. Printed lines are compared without spaces at their ends.

    Statements run in another process than the program, whose functions they call. Arguments and results cross as plain data
    (numbers, texts, bytes, None, lists, tuples, dicts, sets; iterators of those); a subclass arrives as what it extends, what
    a call does to its arguments is not seen. Tests that need more, such as instances of the program's classes, are an error:
    ``isolation: same_process`` runs them in the program's process, where a model can learn to cheat every test.
    """

    __name__ = "code"

    def __init__(self) -> None:
        self._threads = GradingThreads()

    def __call__(
        self,
        completions: list[str],
        *,
        column: str = "tests",
        partial: bool = False,
        timeout_s: float = 10.0,
        memory_mb: int = 512,
        isolation: Isolation = "process",
        **columns: list[Any],
    ) -> list[float | Exception]:
        """Score the completions, several at a time.

        Args:
            column: where the tests are.
            partial: score the share of tests that pass.
            timeout_s: of one run (a pair, or all statements), in wall and in CPU seconds; a longer one fails.
            memory_mb: of one run.
            isolation: of statements: `process` runs them apart from the program; in `same_process` a program can cheat.
        """
        if column not in columns:
            raise ValueError(
                f"needs the column `{column}`; there is {', '.join(columns) or 'none'} (args.column names it)"
            )
        if isolation not in ("process", "same_process"):
            raise ValueError(f"isolation is process or same_process, not {isolation!r}")
        sandbox = find_sandbox()
        if isolation == "same_process":
            _warn(
                "code: args.isolation is same_process: tests run in the program's own process, so a model can cheat them"
            )
        limits = Limits(wall_s=timeout_s, cpu_s=max(1, round(timeout_s)), memory_mb=memory_mb)
        tests = [_tests(value, column) for value in columns[column]]

        def score(sample: tuple[str, list[Any]]) -> float | Exception:
            try:
                return _score(sandbox, limits, *sample, partial, isolation)
            except Exception as error:  # of the sandbox, not of the program
                return error

        return self._threads.map(score, zip(completions, tests, strict=True), graders())

    def close(self) -> None:
        """Begin no other program."""
        self._threads.close()


def extract_code(completion: str) -> str | None:
    """The last fenced block that is closed and says Python or nothing, without common indentation; None without one."""
    code, block, language = None, [], None
    for line in completion.splitlines():
        fence = line.strip()
        if not fence.startswith("```"):
            block.append(line)
        elif language is not None and fence == "```":
            code = textwrap.dedent("\n".join(block)) if language in _LANGUAGES else code
            language = None
        else:  # opens a block, also where the one before was never closed
            block, language = [], fence[3:].strip().lower()
    return code


def _tests(value: Any, column: str) -> list[Any]:
    """Statements (texts), or (input, output) pairs. ``ValueError``."""
    if isinstance(value, str):
        try:
            read = json.loads(value)
        except ValueError:
            read = None
        value = read if isinstance(read, list | dict) else [value]
    if isinstance(value, dict) and {"inputs", "outputs"} <= value.keys():
        if len(value["inputs"]) != len(value["outputs"]):
            raise ValueError(f"column `{column}` has {len(value['inputs'])} inputs and {len(value['outputs'])} outputs")
        value = [{"input": i, "output": o} for i, o in zip(value["inputs"], value["outputs"], strict=True)]
    if isinstance(value, list) and value and all(isinstance(test, str) and test.strip() for test in value):
        return value
    if (
        isinstance(value, list)
        and value
        and all(isinstance(t, dict) and {"input", "output"} <= t.keys() for t in value)
    ):
        return [(_text(test["input"]), _text(test["output"])) for test in value]
    raise ValueError(
        f"column `{column}` must hold statements, {{input, output}} pairs or {{inputs, outputs}}, not {value!r:.80}"
    )


def _text(value: Any) -> str:
    """Some data sets give the lines of an input as a list."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _score(
    sandbox: Sandbox, limits: Limits, completion: str, tests: list[Any], partial: bool, isolation: Isolation
) -> float:
    code = extract_code(completion)
    if code is None:
        return 0.0
    if isinstance(tests[0], str):
        passed = (_run_apart if isolation == "process" else _run_together)(sandbox, limits, code, tests)
    else:
        passed = 0
        for given, wanted in tests:
            result = sandbox.run(code, given, limits)
            right = result.end == "exit" and result.status == 0 and _lines(result.stdout) == _lines(wanted)
            if not right and not partial:
                return 0.0
            passed += right
    return passed / len(tests) if partial else float(passed == len(tests))


def _run_apart(sandbox: Sandbox, limits: Limits, code: str, tests: list[str]) -> int:
    marks = run_tests(sandbox, code, tests, _called(tuple(tests)), limits) or ""
    if "x" in marks:
        raise ValueError(_refusal("they pass an object of their own, such as a function"))
    if "o" in marks:
        _warn(
            "code: a program returned an object that is no plain data, so its test failed; if tests need such objects, "
            "set args.isolation: same_process (a model can cheat it)"
        )
    return marks.count("1")


@lru_cache(1024)
def _called(tests: tuple[str, ...]) -> list[str]:
    """Once a row, not once a completion."""
    try:
        return called(tests)
    except ValueError as error:
        raise ValueError(_refusal(str(error))) from error


def _refusal(reason: str) -> str:
    return (
        f"these tests cannot run apart from the program: {reason}. args.isolation: same_process runs them in the program's "
        "own process, where a model can cheat them"
    )


@cache
def _warn(text: str) -> None:
    """Once a process."""
    log.warning(text)


def _run_together(sandbox: Sandbox, limits: Limits, code: str, tests: list[str]) -> int:
    mark = secrets.token_hex(16)
    result = sandbox.run(_HARNESS.format(code=code), json.dumps({"tests": tests, "mark": mark}), limits)
    last = result.stdout.rstrip("\n").rpartition("\n")[2]
    passed = last.removeprefix(mark)
    if result.end != "exit" or result.status != 0 or last == passed or len(passed) != len(tests):
        return 0
    return passed.count("1")


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
