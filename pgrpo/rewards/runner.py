"""Calls the reward functions of a run. A failure never becomes a reward of zero: it stops the run or is counted.

Functions named in the config run in worker processes, one per file, so that a hanging one can be killed. Built-in functions and
those given from Python run in this process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from numbers import Real
from typing import Any, Literal, Self

from pebble import ProcessExpired

from pgrpo.config import ConfigError, RewardConfig
from pgrpo.config.columns import value_of
from pgrpo.rewards.call import Caller, Reward, Unusable, describe, from_callable, from_config, work
from pgrpo.rewards.pool import Workers
from pgrpo.rewards.scoring import Fault, Outcome, RewardError, RewardReport, Scored, Scoring
from pgrpo.types import Episode, Group, Prompt

LARGEST = 1e100
"""The largest magnitude of a reward: sums and standard deviations of such rewards do not overflow in float64."""

GOLDS_AT_ONCE = 10_000
"""Rows in one call that only reads right answers; bounds the memory of the call."""
NO_EPISODE = Episode([], "", "stop")
OF_OTHERS = {
    "solution_str": "verl calls `compute_score` once a sample, and here `completions` is a list of all (docs/from_verl.md)",
    "queries": "OpenRLHF's `queries` are prompts with their completions, and here there are `prompts` and `completions`",
}
"""Arguments of the rewards of other trainers, and what there is here."""


class RewardRunner:
    """The reward functions of a run.

    Args:
        functions: entries of the config. Every name is resolved here (``ConfigError``).
        on_error: `raise` raises ``RewardError`` at the first failure; `mask` leaves failed samples out.
        extra: functions given from Python, each with weight 1.

    Attributes:
        names: unique names of the functions, in order; the keys of ``Episode.reward_parts``.
    """

    def __init__(
        self, functions: Sequence[RewardConfig], *, on_error: Literal["raise", "mask"], extra: Sequence[Callable] = ()
    ) -> None:
        self._rewards = [from_config(c, f"rewards.functions[{i}]") for i, c in enumerate(functions)]
        self._rewards += [from_callable(f, f"rewards[{i}]") for i, f in enumerate(extra)]
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
        # Functions of one file share a process, and so their module's state.
        self._pools = {_file(reward.worker): Workers(1) for reward in self._rewards if reward.worker}

    @property
    def weights(self) -> dict[str, float]:
        """Name -> weight in the total reward."""
        return {reward.name: reward.weight for reward in self._rewards}

    def correct(self, group: Group) -> list[bool | None]:
        """Whether each episode of a scored group is right: every reward that applies to it gave 1 or more. Penalties (rewards of
        negative weight and the built-in ones for length) do not count. None if no other reward applies, or if one failed on it.
        """
        judges = [r.name for r in self._rewards if r.weight >= 0 and not r.is_penalty]
        flags: list[bool | None] = []
        for episode in group.episodes:
            values = [value for name in judges if (value := episode.reward_parts[name]) is not None]
            flags.append(min(values) >= 1 if values and episode.reward is not None else None)
        return flags

    def check(self, prompt: Prompt) -> None:
        """Raise ``ConfigError`` if a function needs a column that the data set's rows, such as ``prompt``, do not have."""
        for reward in self._rewards:
            # A chat prompt has `messages`, whatever its columns are called.
            there = prompt.columns.keys() | ({"messages"} if prompt.messages is not None else set())
            missing = [column for column in reward.columns if column not in there and column.split(".")[0] not in there]
            if missing:
                theirs = "".join(f"; {OF_OTHERS[name]}" for name in missing if name in OF_OTHERS)
                raise ConfigError(
                    f"{reward.key}: reward `{reward.name}` needs the column {', '.join(f'`{c}`' for c in missing)}; "
                    f"the data has {', '.join(prompt.columns) or 'no columns'}{theirs}"
                )
            for column in set(reward.columns) - there:
                try:
                    value_of(prompt.columns, column)
                except KeyError as error:
                    raise ConfigError(f"{reward.key}: reward `{reward.name}`: {error.args[0]}") from None

    def bad_golds(self, prompts: Sequence[Prompt]) -> dict[int, str]:
        """Row number -> why a built-in reward cannot read the row's right answer. Calls the rewards with empty completions."""
        bad: dict[int, str] = {}
        for reward in self._rewards:
            for start in range(0, len(prompts) if reward.reads_gold else 0, GOLDS_AT_ONCE):
                part = prompts[start : start + GOLDS_AT_ONCE]
                for prompt, outcome in zip(part, self._evaluate(reward, [(p, NO_EPISODE) for p in part]), strict=True):
                    if isinstance(outcome, Fault):
                        reason = outcome.reason.removeprefix("it returned the error ValueError: ")
                        bad.setdefault(prompt.index, f"{reward.name}: {reason}")
        return bad

    def begin(self) -> Scoring:
        """Begin to score a rollout, whose groups are added as they finish."""
        return Scoring(self._rewards, self._evaluate, stop_at_error=self._on_error == "raise")

    def score(self, groups: Sequence[Group]) -> RewardReport:
        """Set ``reward`` and ``reward_parts`` of every episode. Raises ``RewardError``."""
        for group in groups[:1]:
            self.check(group.prompt)
        return self.begin().finish(groups)

    def _evaluate(self, reward: Reward, samples: Sequence[Scored]) -> list[Outcome]:
        """Call a function. Returns one outcome per episode."""
        try:
            return [_outcome(value) for value in self._call(reward, samples)]
        except BrokenProcessPool as error:
            # No sample is at fault: stop the run whatever on_error says.
            raise RewardError(
                f"reward `{reward.name}`: no worker process can start ({error}); "
                "a script that trains needs its call under `if __name__ == '__main__':`"
            ) from error
        except TimeoutError as error:
            return [Fault(str(error))] * len(samples)
        except _CallError as error:
            fault = Fault(str(error), of_call=isinstance(error, _CountError) and len(samples) > 1)
        return [fault] if len(samples) == 1 else self._one_by_one(reward, samples, fault)

    def _one_by_one(self, reward: Reward, samples: Sequence[Scored], fault: Fault) -> list[Outcome]:
        """After a call on all samples failed, call the function once per sample, to find those that it fails on.

        A list of the wrong length is the whole call's fault, unless the function miscounts for some samples alone."""
        outcomes: list[Outcome] = []
        for sample in samples:
            outcomes += self._evaluate(reward, [sample])
            if isinstance(outcomes[-1], Fault) and self._on_error == "raise" and not fault.of_call:
                return outcomes + [None] * (len(samples) - len(outcomes))
        faults, count = sum(isinstance(outcome, Fault) for outcome in outcomes), len(samples)
        if fault.of_call and faults in (0, count):
            return [fault] * count  # it counts wrong whatever the completion
        if faults:
            return outcomes
        return [
            Fault(f"{fault.reason}; it fails on these {count} completions together but on none of them alone")
        ] * count

    def _call(self, reward: Reward, samples: Sequence[Scored]) -> list[Any]:
        """Returns the function's list, of the right length. Raises ``_CallError``, or ``TimeoutError`` past the deadline."""
        arguments = reward.arguments(_table(reward, samples))
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
                raise _CallError(f"it raised {describe(error)}{_hint(reward, error)}") from error
        if not isinstance(result, list):
            raise _CallError(f"it returned {result!r:.80}, not a list with one entry a completion ({len(samples)})")
        if len(result) != len(samples):
            raise _CountError(
                f"it returned {len(result)} values for {len(samples)} completions; return one number for each completion"
            )
        return result

    def _call_worker(self, reward: Reward, worker: str, arguments: dict[str, Any]) -> Any:
        future = self._pools[_file(worker)].call(work, (worker, reward.key, arguments), reward.timeout_s)
        try:
            result, raised = future.result()
        except TimeoutError as error:
            reason = f"it took longer than timeout_s={reward.timeout_s:g} and was killed ({reward.key}.timeout_s)"
            raise TimeoutError(reason) from error
        except ProcessExpired as error:
            raise _CallError(f"its process died with exit code {error.exitcode}") from error
        except (BrokenProcessPool, CancelledError):  # cancelled: `close` was called after Ctrl-C
            raise
        except Exception as error:
            raise _CallError(f"its arguments or result cannot cross a process: {describe(error)}") from error
        if raised is not None:
            raise _CallError(f"it raised {raised}{_hint(reward, raised)}")
        return result

    def close(self) -> None:
        """End worker processes and threads. A second call does nothing."""
        self._closed = True
        for pool in self._pools.values():
            pool.close()
        self._caller.close()
        for reward in self._rewards:
            if reward.built_in and hasattr(reward.function, "close"):
                reward.function.close()  # pyright: ignore[reportFunctionMemberAccess]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _CallError(Exception):
    """A call that returned no usable list."""


