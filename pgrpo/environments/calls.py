"""Calls the user's functions with a deadline: sync and async ones in this process, and those of worker processes.

Episodes run on one event loop, the user's async functions on another, and each sync call in a thread that does nothing else
meanwhile: a function that blocks cannot hold up the episodes or their deadlines. A sync call in this process that passes its
deadline cannot be ended; its thread is left behind, and does not keep the process from exiting. A worker process is killed.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import Future
from contextlib import suppress
from contextvars import Context
from queue import SimpleQueue
from typing import Any

AT_ONCE = 512
"""Sync calls at a time, as each takes a thread."""
START_S = 120.0
"""Seconds until a worker process is ready to be called, with the module that it is to call."""
TURN_S = 0.2
"""Seconds in which an event loop that nobody blocks turns."""
CLOSE_S = 2.0
"""Seconds for coroutines that still run at the end to end."""


class CallFailed(Exception):
    """The function raised. The message is ``Type: text``."""


class WorkerDied(CallFailed):
    """The worker process ended during the call."""


class CallTimeout(Exception):
    """The function did not return in time. The message, if any, says what else held it up."""


class Remote(ABC):
    """A function of a worker process. Its methods block, but for ``begin`` where the worker ``is_there`` already."""

    is_there = False

    @abstractmethod
    def begin(self) -> Any:
        """A worker that nobody else calls."""

    @abstractmethod
    def run(self, worker: Any, arguments: Mapping[str, Any]) -> Any:
        """Call the function there."""

    def end(self, worker: Any) -> None:  # noqa: B027
        """The call is over; the worker may have been killed."""


Function = Callable[..., Any] | Remote
"""What may be called: a function of this process, or of a worker."""


class Loop:
    """An event loop in a daemon thread."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def finish(self, work: Awaitable[Any]) -> Any:
        """The result of the user's async work; CallFailed. Blocks."""
        return self.submit(_contained(lambda: work, {})).result()

    def close(self) -> None:
        """End what still runs here. A coroutine that blocks its loop is left behind, as a thread is."""
        self.loop.call_soon_threadsafe(lambda: self.loop.create_task(_end_all(self.loop)))
        self._thread.join(CLOSE_S)
        if not self._thread.is_alive():
            self.loop.close()


async def _end_all(loop: asyncio.AbstractEventLoop) -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    if others:
        await asyncio.wait(others, timeout=CLOSE_S / 2)
    loop.stop()


class Calls:
    """Calls functions for episodes. ``close`` ends the event loops."""

    def __init__(self) -> None:
        self.episodes, self._user = Loop("pgrpo-episodes"), Loop("pgrpo-tools")
        self._room, self._threads = asyncio.Semaphore(AT_ONCE), Threads()

    async def __call__(self, function: Function, arguments: Mapping[str, Any], timeout_s: float) -> Any:
        """The function's result; run on the loop ``episodes``.

        Raises:
            CallFailed, CallTimeout
        """
        if isinstance(function, Remote):
            async with self._room:
                return await self._far_away(function, arguments, timeout_s)
        if inspect.iscoroutinefunction(function):
            try:
                return await _within(timeout_s, self._user.submit(_contained(function, arguments)))
            except CallTimeout:
                raise CallTimeout(await self._blocked()) from None
        async with self._room:
            result = await _within(timeout_s, self._threads.submit(function, arguments))
        if inspect.isawaitable(result):  # of a plain function around an async one
            result = await _within(timeout_s, self._user.submit(_contained(lambda: result, {})))
        return result

    async def _far_away(self, function: Remote, arguments: Mapping[str, Any], timeout_s: float) -> Any:
        try:
            if function.is_there:
                worker = function.begin()
            else:
                worker = await _within(START_S, self._threads.submit(function.begin, {}))
        except CallTimeout:
            raise CallFailed(f"no worker process was ready within {START_S:g} s") from None
        call = self._threads.submit(lambda: function.run(worker, arguments), {})
        try:
            return await _within(timeout_s, call)
        except BaseException as error:
            if not isinstance(
                error, CallFailed
            ):  # the deadline passed, or the rollout was broken off, in the middle of a call
                worker.kill()
            raise
        finally:
            function.end(worker)

    async def _blocked(self) -> str:
        """What to say if the loop of async functions turns no more."""
        try:
            await _within(TURN_S, self._user.submit(asyncio.sleep(0)))
        except CallTimeout:
            return (
                "; an async function blocks the event loop of all: write it as a plain `def`, or await what takes time"
            )
        return ""

    def close(self) -> None:
        self.episodes.close()
        self._user.close()
        self._threads.close()


async def _within(timeout_s: float, call: Future[Any]) -> Any:
    try:
        async with asyncio.timeout(timeout_s):
            return await asyncio.wrap_future(call)
    except TimeoutError:  # the call's own is a CallFailed
        raise CallTimeout from None


async def _contained(function: Callable[..., Awaitable[Any]], arguments: Mapping[str, Any]) -> Any:
    """Whatever the function raises, ``SystemExit`` and ``CancelledError`` too, is a failure of this call alone."""
    task = asyncio.current_task()
    assert task is not None
    try:
        return await function(**arguments)
    except BaseException as error:
        is_ours = isinstance(error, asyncio.CancelledError) and task.cancelling()  # the deadline passed
        if is_ours or isinstance(error, GeneratorExit):
            raise
        raise CallFailed(describe(error)) from error


class Threads:
    """Daemon threads for sync calls, one call at a time each. One whose call has returned is used again: to start a thread means to
    wait until it runs, which takes milliseconds beside an engine that computes in Python."""

    def __init__(self) -> None:
        self._idle: list[SimpleQueue[Callable[[], None] | None]] = []
        self._is_closed = False

    def submit(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Future[Any]:
        """The function's result, or CallFailed."""
        done: Future[Any] = Future()
        process = os.getpid()
        try:
            work = self._idle.pop()
        except IndexError:
            work = SimpleQueue[Callable[[], None] | None]()
            threading.Thread(target=_live, args=(work,), name="pgrpo-tool", daemon=True).start()

        def call() -> None:
            try:
                result = Context().run(function, **arguments)  # what it sets is not the next call's
            except CallFailed as error:
                outcome: Any = error
            except BaseException as error:
                outcome = CallFailed(describe(error))
            else:
                outcome = result
            if os.getpid() != process:  # the function forked, and this is the child, which has nothing to answer
                os._exit(0)
            self._idle.append(work)
            if self._is_closed:
                self.close()
            if not done.set_running_or_notify_cancel():  # nobody waits any more
                return
            done.set_exception(outcome) if isinstance(outcome, CallFailed) else done.set_result(outcome)

        work.put(call)
        return done

    def close(self) -> None:
        """End the threads that are idle, and the others when their calls return."""
        self._is_closed = True
        while self._idle:
            with suppress(IndexError):  # another thread may have taken the last one
                self._idle.pop().put(None)


def _live(work: SimpleQueue[Callable[[], None] | None]) -> None:
    while (call := work.get()) is not None:
        call()


def describe(error: BaseException) -> str:
    """``ValueError: text``, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
