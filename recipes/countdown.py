"""Countdown: reach a target with four numbers, each used once, and + - * /. Generates problems and scores answers."""

from __future__ import annotations

import ast
import operator
import random
import re
from collections import Counter
from fractions import Fraction

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
SIZES = {"train": 10_000, "eval": 500}
LONGEST = 100  # characters of an expression; four numbers below 100 need far fewer
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def rows(split: str) -> list[dict]:
    """Solvable problems of one split, the same ones each time; no (numbers, target) is in both splits.

    Args:
        split: `train` or `eval`.

    Returns:
        One dict a problem: ``numbers`` (text, as the prompt shows it: `3, 7, 25, 50`) and ``target`` (int, 1 to 999).
    """
    if split not in SIZES:
        raise ValueError(f"split {split!r}: the splits are train and eval")
    generator = random.Random(0)
    problems: dict[tuple[str, int], None] = {}
    while len(problems) < sum(SIZES.values()):
        numbers = [generator.randint(1, 99) for _ in range(4)]
        target = _some_result(numbers, generator)
        if target.denominator == 1 and 1 <= target <= 999:
            problems[", ".join(map(str, sorted(numbers))), int(target)] = None
    cut = SIZES["eval"]
    chosen = list(problems)[:cut] if split == "eval" else list(problems)[cut:]
    return [{"numbers": numbers, "target": target} for numbers, target in chosen]


def _some_result(numbers: list[int], generator: random.Random) -> Fraction:
    """Combine the numbers, two at a time, in a random way; a division by zero becomes an addition."""
    values = [Fraction(number) for number in numbers]
    while len(values) > 1:
        generator.shuffle(values)
        a, b = values.pop(), values.pop()
        operation = generator.choice(list(OPERATORS.values()))
        values.append(a + b if operation is operator.truediv and b == 0 else operation(a, b))
    return values[0]


def evaluate(expression: str) -> tuple[Fraction, Counter[int]]:
    """Exact value of an arithmetic expression, and the numbers in it. Walks the syntax tree; nothing is executed.

    Raises:
        ValueError: anything but whole numbers, + - * / and brackets; division by zero; over ``LONGEST`` characters.
    """
    if len(expression) > LONGEST:
        raise ValueError("too long")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError("not an expression") from error
    numbers: Counter[int] = Counter()

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            numbers[node.value] += 1
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            left, right = value(node.left), value(node.right)
            if isinstance(node.op, ast.Div) and right == 0:
                raise ValueError("division by zero")
            return OPERATORS[type(node.op)](left, right)
        raise ValueError(f"not arithmetic: {type(node).__name__}")

    return value(tree.body), numbers


def reward(completions: list[str], numbers: list[str], target: list[int]) -> list[float]:
    """1 for a right answer, 0.1 for a wrong one in the requested form (`<answer>...</answer>`, parsable), else 0.

    Right: the last ``<answer>`` is an expression worth exactly ``target`` that uses each number once and no other.
    """
    return [_score(*sample) for sample in zip(completions, numbers, target, strict=True)]


def _score(completion: str, numbers: str, target: int) -> float:
    answers = ANSWER.findall(completion)
    if not answers:
        return 0.0
    try:
        value, used = evaluate(answers[-1])
    except ValueError:
        return 0.0
    return 1.0 if value == target and used == Counter(map(int, numbers.split(", "))) else 0.1
