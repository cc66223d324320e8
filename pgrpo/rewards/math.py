"""Rewards for mathematical answers, by math-verify.

math-verify guards against endless simplification with signals, which work on the main thread only. Here its own guards
are off: it runs in worker processes, and one that passes its deadline is killed.
"""

from __future__ import annotations

import logging
from concurrent.futures import TimeoutError
from typing import Any

from pebble import ProcessExpired

from pgrpo.rewards.answers import final_answer
from pgrpo.rewards.pool import GradingPool

log = logging.getLogger("pgrpo")


class Math:
    """1.0 when the completion's final answer equals the row's, as mathematics (``1/2`` is ``0.5``), else 0.0.

    A completion without an answer, or one that takes too long to compare, scores 0. An answer in the data set that is
    no mathematics raises ``ValueError``.
    """

    __name__ = "math"

    def __init__(self) -> None:
        self._pool = GradingPool(_is_equal, _warm_up)

    def __call__(
        self, completions: list[str], *, column: str = "answer", timeout_s: float = 10.0, **columns: list[Any]
    ) -> list[float]:
        """``column``: the answers, bare, in LaTeX, or after ``####``. ``timeout_s``: deadline of one completion."""
        golds = [final_answer(gold, column) for gold in columns[column]]
        # Samples of one group often give the same text: each pair is compared once.
        pairs = list(zip(golds, completions, strict=True))
        results = self._pool.grade({pair: pair for pair in pairs}, timeout_s)
        late = 0
        for (gold, _), equal in results.items():
            late += isinstance(equal, TimeoutError)
            if isinstance(equal, ProcessExpired):
                raise RuntimeError(f"math: comparing with {gold!r} killed its process: {equal}") from equal
            if equal is None:
                raise ValueError(f"the answer {gold!r} in column `{column}` is not mathematics that can be parsed")
        if late:
            log.warning("math: %d completions took longer than %g s to compare and score 0", late, timeout_s)
        return [0.0 if isinstance(results[pair], TimeoutError) else float(results[pair]) for pair in pairs]

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()


def _warm_up() -> None:
    """Import before the first deadline starts to run. math-verify's warning that it has no timeout is expected here."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    _is_equal("1", "$1$")


def _is_equal(gold: str, completion: str) -> bool | None:
    """None when ``gold`` cannot be parsed."""
    from math_verify import parse, verify

    # A bare answer is LaTeX: math-verify looks for it between dollars.
    source = gold if "$" in gold or r"\boxed" in gold else f"${gold}$"
    wanted = parse(source, fallback_mode="no_fallback", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    if not wanted:
        return None
    given = parse(completion, parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    return verify(wanted, given, timeout_seconds=None)
