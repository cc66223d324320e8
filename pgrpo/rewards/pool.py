"""Parallel grading: worker processes with a deadline per call, and threads for calls that wait for something else."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from typing import Any

from pebble import ProcessExpired, ProcessFuture, ProcessPool


class Workers:
    """``count`` worker processes with a deadline per call. They start at the first call and are kept. Thread-safe.

    ``warm_up`` runs once in each worker before its first deadline starts, for imports.
    """

    def __init__(self, count: int, warm_up: Callable[[], None] | None = None) -> None:
        # Not fork: in a forked child the torch threads of the parent are dead, and their locks may be held.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPool(count, initializer=warm_up, context=context)
        self._waiting: set[ProcessFuture] = set()

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...], timeout_s: float) -> ProcessFuture:
        """Submit a call. The result raises ``TimeoutError`` at the deadline, ``ProcessExpired`` if the process died."""
        future = self._pool.schedule(function, args=arguments, timeout=timeout_s)
        self._waiting.add(future)
        future.add_done_callback(self._waiting.discard)
        return future

    def grade(
        self, function: Callable[..., Any], calls: Mapping[Any, tuple[Any, ...]], timeout_s: float
    ) -> dict[Any, Any]:
        """Call an importable function for each of ``calls`` (key -> arguments) and return the results by key. A call that
        failed has ``TimeoutError`` or ``ProcessExpired`` as its result; see ``call``."""
        futures = {key: self.call(function, arguments, timeout_s) for key, arguments in calls.items()}
        results = {}
        for key, future in futures.items():
            try:
                results[key] = future.result()
            except (TimeoutError, ProcessExpired) as error:
                results[key] = error
        return results

    def close(self) -> None:
        """End the processes. Threads that wait for a result get ``CancelledError``."""
        for future in list(self._waiting):  # the pool does not resolve them when it stops
            future.cancel()
        self._pool.stop()
        self._pool.join()


class GradingThreads:
    """Threads for calls that wait for another process or machine, which enforces a deadline. Thread-safe."""

    def __init__(self) -> None:
        self.closed = threading.Event()
        self._executors: dict[int, ThreadPoolExecutor] = {}

    def map(self, function: Callable[[Any], Any], items: Iterable[Any], at_once: int) -> list[Any]:
        """Return the results in the order of ``items``, with at most ``at_once`` running calls. After Ctrl-C or ``close``
        (``CancelledError``), calls that did not begin are dropped."""
        executor = self._executors.setdefault(at_once, ThreadPoolExecutor(at_once, "pgrpo-grading"))
        return list(executor.map(function, items))

    def close(self) -> None:
        """Start no further calls."""
        self.closed.set()
        for executor in self._executors.values():
            executor.shutdown(wait=False, cancel_futures=True)


def graders() -> int:
    """Return the number of completions that one rank grades at once: its share of the cores, at most four."""
    return max(1, min(4, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
