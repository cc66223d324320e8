"""Rewards for mathematical answers, by math-verify.

math-verify guards against endless simplification with signals, which work on the main thread only. Here its own guards
are off: it runs in worker processes, and one that passes its deadline is killed.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from concurrent.futures import TimeoutError
from typing import Any

from pebble import ProcessExpired, ProcessPool

from pgrpo.rewards.answers import final_answer

log = logging.getLogger("pgrpo")


class Math:
    """1.0 when the completion's final answer equals the row's, as mathematics (``1/2`` is ``0.5``), else 0.0.

    A completion without an answer, or one that takes too long to compare, scores 0. An answer in the data set that is
    no mathematics raises ``ValueError``.
    """

    __name__ = "math"

    def __init__(self) -> None:
        self._pool: ProcessPool | None = None

    def __call__(
        self, completions: list[str], *, column: str = "answer", timeout_s: float = 10.0, **columns: list[Any]
    ) -> list[float]:
        """``column``: the answers, bare, in LaTeX, or after ``####``. ``timeout_s``: deadline of one completion."""
        golds = [final_answer(gold, column) for gold in columns[column]]
        # Samples of one group often give the same text: each pair is compared once.
        futures = {}
        for pair in zip(golds, completions, strict=True):
            if pair not in futures:
                futures[pair] = self._workers().schedule(_is_equal, args=pair, timeout=timeout_s)
        scores: dict[tuple[str, str], float] = {}
        late = 0
        for pair, future in futures.items():
            try:
                equal = future.result()
            except TimeoutError:
                scores[pair], late = 0.0, late + 1
                continue
            except ProcessExpired as error:
                raise RuntimeError(f"math: comparing with {pair[0]!r} killed its process: {error}") from error
            if equal is None:
                raise ValueError(f"the answer {pair[0]!r} in column `{column}` is not mathematics that can be parsed")
            scores[pair] = float(equal)
        if late:
            log.warning("math: %d completions took longer than %g s to compare and score 0", late, timeout_s)
        return [scores[pair] for pair in zip(golds, completions, strict=True)]

    def close(self) -> None:
        """End the worker processes."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def _workers(self) -> ProcessPool:
        if self._pool is None:
            cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            # Not fork: the parent runs torch threads, which a forked child would find dead and their locks held.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPool(max(1, min(4, cores)), initializer=_warm_up, context=context)
        return self._pool


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
