"""Grading in parallel: worker processes, each call with a deadline of its own; and threads, for what waits elsewhere."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from typing import Any

from pebble import ProcessExpired, ProcessFuture, ProcessPool


class Workers:
    """``count`` worker processes, each call with a deadline of its own. They start with the first call and stay."""

    def __init__(self, count: int, warm_up: Callable[[], None] | None = None) -> None:
        # Not fork: the parent runs torch threads, which a forked child would find dead and their locks held.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPool(count, initializer=warm_up, context=context)
        self._waiting: set[ProcessFuture] = set()

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...], timeout_s: float) -> ProcessFuture:
        """Its result raises ``TimeoutError`` at the deadline, ``ProcessExpired`` where the process died by itself."""
        future = self._pool.schedule(function, args=arguments, timeout=timeout_s)
        self._waiting.add(future)
        future.add_done_callback(self._waiting.discard)
        return future

    def close(self) -> None:
        """End the processes; calls of other threads that wait for them raise ``CancelledError``."""
        for future in list(self._waiting):  # a pool that stops leaves them unanswered
            future.cancel()
        self._pool.stop()
        self._pool.join()


class GradingPool:
    """Calls ``function`` in worker processes, which are started by the first call and stay. Several threads may call it.

    Args:
        function: of a module, so that a worker can import it.
        warm_up: called once in each worker before its first deadline runs: imports.
    """

    def __init__(self, function: Callable[..., Any], warm_up: Callable[[], None]) -> None:
        self._function, self._workers = function, Workers(graders(), warm_up)

    def grade(self, calls: Mapping[Any, tuple[Any, ...]], timeout_s: float) -> dict[Any, Any]:
        """Result by key of ``calls`` (key -> arguments); ``TimeoutError`` where it was killed at its deadline,
        ``ProcessExpired`` where its process died by itself (both as values, not raised)."""
        futures = {key: self._workers.call(self._function, arguments, timeout_s) for key, arguments in calls.items()}
        results = {}
        for key, future in futures.items():
            try:
                results[key] = future.result()
            except (TimeoutError, ProcessExpired) as error:
                results[key] = error
        return results

    def close(self) -> None:
        """End the worker processes; calls of other threads that wait for them raise ``CancelledError``."""
        self._workers.close()


class GradingThreads:
    """Threads for calls that spend their time in another process or machine, and have a deadline there. Several threads may call
    it."""

    def __init__(self) -> None:
        self.closed = threading.Event()
        self._executors: dict[int, ThreadPoolExecutor] = {}

    def map(self, function: Callable[[Any], Any], items: Iterable[Any], at_once: int) -> list[Any]:
        """Results in the order of ``items``, ``at_once`` of all calls at a time. Ctrl-C, or ``close`` (``CancelledError``), drops
        those that did not begin."""
        executor = self._executors.setdefault(at_once, ThreadPoolExecutor(at_once, "pgrpo-grading"))
        return list(executor.map(function, items))

    def close(self) -> None:
        """Begin nothing more."""
        self.closed.set()
        for executor in self._executors.values():
            executor.shutdown(wait=False, cancel_futures=True)


def graders() -> int:
    """How many completions one rank grades at once: its share of the cores, at most four."""
    return max(1, min(4, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
