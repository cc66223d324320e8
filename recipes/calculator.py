"""Products of two numbers, which a small model cannot do in its head: it has to call the calculator and copy what that says."""

from __future__ import annotations

import random

SIZES = {"train": 4_000, "eval": 400}


def multiply(a: int, b: int) -> int:
    """Multiply two whole numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a * b


def rows(split: str) -> list[dict]:
    """Problems of one split, the same ones each time; no pair is in both splits.

    Args:
        split: `train` or `eval`.

    Returns:
        One dict a problem: ``a`` and ``b`` (int, 10 to 99), ``answer`` (str, their product).
    """
    if split not in SIZES:
        raise ValueError(f"split {split!r}: the splits are train and eval")
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(0).shuffle(pairs)
    start = SIZES["eval"] if split == "train" else 0
    return [{"a": a, "b": b, "answer": str(a * b)} for a, b in pairs[start : start + SIZES[split]]]