class _CountError(_CallError):
    """A call that returned a list of another length than the completions'."""


def _hint(reward: Reward, raised: BaseException | str) -> str:
    """A hint for a function that was written for TRL's lists of messages; empty for other errors."""
    if reward.style == "messages" or "string indices must be integers" not in str(raised):
        return ""
    how = f"set {reward.key}.style: messages" if reward.worker else "set the function's attribute style to 'messages'"
    return f'; completions and prompts are texts: write `c` for `c[0]["content"]`, or {how}'


def _table(reward: Reward, samples: Sequence[Scored]) -> dict[str, list[Any]]:
    """All arguments that a function may name, with one entry per sample. Our names win over columns of the same name."""
    first = samples[0][0]
    table: dict[str, list[Any]] = {name: [prompt.columns.get(name) for prompt, _ in samples] for name in first.columns}
    for name in set(reward.columns) - {*table, "messages"}:
        table[name] = [_field(prompt, name) for prompt, _ in samples]
    began = [episode.prompt or prompt for prompt, episode in samples]
    table["prompts"] = [prompt.text for prompt in began]
    table["completions"] = [episode.text for _, episode in samples]
    table["completion_ids"] = [episode.token_ids for _, episode in samples]
    table["finish_reasons"] = [episode.finish_reason for _, episode in samples]
    if any(episode.counts for _, episode in samples):  # episodes with tools or environments
        table["environments"] = [episode.environment for _, episode in samples]
        table["own_rewards"] = [episode.own_rewards for _, episode in samples]
    if first.messages is not None:
        table["messages"] = [[*(p.messages or ()), *e.messages] for p, (_, e) in zip(began, samples, strict=True)]
    if reward.style == "messages":
        table["prompts"] = [prompt.messages or [{"role": "user", "content": prompt.text}] for prompt in began]
        table["completions"] = [e.messages or [{"role": "assistant", "content": e.text}] for _, e in samples]
    return table


def _field(prompt: Prompt, name: str) -> Any:
    """A nested column, None where a row has none."""
    try:
        return value_of(prompt.columns, name)
    except KeyError:
        return None


def _outcome(value: Any) -> Outcome:
    """The outcome that one entry of a function's list stands for."""
    if value is None:
        return None
    magnitude: Any = abs(value) if isinstance(value, Real) else None
    if magnitude is not None and magnitude <= LARGEST:  # false for nan
        return float(value)
    if isinstance(value, Exception):
        return Fault(f"it returned the error {describe(value)}")
    is_finite = magnitude is not None and magnitude < math.inf
    wanted = f"a number of magnitude at most {LARGEST:g}" if is_finite else "a finite number or None"
    return Fault(f"it returned {value!r:.80}, not {wanted}")


def _file(worker: str) -> str:
    """The file or module that defines a function."""
    return worker.rpartition(":")[0]
