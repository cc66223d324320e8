"""The reward `code`: what counts as the program, what counts as a test, and that cheating by leaving early scores 0."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pgrpo.config import ConfigError, RewardConfig
from pgrpo.rewards import RewardRunner
from pgrpo.rewards import code as module
from pgrpo.rewards.code import Code, extract_code
from pgrpo.sandbox.run import SandboxError, find_sandbox

pytestmark = pytest.mark.timeout(120)
ADD = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0", "assert add(2, 2) == 4"]
PAIRS = [{"input": "1 2\n", "output": "3\n"}, {"input": "5 6\n", "output": "11"}]


def block(code: str, language: str = "python") -> str:
    return f"So:\n```{language}\n{code}\n```\nDone."


def score(code: str, tests: Any, **args: Any) -> Any:
    return Code()([code], tests=[tests], **args)[0]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\nx\n```", "x"),
        ("```\nx\n```", "x"),
        ("``` PY\nx\n```", "x"),
        ("```python\r\nx\r\ny\r\n```", "x\ny"),
        ("```python\nfirst\n```\n```python\nlast\n```", "last"),
        ("```text\nno\n```\nso\n```python\nyes\n```", "yes"),
        ("```python\nyes\n```\nprints\n```text\n3\n```", "yes"),
        ("```python\nnever closed\n\n```python\nyes\n```", "yes"),
        ("- so\n  ```python\n  if x:\n      y\n  ```", "if x:\n    y"),
        ("```python\n```", ""),
        ("```python\nnot closed", None),
        ("```js\nx\n```", None),
        ("print(1)", None),
        ("`x`", None),
        ("", None),
        ("```", None),
        ("```python\nprint('ä→日本')\n```", "print('ä→日本')"),
    ],
)
def test_the_program_is_the_last_closed_block(text: str, code: str | None):
    assert extract_code(text) == code


@pytest.mark.parametrize(
    ("code", "share"),
    [
        ("def add(a, b): return a + b", 1.0),
        ("def add(a, b): return abs(a + b)\nif __name__ == '__main__': input()", 1.0),
        ("def add(a, b): return a * b + 1", 2 / 3),
        ("def add(a, b): return 3", 1 / 3),
        ("def add(a, b):", 0.0),
        ("x = 1", 0.0),
        ("def add(a, b):\n    while True: pass", 0.0),
        ("import sys; sys.exit(0)", 0.0),
        ("import os; os._exit(0)", 0.0),
        ("def add(a, b): raise SystemExit", 0.0),
        ("print('1' * 40); quit()", 0.0),
        ("import sys; print(sys.stdin.read())\ndef add(a, b): return 0", 1 / 3),  # sees no tests and no mark
        ("import os\nos.fork()\ndef add(a, b): return a + b", 0.0),
        ("print('no newline', end='')\ndef add(a, b): return a + b", 1.0),
    ],
)
def test_statements(code: str, share: float):
    args = {"timeout_s": 3.0}
    assert score(block(code), ADD, partial=True, **args) == pytest.approx(share, abs=1e-12)
    assert score(block(code), ADD, **args) == float(share == 1)


def test_tests_may_be_one_text_or_json():
    good = block("def add(a, b): return a + b")
    for tests in ("\n".join(ADD), json.dumps(ADD), ADD[:1]):
        assert score(good, tests) == 1
    for tests in (PAIRS, json.dumps(PAIRS), {"inputs": ["1 2", ["5 6"]], "outputs": ["3", ["11"]]}):
        assert score(block("print(sum(map(int, input().split())))"), tests) == 1


@pytest.mark.parametrize(
    ("code", "share"),
    [
        ("print(sum(map(int, input().split())))", 1.0),
        ("a, b = map(int, input().split())\nprint(a + b, ' \\n\\n')", 1.0),
        ("if __name__ == '__main__': print(sum(map(int, input().split())))", 1.0),
        ("print(3)", 0.5),
        ("print(11)", 0.5),
        ("print(input())", 0.0),
        ("print(sum(map(int, input().split())))\nexit(1)", 0.0),
        ("", 0.0),
    ],
)
def test_pairs(code: str, share: float):
    assert score(block(code), PAIRS, partial=True) == share
    assert score(block(code), PAIRS) == float(share == 1)


def test_unicode_goes_in_and_out():
    assert score(block("print(input()[::-1] + 'é')"), [{"input": "ä→", "output": "→äé"}]) == 1
    assert score(block("print('\ud800')"), [{"input": "", "output": "x"}]) == 0


def test_a_batch_keeps_its_order_and_a_slow_one_does_not_stop_it():
    codes = ["def add(a, b): return a + b", "while True: pass", "def add(a, b): return 0"] * 3
    assert Code()([block(c) for c in codes], column="t", timeout_s=1.0, t=[ADD] * 9) == [1, 0, 0] * 3


@pytest.mark.parametrize("tests", [[], "", None, [1], [{"input": "x"}], {"inputs": ["1"], "outputs": []}, [""], 5])
def test_tests_that_are_none(tests: Any):
    with pytest.raises(ValueError, match=r"column `tests` (must hold|has 1 inputs)"):
        score(block("x = 1"), tests)


@pytest.mark.faults
def test_without_a_sandbox_the_run_stops_at_its_start(monkeypatch: pytest.MonkeyPatch):
    def none() -> None:
        raise SandboxError("there is no sandbox on this machine (...)")

    monkeypatch.setattr(module, "find_sandbox", none)
    with pytest.raises(ConfigError, match=r"functions\[0\]\.args of code: there is no sandbox on this machine"):
        RewardRunner([RewardConfig("code")], on_error="mask")


@pytest.mark.faults
def test_code_runs_only_where_the_recipe_asks(monkeypatch: pytest.MonkeyPatch):
    def used() -> None:
        raise AssertionError("a sandbox was looked for")

    monkeypatch.setattr(module, "find_sandbox", used)
    RewardRunner([RewardConfig("math"), RewardConfig("exact_match")], on_error="raise").close()


def test_a_sandbox_that_fails_is_no_zero(monkeypatch: pytest.MonkeyPatch):
    find_sandbox()
    monkeypatch.setattr("pgrpo.sandbox.run.Sandbox.run", lambda *_: (_ for _ in ()).throw(SandboxError("broken")))
    result = score(block("x = 1"), ADD)
    assert isinstance(result, SandboxError)
