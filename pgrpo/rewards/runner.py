"""Runs the reward functions over a step's completions. No failure becomes a zero: it stops the run, or it is counted.

Functions that a config names run in worker processes, one for each file, so that one that hangs can be killed; built-in
ones and those given from Python run in this process. All run at once, but plain functions given from Python: these run
in the thread that scores, one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, Self

from pebble import ProcessExpired

from pgrpo.config import ConfigError, RewardConfig
from pgrpo.rewards.call import Caller, Reward, Unusable, describe, from_callable, from_config, work
from pgrpo.rewards.pool import Workers
from pgrpo.types import Episode, Group, Prompt

Scored = tuple[Prompt, Episode]


class RewardError(RuntimeError):
    """A reward function failed. The message shows the function, the sample and the reason."""


@dataclass(frozen=True, slots=True)
class RewardReport:
    """``errors``: samples left out because a reward failed on them. ``first_error``: the first reason, to be shown."""

    errors: int = 0
    first_error: str | None = None


class RewardRunner:
    """The reward functions of a run.

    Args:
        functions: from the config; every name is resolved now (``ConfigError``).
        on_error: `raise` stops with a ``RewardError`` at the first failure; `mask` leaves the failed samples out.
        extra: functions given from Python, each with weight 1.

    Attributes:
        names: of the functions, in order, unique; keys of ``Episode.reward_parts``.
    """

    def __init__(
        self, functions: Sequence[RewardConfig], *, on_error: Literal["raise", "mask"], extra: Sequence[Callable] = ()
    ) -> None:
        self._rewards = [from_config(c, f"rewards.functions[{i}]") for i, c in enumerate(functions)]
        self._rewards += [from_callable(f, f"rewards[{i}]") for i, f in enumerate(extra)]
        if not self._rewards:
            raise ConfigError("rewards.functions is empty: name at least one reward")
        self.names: list[str] = []
        for reward in self._rewards:
            base, number = reward.name, 1
            while reward.name in self.names:
                number += 1
                reward.name = f"{base}_{number}"
            self.names.append(reward.name)
        self._on_error = on_error
        self._caller = Caller()
        self._closed = False
        self._pools: dict[str, Workers] = {}

    def correct(self, group: Group) -> list[bool]:
        """Which samples of a scored group are right: every reward that applies gave 1 or more, and one did apply. Penalties,
        those of negative weight and the built-in ones for length, have no say.
        """
        judges = [r.name for r in self._rewards if r.weight >= 0 and not r.is_penalty]
        flags = []
        for i, total in enumerate(group.rewards):
            values = [value for name in judges if (value := group.episodes[i].reward_parts[name]) is not None]
            flags.append(total is not None and bool(values) and min(values) >= 1)
        return flags

    def check(self, prompt: Prompt) -> None:
        """``ConfigError`` when a function needs what the data set's rows, such as ``prompt``, do not have."""
        for reward in self._rewards:
            # A chat prompt's messages are there whatever the columns are called.
            there = prompt.columns.keys() | ({"messages"} if prompt.messages is not None else set())
            missing = [column for column in reward.columns if column not in there]
            if missing:
                raise ConfigError(
                    f"{reward.key}: reward `{reward.name}` needs the column {', '.join(f'`{c}`' for c in missing)}; "
                    f"the data has {', '.join(prompt.columns) or 'no columns'}"
                )

    def score(self, groups: Sequence[Group]) -> RewardReport:
        """Set ``reward`` and ``reward_parts`` of every episode."""
        samples = [(group.prompt, episode) for group in groups for episode in group.episodes]
        if not samples:
            return RewardReport()
        self.check(samples[0][0])
        failed: dict[int, str] = {}
        parts: dict[str, list[float | None]] = {}
        for reward, (values, faults) in zip(self._rewards, self._evaluate_all(samples), strict=True):
            parts[reward.name] = values
            failed = {i: _show(reward, samples[i], reason) for i, reason in faults.items()} | failed
            if failed and self._on_error == "raise":
                raise RewardError(f"{failed[min(failed)]}; rewards.on_error=mask leaves such samples out")
        for i, (_, episode) in enumerate(samples):
            episode.reward_parts = {name: values[i] for name, values in parts.items()}
            episode.reward = None if i in failed else self._total(parts, i)
        return RewardReport(len(failed), failed[min(failed)] if failed else None)

    def _total(self, parts: dict[str, list[float | None]], row: int) -> float | None:
        """The weighted sum of what applies to a sample, None where nothing does."""
        terms = [r.weight * value for r in self._rewards if (value := parts[r.name][row]) is not None]
        return sum(terms) if terms else None

    def _evaluate_all(self, samples: Sequence[Scored]) -> list[tuple[list[float | None], dict[int, str]]]:
        """``_evaluate`` of every reward, in their order."""
        if len(self._rewards) == 1:
            return [self._evaluate(self._rewards[0], samples)]
        threads = ThreadPoolExecutor(len(self._rewards), "pgrpo-rewards")
        try:
            for reward in self._rewards:
                if reward.worker is not None:
                    self._pool(reward.worker)  # here: a thread may not start one while another does
            running = {
                r.name: threads.submit(self._evaluate, r, samples) for r in self._rewards if r.may_run_beside_others
            }
            here = {r.name: self._evaluate(r, samples) for r in self._rewards if r.name not in running}
            return [here[name] if name in here else running[name].result() for name in self.names]
        finally:
            # Without waiting: after Ctrl-C `close` ends the worker processes that the threads wait for.
            threads.shutdown(wait=False, cancel_futures=True)

    def _evaluate(self, reward: Reward, samples: Sequence[Scored]) -> tuple[list[float | None], dict[int, str]]:
        """One value a sample, and why some have none because of a fault: position -> reason."""
        nothing: list[float | None] = [None] * len(samples)
        try:
            result = self._call(reward, samples)
        except BrokenProcessPool as error:
            # Not the fault of any sample: it stops the run whatever on_error says.
            raise RewardError(
                f"reward `{reward.name}`: no worker process can start ({error}); "
                "a script that trains needs its call under `if __name__ == '__main__':`"
            ) from error
        except TimeoutError as error:
            return nothing, dict.fromkeys(range(len(samples)), str(error))
        except _CallError as error:
            if len(samples) == 1:
                return nothing, {0: str(error)}
            return self._one_by_one(reward, samples, str(error))
        values, faults = nothing, {}
        for i, value in enumerate(result):
            if value is None:
                continue
            if isinstance(value, Real) and math.isfinite(value):
                values[i] = float(value)
            elif isinstance(value, Exception):
                faults[i] = f"it returned the error {describe(value)}"
            else:
                faults[i] = f"it returned {value!r:.80}, not a finite number or None"
        return values, faults

    def _one_by_one(
        self, reward: Reward, samples: Sequence[Scored], reason: str
    ) -> tuple[list[float | None], dict[int, str]]:
        """A call failed as a whole: call again, a completion at a time, to find the ones at fault."""
        values: list[float | None] = [None] * len(samples)
        faults: dict[int, str] = {}
        for i, sample in enumerate(samples):
            value, fault = self._evaluate(reward, [sample])
            values[i] = value[0]
            if fault:
                faults[i] = fault[0]
                if self._on_error == "raise":
                    break
        if faults:
            return values, faults
        together = f"{reason}; it fails on {len(samples)} completions together, on none of them alone"
        return [None] * len(samples), dict.fromkeys(range(len(samples)), together)

    def _call(self, reward: Reward, samples: Sequence[Scored]) -> list[Any]:
        """The function's list, of the right length. ``_CallError``; ``TimeoutError`` past the deadline."""
        arguments = reward.arguments(_table(samples))
        if reward.worker is not None:
            result = self._call_worker(reward, reward.worker, arguments)
        else:
            try:
                result = self._caller(reward.function, arguments)
            except BrokenProcessPool:
                raise
            except Unusable as error:
                raise RewardError(f"reward `{reward.name}` ({reward.key}): {error}") from error
            except (Exception, SystemExit) as error:
                if self._closed:
                    raise
                raise _CallError(f"it raised {describe(error)}") from error
        if not isinstance(result, list):
            raise _CallError(f"it returned {result!r:.80}, not a list with one entry a completion ({len(samples)})")
        if len(result) != len(samples):
            raise _CallError(f"it returned {len(result)} values for {len(samples)} completions")
        return result

    def _pool(self, worker: str) -> Workers:
        """The process of a function's file or module: functions of one file share what it keeps."""
        if self._closed:
            raise RewardError("the rewards are closed")
        where = worker.rpartition(":")[0]
        if where not in self._pools:
            self._pools[where] = Workers(1)
        return self._pools[where]

    def _call_worker(self, reward: Reward, worker: str, arguments: dict[str, Any]) -> Any:
        future = self._pool(worker).call(work, (worker, reward.key, arguments), reward.timeout_s)
        try:
            result, raised = future.result()
        except TimeoutError as error:
            reason = f"it took longer than timeout_s={reward.timeout_s:g} and was killed ({reward.key}.timeout_s)"
            raise TimeoutError(reason) from error
        except ProcessExpired as error:
            raise _CallError(f"its process died with exit code {error.exitcode}") from error
        except (BrokenProcessPool, CancelledError):  # the latter: `close` was called, after Ctrl-C
            raise
        except Exception as error:
            raise _CallError(f"its arguments or result cannot cross a process: {describe(error)}") from error
        if raised is not None:
            raise _CallError(f"it raised {raised}")
        return result

    def close(self) -> None:
        """End worker processes and threads, for good. Another call does nothing."""
        self._closed = True
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()
        self._caller.close()
        for reward in self._rewards:
            if reward.built_in and hasattr(reward.function, "close"):
                reward.function.close()  # pyright: ignore[reportFunctionMemberAccess]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _CallError(Exception):
    """A call that gave no usable list."""


def _table(samples: Sequence[Scored]) -> dict[str, list[Any]]:
    """Everything that a function may ask for, one entry a sample. Our names win over columns of the same name."""
    first = samples[0][0]
    table: dict[str, list[Any]] = {name: [prompt.columns.get(name) for prompt, _ in samples] for name in first.columns}
    table["prompts"] = [prompt.text for prompt, _ in samples]
    table["completions"] = [episode.text for _, episode in samples]
    table["completion_ids"] = [episode.token_ids for _, episode in samples]
    table["finish_reasons"] = [episode.finish_reason for _, episode in samples]
    if first.messages is not None:
        table["messages"] = [prompt.messages for prompt, _ in samples]
    return table


def _show(reward: Reward, sample: Scored, reason: str) -> str:
    prompt, episode = sample
    reason = " ".join(reason.split())
    return (
        f"reward `{reward.name}` ({reward.key}) failed on a completion of row {prompt.index}: {reason}; "
        f"prompt: {_shorten(prompt.text)}, completion: {_shorten(episode.text)}"
    )


def _shorten(text: str, limit: int = 400) -> str:
    half = limit // 2
    return repr(text if len(text) <= limit else f"{text[:half]} [...] {text[-half:]}")
