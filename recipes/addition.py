"""Two-digit addition: every pair from 10 to 99, split into `train` and `eval` by a hash of the problem."""

from __future__ import annotations

import zlib


def is_held_out(problem: str) -> bool:
    """Whether a problem belongs to the held-out split: one in sixteen does, the same ones on every machine."""
    return zlib.crc32(problem.encode()) % 16 == 0


def rows(split: str) -> list[dict]:
    """Problems of one split.

    Args:
        split: `train` or `eval`.

    Returns:
        One dict a problem: ``a`` and ``b`` (int), ``answer`` (str, their sum).
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split {split!r}: the splits are train and eval")
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    return [{"a": a, "b": b, "answer": str(a + b)} for a, b in pairs if is_held_out(f"{a}+{b}") == (split == "eval")]
