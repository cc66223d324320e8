"""Turns between episodes, which wait for completions on an event loop, and an engine, which asks for requests in its own thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from pgrpo.rollout.base import Wait
from pgrpo.types import Completion, Request

Key = tuple[int, int]
"""Of an episode: number of its prompt, and its own number there."""
LOOK_EVERY_S = 0.05
"""Seconds between looks at the stop signal while nothing is to be sampled."""


class Turns:
    """The turns of one rollout.

    Args:
        episodes: how many there are.
        interrupted: whether a stop signal came; then nobody waits any longer.
    """

    def __init__(self, episodes: int, interrupted: Callable[[], bool]) -> None:
        self._interrupted = interrupted
        self._changed = threading.Condition()
        self._running = episodes  # they neither wait for a completion nor have ended
        self._waiting: dict[Key, tuple[Request, asyncio.Future[Completion]]] = {}
        self._taken: list[asyncio.Future[Completion]] = []
        self._answered = 0

    async def complete(self, key: Key, request: Request) -> Completion:
        """The completion of a request with one seed; called by an episode on its loop."""
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        with self._changed:
            self._waiting[key] = request, future
            self._running -= 1
            self._changed.notify()
        return await future

    def ended(self) -> None:
        """An episode has ended."""
        with self._changed:
            self._running -= 1
            self._changed.notify()

    def take(self, wait: Wait) -> list[Request] | None:
        """``rollout.base.More``: the requests that wait, in the order of their episodes and never of their arrival."""

        def has_waited() -> bool:
            if wait == "no" or not self._running or self._interrupted():
                return True
            return wait != "all" and bool(self._waiting)

        with self._changed:
            while not (is_there := has_waited()):
                self._changed.wait(LOOK_EVERY_S)
                if wait == "soon":
                    break
            batch = [self._waiting[key] for key in sorted(self._waiting)]
            self._waiting.clear()
            self._taken += [future for _, future in batch]
        return None if wait == "soon" and is_there and not batch else [request for request, _ in batch]

    def check(self) -> None:
        """RuntimeError if the engine is done and has not answered every request: its episodes would wait for ever."""
        if missing := len(self._taken) - self._answered + len(self._waiting) + self._running:
            raise RuntimeError(f"the engine returned without {missing} turns that episodes wait for")

    def finished(self, position: int, completions: list[Completion]) -> None:
        """``rollout.base.OnFinished``: hand a completion to its episode."""
        future = self._taken[position]
        with self._changed:
            self._running += 1
            self._answered += 1

        def hand_over(completion: Any = completions[0]) -> None:
            if not future.done():  # the rollout was broken off
                future.set_result(completion)

        future.get_loop().call_soon_threadsafe(hand_over)
