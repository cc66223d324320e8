"""Small programs with a mistake. The sandbox is the tool: it runs what the model wrote against the tests."""

from __future__ import annotations

from pgrpo.sandbox.calls import run_tests as run_in_sandbox
from pgrpo.sandbox.find import find_sandbox
from pgrpo.sandbox.run import Limits, SandboxError

LIMITS = Limits(wall_s=5.0, cpu_s=5)
# name: what it should do, a right program, mistakes (what is written, what instead), tests
PROGRAMS = {
    "last_index": (
        "Give the last position of x in items, or -1.",
        "def last_index(items, x):\n    for i in range(len(items) - 1, -1, -1):\n        if items[i] == x:\n            return i\n"
        "    return -1",
        [("len(items) - 1, -1, -1", "len(items) - 1, 0, -1"), ("return -1", "return None"), ("len(items) - 1", "len(items)")],
        [("[1, 2, 1], 1", 2), ("[3], 3", 0), ("[], 3", -1), ("[1, 2], 5", -1)],
    ),
    "clamp": (
        "Limit x to the range from low to high.",
        "def clamp(x, low, high):\n    if x < low:\n        return low\n    if x > high:\n        return high\n    return x",
        [("x < low", "x > low"), ("return high", "return low"), ("    return x", "    return low")],
        [("5, 1, 3", 3), ("-2, 1, 3", 1), ("2, 1, 3", 2), ("3, 1, 3", 3)],
    ),
    "count_vowels": (
        "Count the vowels of a text, capitals too.",
        "def count_vowels(text):\n    count = 0\n    for c in text.lower():\n        if c in 'aeiou':\n            count += 1\n"
        "    return count",
        [(".lower()", ""), ("'aeiou'", "'aeio'"), ("count += 1", "count = 1")],
        [("'Queue'", 4), ("'AbE'", 2), ("'xyz'", 0), ("''", 0)],
    ),
    "running_sum": (
        "Give the list of sums so far.",
        "def running_sum(items):\n    total, sums = 0, []\n    for x in items:\n        total += x\n        sums.append(total)\n"
        "    return sums",
        [("total += x", "total = x"), ("append(total)", "append(x)"), ("total, sums = 0", "total, sums = 1")],
        [("[1, 2, 3]", [1, 3, 6]), ("[]", []), ("[4]", [4]), ("[-1, 1]", [-1, 0])],
    ),
    "is_palindrome": (
        "Say whether a text reads the same backwards; spaces and capitals do not matter.",
        "def is_palindrome(text):\n    text = text.replace(' ', '').lower()\n    return text == text[::-1]",
        [(".lower()", ""), ("replace(' ', '')", "strip()"), ("==", "!=")],
        [("'Never odd or even'", True), ("'Anna'", True), ("'ab'", False), ("''", True)],
    ),
    "gcd": (
        "Give the greatest common divisor of two positive numbers.",
        "def gcd(a, b):\n    while b:\n        a, b = b, a % b\n    return a",
        [("a % b", "a // b"), ("return a", "return b"), ("while b", "while a > b")],
        [("12, 18", 6), ("7, 3", 1), ("5, 5", 5), ("100, 75", 25)],
    ),
    "flatten": (
        "Make one flat list of a list that holds lists of any depth.",
        "def flatten(items):\n    flat = []\n    for x in items:\n        if isinstance(x, list):\n            flat += flatten(x)\n"
        "        else:\n            flat.append(x)\n    return flat",
        [("flat += flatten(x)", "flat += x"), ("flat.append(x)", "flat = [x]"), ("flat += flatten(x)", "flat = flatten(x)")],
        [("[1, [2, [3]]]", [1, 2, 3]), ("[]", []), ("[1, 2, [3, 4]]", [1, 2, 3, 4]), ("[[[]]]", [])],
    ),
    "second_largest": (
        "Give the second largest of the different numbers in a list, or None.",
        "def second_largest(items):\n    ordered = sorted(set(items))\n    if len(ordered) < 2:\n        return None\n"
        "    return ordered[-2]",
        [("set(items)", "items"), ("ordered[-2]", "ordered[1]"), ("< 2", "< 1")],
        [("[3, 1, 3, 2]", 2), ("[5, 5]", None), ("[1, 2]", 1), ("[4, 9, 7, 9]", 7)],
    ),
    "roman": (
        "Write a number from 1 to 39 in Roman numerals.",
        "def roman(n):\n    text = ''\n    for value, letters in [(10, 'X'), (9, 'IX'), (5, 'V'), (4, 'IV'), (1, 'I')]:\n"
        "        while n >= value:\n            text += letters\n            n -= value\n    return text",
        [("n >= value", "n > value"), ("(9, 'IX'), ", ""), ("while n >= value", "if n >= value")],
        [("14", "XIV"), ("9", "IX"), ("3", "III"), ("28", "XXVIII")],
    ),
}  # fmt: skip
HELD_OUT = ("gcd", "second_largest", "is_palindrome")
SHOWN = 2
"""Tests that the tool runs; the reward runs all."""


class CodeRepair:
    """A program to mend. Its state is the last program that was run."""

    def __init__(self) -> None:
        self._sandbox = find_sandbox()

    def reset(self, name: str, program: str, tests: list[str], hidden: list[str], **row) -> None:
        """Begin with the program as it is."""
        self.name, self.tests, self.hidden, self.last = name, tests, hidden, program

    def run_tests(self, program: str) -> str:
        """Run a program against the tests.

        Args:
            program: The whole program in Python.
        """
        self.last = program
        marks = self._marks(program, self.tests)
        if marks is None:
            return "the program did not finish: it has a syntax error, runs too long or needs too much memory"
        said = [
            f"{'passed' if mark == '1' else 'failed'}: {test}" for mark, test in zip(marks, self.tests, strict=True)
        ]
        return "\n".join(said)

    def get_reward(self) -> float:
        """1 if the last program passes all tests; half of the share that it passes otherwise."""
        marks = self._marks(self.last, self.hidden) or ""
        return 1.0 if marks.count("1") == len(self.hidden) else 0.5 * marks.count("1") / len(self.hidden)

    def _marks(self, program: str, tests: list[str]) -> str | None:
        try:
            return run_in_sandbox(self._sandbox, program, tests, [self.name], LIMITS)
        except SandboxError as error:
            raise RuntimeError(f"the sandbox failed: {error}") from error


def rows(split: str) -> list[dict]:
    """Programs of one split, one row a mistake; no program is in both. Training repeats them, so that a step has enough rows.

    Args:
        split: `train` or `eval`.

    Returns:
        One dict a row: ``name``, ``task``, ``program`` (with the mistake), ``tests`` and ``hidden`` (lists of statements).
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split {split!r}: the splits are train and eval")
    found = []
    for name, (task, program, mistakes, cases) in PROGRAMS.items():
        if (name in HELD_OUT) == (split == "eval"):
            tests = [f"assert {name}({given}) == {wanted!r}" for given, wanted in cases]
            for right, wrong in mistakes:
                wrong_program = program.replace(right, wrong, 1)
                found.append(
                    {"name": name, "task": task, "program": wrong_program, "tests": tests[:SHOWN], "hidden": tests}
                )
    return found * (1 if split == "eval" else 8)
