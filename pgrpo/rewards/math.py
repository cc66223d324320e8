"""Rewards for mathematical answers, by math-verify.

math-verify limits the time of a simplification with signals, which work in the main thread only. Its limits are off here:
it runs in worker processes, which are killed at the deadline.
"""

from __future__ import annotations

import logging
from concurrent.futures import TimeoutError
from typing import Any

from pebble import ProcessExpired

from pgrpo.rewards.answers import final_answer
from pgrpo.rewards.pool import Workers, graders

log = logging.getLogger("pgrpo")


class Math:
    """1.0 if the completion's final answer is mathematically equal to the row's (``1/2`` equals ``0.5``), else 0.0.

    A completion without an answer, or whose comparison exceeds the deadline, scores 0. An answer in the data set that cannot be
    parsed as mathematics raises ValueError.
    """

    __name__ = "math"

    def __init__(self) -> None:
        self._pool = Workers(graders(), _warm_up)

    def __call__(
        self, completions: list[str], *, column: str = "answer", timeout_s: float = 10.0, **columns: list[Any]
    ) -> list[float]:
        """``column``: column of the answers: plain, LaTeX, or after ``####``. ``timeout_s``: deadline per completion in seconds."""
        golds = [final_answer(gold, column) for gold in columns[column]]
        # Completions of a group are often equal: compare each distinct pair once.
        pairs = list(zip(golds, completions, strict=True))
        results = self._pool.grade(_is_equal, {pair: pair for pair in pairs}, timeout_s)
        late = 0
        for (gold, _), equal in results.items():
            late += isinstance(equal, TimeoutError)
            if isinstance(equal, ProcessExpired):
                raise RuntimeError(f"math: the comparison with {gold!r} crashed its process: {equal}") from equal
            if equal is None:
                raise ValueError(f"the answer {gold!r} in column `{column}` cannot be parsed as mathematics")
        if late:
            log.warning("math: %d completions took longer than %g s to compare and score 0", late, timeout_s)
        return [0.0 if isinstance(results[pair], TimeoutError) else float(results[pair]) for pair in pairs]

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()


def _warm_up() -> None:
    """Import before the first deadline starts. Silence math-verify's warning about disabled timeouts."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    _is_equal("1", "$1$")


def _is_equal(gold: str, completion: str) -> bool | None:
    """Compare the answers. None if ``gold`` cannot be parsed."""
    from math_verify import parse, verify

    # A plain answer is LaTeX; math-verify expects LaTeX between dollars.
    source = gold if "$" in gold or r"\boxed" in gold else f"${gold}$"
    wanted = parse(source, fallback_mode="no_fallback", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    if not wanted:
        return None
    given = parse(completion, parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    return verify(wanted, given, timeout_seconds=None)
