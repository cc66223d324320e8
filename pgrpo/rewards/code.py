"""Rewards for programs: run the completion's code against the row's tests, always in a sandbox."""

from __future__ import annotations

import json
import logging
import secrets
import textwrap
from functools import cache, lru_cache
from typing import Any, Literal

from pgrpo.rewards.answers import final_parts
from pgrpo.rewards.pool import GradingThreads, graders
from pgrpo.sandbox.called import called
from pgrpo.sandbox.calls import run_tests
from pgrpo.sandbox.find import find_sandbox
from pgrpo.sandbox.run import Limits, Sandbox

log = logging.getLogger("pgrpo")
Isolation = Literal["process", "same_process"]
_LANGUAGES = ("", "python", "python3", "py")

# The program of ``isolation: same_process``. It runs the completion's code (not as __main__, so that its demo does not run), and
# only then reads the tests and runs each in the same namespace.
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
    """1.0 if the last code block of the completion, thoughts left out, passes every test of the row, else 0.0.

    The tests of a row are Python statements (a text or a list of texts: ``assert add(1, 2) == 3``), or pairs of standard input
    and expected output (``[{"input": ..., "output": ...}]``, or ``{"inputs": [...], "outputs": [...]}``), as values or as JSON
    text. Output is compared line by line without trailing spaces.

    Statements run in another process than the program and call its functions. Arguments and results are copied as plain data
    (numbers, texts, bytes, None, lists, tuples, dicts, sets, and iterators of those): a subclass becomes its base type, and
    in-place changes of arguments are lost. Tests that need more, such as instances of the program's classes, are an error:
    ``isolation: same_process`` runs them in the program's process, where a model can learn to cheat every test.
    """

    __name__ = "code"

    def __init__(self) -> None:
        self._threads = GradingThreads()

    def __call__(
        self,
        completions: list[str],
        prompts: list[str] | None = None,
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
            column: column of the tests.
            partial: score the share of passed tests.
            timeout_s: deadline of one run (one pair, or all statements), in wall and in CPU seconds. A longer run fails.
            memory_mb: memory limit of one run in MiB.
            isolation: `process` runs statements in another process than the program; in `same_process` a program can cheat.
        """
        if column not in columns:
            raise ValueError(f"no column `{column}` (args.column) among {', '.join(columns) or 'none'}")
        if isolation not in ("process", "same_process"):
            raise ValueError(f"isolation is process or same_process, not {isolation!r}")
        sandbox = find_sandbox()
        if isolation == "same_process":
            _warn(
                "code: args.isolation=same_process runs tests in the program's own process, so a model can cheat them"
            )
        limits = Limits(wall_s=timeout_s, cpu_s=max(1, round(timeout_s)), memory_mb=memory_mb)

        def score(sample: tuple[str | None, Any]) -> float | Exception:
            text, tests = sample
            try:
                return _score(sandbox, limits, text or "", _tests(tests, column), partial, isolation)
            except Exception as error:  # a fault of the sandbox or the tests, not of the program
                return error

        samples = zip(final_parts(completions, prompts), columns[column], strict=True)
        return self._threads.map(score, samples, graders())

    def close(self) -> None:
        """Start no further programs."""
        self._threads.close()


def extract_code(completion: str) -> str | None:
    """Return the last closed fenced block marked as Python or unmarked, dedented. None if there is none."""
    code, block, language = None, [], None
    for line in completion.splitlines():
        fence = line.strip()
        if not fence.startswith("```"):
            block.append(line)
        elif language is not None and fence == "```":
            code = textwrap.dedent("\n".join(block)) if language in _LANGUAGES else code
            language = None
        else:  # opens a block, even if the previous one was never closed
            block, language = [], fence[3:].strip().lower()
    return code


def _tests(value: Any, column: str) -> list[Any]:
    """Parse the tests of a row into statements (texts) or (input, output) pairs. ValueError if they are neither."""
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
    tests = value if isinstance(value, list) else []
    if tests and all(isinstance(test, str) and test.strip() for test in tests):
        return tests
    if tests and all(isinstance(test, dict) and {"input", "output"} <= test.keys() for test in tests):
        return [(_text(test["input"]), _text(test["output"])) for test in tests]
    raise ValueError(
        f"column `{column}` must hold statements, {{input, output}} pairs or {{inputs, outputs}}, not {value!r:.80}"
    )


def _text(value: Any) -> str:
    """Join a list of lines, which some data sets use, or convert to text."""
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
        raise _refusal("they pass an object of their own, such as a function")
    if "o" in marks:
        _warn(
            "code: a program returned an object that is not plain data, so its test failed; if tests need such objects, "
            "set args.isolation: same_process (where a model can cheat)"
        )
    return marks.count("1")


@lru_cache(1024)
def _called(tests: tuple[str, ...]) -> list[str]:
    """``called``, cached so that it runs once per row instead of once per completion."""
    try:
        return called(tests)
    except ValueError as error:
        raise _refusal(str(error)) from error


def _refusal(reason: str) -> ValueError:
    return ValueError(
        f"these tests cannot run apart from the program: {reason}. args.isolation: same_process runs them in the program's "
        "own process, where a model can cheat them"
    )


@cache
def _warn(text: str) -> None:
    """Log a warning once per process."""
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
