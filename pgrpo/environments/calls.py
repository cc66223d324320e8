"""Calls the user's functions in this process, sync and async, with a deadline.

Episodes run on one event loop, the user's async functions on another, and each sync call in a thread of its own: a function that
blocks cannot hold up the episodes or their deadlines. A sync call that passes its deadline cannot be ended; its thread is left
behind, and does not keep the process from exiting.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import Future
from typing import Any

AT_ONCE = 512
"""Sync calls at a time, as each takes a thread."""


class CallFailed(Exception):
    """The function raised. The message is ``Type: text``."""


class CallTimeout(Exception):
    """The function did not return in time."""


class Loop:
    """An event loop in a daemon thread."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name=name, daemon=True).start()

    def submit(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)


class Calls:
    """Calls functions for episodes. ``close`` ends the event loops."""

    def __init__(self) -> None:
        self.episodes, self._user = Loop("pgrpo-episodes"), Loop("pgrpo-tools")
        self._room = asyncio.Semaphore(AT_ONCE)

    async def __call__(self, function: Callable[..., Any], arguments: Mapping[str, Any], timeout_s: float) -> Any:
        """The function's result; run on the loop ``episodes``.

        Raises:
            CallFailed, CallTimeout
        """
        if inspect.iscoroutinefunction(function):
            return await _within(timeout_s, self._user.submit(_contained(function, arguments)))
        async with self._room:
            result = await _within(timeout_s, _in_thread(function, arguments))
        if inspect.isawaitable(result):  # of a plain function around an async one
            result = await _within(timeout_s, self._user.submit(_contained(lambda: result, {})))
        return result

    def close(self) -> None:
        self.episodes.close()
        self._user.close()


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
        if isinstance(error, asyncio.CancelledError) and task.cancelling():  # the deadline passed
            raise
        raise CallFailed(describe(error)) from error


def _in_thread(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Future[Any]:
    done: Future[Any] = Future()

    def call() -> None:
        try:
            result = function(**arguments)
        except BaseException as error:
            outcome: Any = CallFailed(describe(error))
        else:
            outcome = result
        if not done.set_running_or_notify_cancel():  # nobody waits any more
            return
        done.set_exception(outcome) if isinstance(outcome, CallFailed) else done.set_result(outcome)

    threading.Thread(target=call, name="pgrpo-tool", daemon=True).start()
    return done


def describe(error: BaseException) -> str:
    """``ValueError: text``, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
