"""Loads, checks and calls reward functions: names in the config, signatures, async functions, the worker's side."""

from __future__ import annotations

import asyncio
import difflib
import inspect
import threading
import traceback
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from pgrpo.config import ConfigError, RewardConfig
from pgrpo.config.functions import is_function, load_function

BUILT_IN = {
    "exact_match": "pgrpo.rewards.answers:exact_match",
    "contains_answer": "pgrpo.rewards.answers:contains_answer",
    "format_regex": "pgrpo.rewards.format:format_regex",
    "math": "pgrpo.rewards.math:Math",
    "choice": "pgrpo.rewards.choice:choice",
    "length": "pgrpo.rewards.length:length",
    "soft_overlong": "pgrpo.rewards.length:soft_overlong",
    "code": "pgrpo.rewards.code:Code",
    "reasoning_gym": "pgrpo.rewards.reasoning_gym:ReasoningGym",
    "reward_model": "pgrpo.rewards.reward_model:RewardModel",
    "llm_judge": "pgrpo.rewards.llm_judge:LlmJudge",
}
PENALTIES = ("length", "soft_overlong")  # built-in rewards whose best value is 0
ON_DEVICE = ("reward_model",)  # built-in rewards that compete with the sampler for its device
# Parameters that every function may have, in addition to the columns of the data set.
GIVEN = ("prompts", "completions", "completion_ids", "finish_reasons", "messages", "environments", "own_rewards")


class Unusable(RuntimeError):
    """Raised by a function that cannot work on this machine. It stops the run, because no sample is at fault."""


@dataclass(slots=True)
class Reward:
    """One reward function, checked.

    Attributes:
        name: unique name in metrics.
        key: config key, for errors.
        function: the callable.
        worker: name by which a worker process loads the function. None: it is called in this process.
        parameters: accepted keywords. None: all (``**columns``).
        columns: required columns of the data set (``a.b`` is a field of ``a``), possibly with ``messages``.
        style: what the function gets as ``completions`` and ``prompts``: texts, or lists of messages, as TRL's get.
        reads_gold: whether it reads a right answer of each row, in the column that its argument ``column`` names.
        may_run_beside_sampling: whether it may be called, in any thread, while an engine samples. A function given from Python may
            not: it may draw from the random generators of the process, which an engine seeds.
    """

    name: str
    key: str
    function: Callable[..., Any]
    worker: str | None
    weight: float
    args: dict[str, Any]
    timeout_s: float
    parameters: set[str] | None
    columns: list[str]
    style: Literal["text", "messages"] = "text"
    reads_gold: bool = False
    built_in: bool = False
    is_penalty: bool = False
    may_run_beside_sampling: bool = False

    @property
    def may_run_beside_others(self) -> bool:
        """Whether it may be called in a thread. A plain function given from Python may share state with others, or need the
        thread of its caller."""
        call = self.function if inspect.isroutine(self.function) else type(self.function).__call__
        return self.may_run_beside_sampling or inspect.iscoroutinefunction(call)

    def arguments(self, table: dict[str, list[Any]]) -> dict[str, Any]:
        """Return the keyword arguments of a call: the columns of ``table`` that the signature accepts, and ``args``."""
        wanted = table.keys() if self.parameters is None else self.parameters & table.keys()
        if self.worker is not None:
            wanted = wanted - {"environments"}  # live objects
        return {name: table[name] for name in wanted} | self.args


def check_name(name: str, key: str) -> None:
    """Raise ConfigError unless ``name`` (at config key ``key``) is a built-in reward or has the form of a Python function."""
    if not is_function(name) and name not in BUILT_IN:
        near = difflib.get_close_matches(name, BUILT_IN, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(BUILT_IN)}."
        raise ConfigError(f"{key}: no built-in reward `{name}`; {hint} Own: module:function or file.py:function")


