"""Two-digit addition: every pair from 10 to 99, split into `train` and `eval` by a hash of the problem."""

from __future__ import annotations

import zlib


def rows(split: str) -> list[dict]:
    """Problems of one split, the same ones on every machine, in an order that mixes small and large numbers.

    Args:
        split: `train`, or `eval`: one problem in sixteen.

    Returns:
        One dict a problem: ``a`` and ``b`` (int), ``answer`` (str, their sum).
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split {split!r}: the splits are train and eval")
    hashes = {(a, b): zlib.crc32(f"{a}+{b}".encode()) for a in range(10, 100) for b in range(10, 100)}
    chosen = [pair for pair in sorted(hashes, key=hashes.__getitem__) if (hashes[pair] % 16 == 0) == (split == "eval")]
    return [{"a": a, "b": b, "answer": str(a + b)} for a, b in chosen]
