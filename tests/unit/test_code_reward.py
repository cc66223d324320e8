"""The reward `code`: what counts as the program, what counts as a test, and that no program passes tests without solving them."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from cheats import ADD, CHEATS, SOLUTIONS
from making import episode, group

from pgrpo.config import ConfigError, RewardConfig
from pgrpo.rewards import RewardRunner
from pgrpo.rewards import code as module
from pgrpo.rewards.code import Code, extract_code
from pgrpo.sandbox.find import find_sandbox
from pgrpo.sandbox.run import Sandbox, SandboxError
from pgrpo.types import Prompt

pytestmark = pytest.mark.timeout(120)
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


STATEMENTS = [
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
    ("import sys; print(sys.stdin.read())\ndef add(a, b): return 0", 1 / 3),  # sees no tests
    ("import os\nos.fork()\ndef add(a, b): return a + b", 0.0),
    ("print('no newline', end='')\ndef add(a, b): return a + b", 1.0),
    ("def add(a, b): return [a + b][0] if a > 0 else 1 / 0", 2 / 3),
]


@pytest.mark.parametrize("isolation", ["process", "same_process"])
def test_statements_score_the_share_that_passes(isolation: module.Isolation):
    """One batch, so that cores are shared out; the order is kept and one that does not end stops no other."""
    blocks, n = [block(code) for code, _ in STATEMENTS], len(STATEMENTS)
    shares = Code()(blocks, tests=[ADD] * n, partial=True, isolation=isolation, timeout_s=2.0)
    assert shares == pytest.approx([share for _, share in STATEMENTS], abs=1e-12)


def test_all_statements_must_pass_without_partial():
    assert [score(block(code), ADD) for code, share in STATEMENTS[:4]] == [1, 1, 0, 0]


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
def test_pairs_of_input_and_output_score_the_share_that_passes(code: str, share: float):
    assert score(block(code), PAIRS, partial=True) == share
    assert score(block(code), PAIRS) == float(share == 1)


def test_unicode_goes_in_and_out():
    assert score(block("print(input()[::-1] + 'é')"), [{"input": "ä→", "output": "→äé"}]) == 1
    assert score(block("print('\ud800')"), [{"input": "", "output": "x"}]) == 0


def test_a_batch_keeps_its_order_and_a_slow_one_does_not_stop_it():
    codes = ["def add(a, b): return a + b", "import time; time.sleep(60)", "def add(a, b): return 0"] * 2
    assert Code()([block(c) for c in codes], column="t", timeout_s=0.8, t=[ADD] * 6) == [1, 0, 0] * 2


@pytest.fixture(scope="module")
def cheated() -> dict[str, Any]:
    """What each cheat scored, all in one batch."""
    programs, tests = zip(*CHEATS.values(), strict=True)
    return dict(zip(CHEATS, Code()([block(p) for p in programs], tests=list(tests)), strict=True))


@pytest.mark.faults
@pytest.mark.parametrize("name", CHEATS)
def test_a_program_that_solves_nothing_passes_no_test(name: str, cheated: dict[str, Any]):
    assert cheated[name] == 0.0


def test_the_tests_of_the_cheats_can_be_passed():
    assert Code()([block(p) for p in SOLUTIONS.values()], tests=[tests for _, tests in CHEATS.values()]) == [1.0] * len(
        CHEATS
    )


@pytest.mark.parametrize(
    ("code", "tests"),
    [
        (
            "def same(x): return x",
            [
                "for x in (None, True, 2**80, -(10**5000), 0.1, float('inf'), 1 - 2j, 'ä\\ud800', b'\\0'):\n"
                "    y = same(x)\n    assert y == x and type(y) is type(x)"
            ],
        ),
        (
            "def same(x): return x",
            ["x = {(1, 'a'): [{2}, frozenset({3}), ()]}\nassert same(x) == x", "assert str(same(-0.0)) == '-0.0'"],
        ),
        (
            "from collections import Counter\ndef f(x): return Counter(x)",
            ["assert f('aab') == {'a': 2, 'b': 1}", "assert type(f('')) is dict"],
        ),
        (
            "from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(): return P(1, 2)",
            ["assert f() == (1, 2)"],
        ),
        ("def f(n):\n    yield from range(n)", ["assert list(f(3)) == [0, 1, 2] and f(3) != [0, 1, 2]"]),
        ("def f(x, *, y=0):\n    x.append(y)\n    return x", ["a = [1]\nassert f(a, y=2) == [1, 2]\nassert a == [1]"]),
        (
            "class E(ValueError): pass\ndef f(x):\n    raise E('no')",
            ["try: f(1)\nexcept ValueError as e: assert str(e) == 'no'\nelse: assert False"],
        ),
        ("def f(x): return bytes([200]).decode()", ["try: f(1)\nexcept UnicodeDecodeError: pass\nelse: assert False"]),
        ("def sum(a, b): return a * b", ["assert sum(3, 4) == 12"]),
        (
            "def Split(x): return [i for i in x if i % 2 == 0]",
            ["assert Split([1, 2, 4]) == [2, 4]", "assert Split([]) == []"],
        ),
        (
            "def double(x): return 2 * x",
            ["def check(f):\n    assert f(2) == 4\ncheck(double)", "assert list(map(double, [1])) == [2]"],
        ),
        ("def f(x): return 'Ab'", ["import math as m\nfrom math import pi\nassert f(m.pi).lower() == 'ab' and pi > 3"]),
        ("def enc(x): return x[::-1]\ndef dec(x): return x[::-1]", ["assert dec(enc('abc')) == 'abc'"]),
        (
            "import sys\nsys.setrecursionlimit(5000)\ndef f(n): return 0 if n == 0 else 1 + f(n - 1)",
            ["assert f(3000) == 3000"],
        ),
    ],
)
def test_plain_data_crosses_as_it_is(code: str, tests: list[str]):
    assert score(block(code), tests) == 1


STACK = "class Stack(list):\n    def push(self, x): self.append(x)\nLIMIT = 4\ndef make(): return Stack()\ndef sort(x): x.sort()"


@pytest.mark.parametrize(
    ("test", "reason"),
    [
        ("s = Stack()\ns.push(1)\nassert s.pop() == 1", "they keep an instance of `Stack`"),
        ("assert Stack().pop is not None", "they use `.pop` of the result of `Stack`"),
        ("assert make().push(1) is None", "they use `.push` of the result of `make`"),
        ("s = make()\ns.push(1)\nassert s == [1]", "they use `.push` of a result of the program"),
        ("assert show([Stack()]) == ''", "they pass an instance of `Stack`"),
        ("assert isinstance(make(), Stack)", "they use the program's `Stack` without calling it"),
        ("assert LIMIT == 4", "they use the program's `LIMIT` without calling it"),
        ("assert Stack.push", "they use the program's `Stack` without calling it"),
        ("assert make()() is None", "they call, enter or await the result of `make`"),
        (
            "x = [2, 1]\nsort(x)\nassert x == [1, 2]",
            "they inspect arguments that `sort` changes in place, but it gets copies",
        ),
        ("assert apply(lambda x: x, 1) == 1", "they pass an object of their own, such as a function"),
        ("assert True", "the tests call no function of the program"),
        ("assert add(1, 2) = 3", "the tests are not Python: "),
    ],
)
def test_tests_that_need_objects_of_the_program_are_refused_by_reason(test: str, reason: str):
    """Whatever the program is: it has no say in whether its sample is left out."""
    for code in (STACK + "\ndef apply(f, x): return f(x)", "def show(x): return object()"):
        result = score(block(code), [test])
        if "apply" in test and "show" in code:  # found when it is passed, which needs a program that can be asked
            continue
        assert isinstance(result, ValueError)
        assert reason in str(result)
        assert "args.isolation: same_process runs them in the program's own process, where a model can" in str(result)


def test_they_run_in_the_same_process_if_the_recipe_says_so(caplog: pytest.LogCaptureFixture):
    module._warn.cache_clear()
    with caplog.at_level(logging.WARNING, "pgrpo"):
        test = ["s = Stack()\ns.push(LIMIT)\nassert s.pop() == 4"]
        assert score(block(STACK), test, isolation="same_process") == 1
    assert "args.isolation=same_process runs tests in the program's own process, so a model can" in caplog.text
    program, tests = CHEATS["exec is patched"]
    assert score(block(program), tests, isolation="same_process") == 1  # as it says
    with pytest.raises(ValueError, match="isolation is process or same_process, not 'none'"):
        score(block(STACK), test, isolation="none")


def test_an_object_where_data_is_wanted_fails_its_test_and_is_said(caplog: pytest.LogCaptureFixture):
    module._warn.cache_clear()
    with caplog.at_level(logging.WARNING, "pgrpo"):
        code = "def add(a, b): return a + b if a != 2 else object()"
        assert score(block(code), ADD, partial=True) == pytest.approx(2 / 3, abs=1e-12)
    assert "a program returned an object that is not plain data, so its test failed" in caplog.text


def test_the_column_is_named_where_it_is_missing():
    runner = RewardRunner([RewardConfig("code")], on_error="mask")
    with runner, pytest.raises(ConfigError, match=r"reward `code` needs the column `tests`; the data has test_list"):
        runner.check(Prompt(0, "p", [1], {"test_list": ADD}))
    with pytest.raises(ValueError, match=r"no column `tests` \(args\.column\) among test_list"):
        Code()([""], test_list=[ADD])


@pytest.mark.parametrize("tests", [[], "", None, [1], [{"input": "x"}], {"inputs": ["1"], "outputs": []}, [""], 5])
def test_tests_that_are_none(tests: Any):
    error = score(block("x = 1"), tests)
    assert isinstance(error, ValueError) and re.match(r"column `tests` (must hold|has 1 inputs)", str(error))


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


def test_a_sandbox_that_fails_is_no_zero(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A right program whose launcher fails after the self-test, or is killed: masked, or the run stops; for both kinds of test."""
    name = find_sandbox().name
    (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / name).chmod(0o755)
    right = [(block("def add(a, b): return a + b"), ADD), (block("print(sum(map(int, input().split())))"), PAIRS)]
    with RewardRunner([RewardConfig("code")], on_error="mask") as runner:
        monkeypatch.setenv("PATH", str(tmp_path))
        for text, tests in right:
            assert isinstance(score(text, tests), SandboxError)
            scored = group(Prompt(0, "p", [1], {"tests": tests}), episode([1], text=text))
            assert runner.score([scored]).errors == 1
            assert scored.rewards == [None]
    start = Sandbox.start

    def dies(self: Sandbox, program: str, *args: Any) -> Any:
        running = start(self, program, *args)
        if "answer(" in program.splitlines()[-1]:
            running.wait_ready()
            running._process.kill()
            running._process.wait()
        return running

    monkeypatch.undo()
    monkeypatch.setattr(Sandbox, "start", dies)
    assert isinstance(score(*right[0]), SandboxError)