def from_config(config: RewardConfig, key: str) -> Reward:
    """Load and check the function at config key ``key``. ConfigError if it or its ``args`` are wrong."""
    name = config.function
    check_name(name, f"{key}.function")
    function = _load(BUILT_IN.get(name, name), f"{key}.function")
    reward = _checked(function, key, dict(config.args), config.weight, config.timeout_s)
    reward.style = config.style
    if name not in BUILT_IN:
        if "environments" in (reward.parameters or ()):
            raise ConfigError(
                f"{key}.function: `{reward.name}` wants `environments`, which are objects of another process; give it from Python, "
                "or the environment a `get_reward`"
            )
        reward.worker, reward.may_run_beside_sampling, reward.reads_gold = name, True, False
        return reward
    if reward.style != "text":
        raise ConfigError(f"{key}.style: {name} is built in and reads texts; `style` is for functions of your own")
    reward.built_in, reward.is_penalty, reward.may_run_beside_sampling = True, name in PENALTIES, name not in ON_DEVICE
    # Without completions, a built-in only checks its arguments: report a bad pattern now, before the first rollout.
    try:
        parameters = inspect.signature(function).parameters
        options = {name for name, p in parameters.items() if p.kind is not p.POSITIONAL_OR_KEYWORD}
        function(**reward.arguments({name: [] for name in {*GIVEN, *parameters, *reward.columns} - options}))
    except Exception as error:
        raise ConfigError(f"{key}.args of {name}: {error}") from error
    return reward


def from_callable(function: Callable[..., Any], key: str) -> Reward:
    """Check a function given from Python. It runs in this process without a deadline, because nothing could end it."""
    if not callable(function):
        raise ConfigError(f"{key}: a reward is a function, not {function!r:.80}")
    reward = _checked(function, key, {}, 1.0, 0.0)
    reward.style, reward.reads_gold = getattr(function, "style", "text"), False
    return reward


def _checked(function: Callable[..., Any], key: str, args: dict[str, Any], weight: float, timeout_s: float) -> Reward:
    name = getattr(function, "__name__", type(function).__name__)
    try:
        parameters = inspect.signature(function).parameters
    except ValueError as error:
        raise ConfigError(f"{key}: `{name}` has no signature that Python can read; wrap it in a function") from error
    named = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for argument in args:
        if argument not in named or argument in GIVEN:
            options = [n for n in named if n not in GIVEN]
            raise ConfigError(
                f"{key}.args: `{name}` has no argument `{argument}`; it has {', '.join(options) or 'none'}"
            )
    always = {*GIVEN, *args} - {"messages"}
    columns = [n for n, p in named.items() if p.default is p.empty and n not in always]
    reads_gold = "column" in named and isinstance(column := args.get("column", named["column"].default), str)
    if reads_gold:
        columns.append(column)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    accepted = None if takes_all else set(named)
    return Reward(name, key, function, None, weight, args, timeout_s, accepted, columns, reads_gold=reads_gold)


class Caller:
    """Calls sync and async functions, from any thread. Async functions run concurrently in one event loop, which lives as long as
    the caller because their HTTP clients are bound to it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def __call__(self, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Call the function; return its result with arrays and tensors converted to lists and numbers."""
        result = function(**arguments)
        if inspect.isawaitable(result):
            result = asyncio.run_coroutine_threadsafe(_wait(result), self._running_loop()).result()
        if hasattr(result, "tolist"):
            return result.tolist()
        if isinstance(result, Iterable) and not isinstance(result, str | bytes | dict | set):
            return [value.item() if hasattr(value, "item") else value for value in result]
        return result

    def close(self) -> None:
        """Stop the event loop and cancel its running tasks."""
        if self._thread is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()
            self._thread = None

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        """Return the loop. It runs in its own thread, because the calling thread may already have one, as in a notebook."""
        with self._lock:
            if self._thread is None:
                ready = threading.Event()
                self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)), daemon=True)
                self._thread.start()
                ready.wait()
            return self._loop

    async def _serve(self, ready: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        ready.set()
        await self._stop.wait()


async def _wait(result: Awaitable[Any]) -> Any:
    return await result


@cache
def _caller() -> Caller:
    return Caller()


def work(name: str, key: str, arguments: dict[str, Any]) -> tuple[Any, str | None]:
    """Runs in a worker process: call the function ``name``. Return (result, None), or (None, description of the exception)."""
    try:
        return _caller()(_load_once(name, key), arguments), None
    except (Exception, SystemExit) as error:
        return None, describe(error)


def _load(name: str, key: str) -> Callable[..., Any]:
    """Load the function. A class is instantiated without arguments; the object can keep state between calls."""
    function: Any = load_function(name, key)
    return function() if isinstance(function, type) else function


_load_once = cache(_load)


def describe(error: BaseException) -> str:
    """Format as ``ValueError: text (file.py, line 3)``, with the line of the innermost frame."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"
