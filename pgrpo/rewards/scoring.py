"""Scores the groups of one rollout. A finished group can be scored while others are still sampled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Event, Lock, Semaphore, Thread
from typing import NamedTuple

from pgrpo.rewards.call import Reward
from pgrpo.tracking.live import counting
from pgrpo.types import Episode, Group, Prompt

Scored = tuple[Prompt, Episode]
Position = tuple[int, int]
"""The position of an episode: that of its group, then its own in the group."""
AT_ONCE = 8
"""Concurrent calls of one built-in function: a slow completion must not delay the groups behind it."""
TOGETHER_S = 0.25
"""Seconds that a call waits for more groups while sampling goes on. Groups often finish together, and one call is cheaper than
two."""


class RewardError(RuntimeError):
    """A reward function failed. The message names the function, the sample and the reason."""


class Fault(NamedTuple):
    """The reason why a function failed on an episode. ``of_call``: the whole call is at fault, and no episode in particular."""

    reason: str
    of_call: bool = False


Outcome = float | Fault | None
Evaluate = Callable[[Reward, Sequence[Scored]], list[Outcome]]


@dataclass(frozen=True, slots=True)
class RewardReport:
    """``errors``: number of samples left out because a reward failed. ``first_error``: the first such failure, as a message."""

    errors: int = 0
    first_error: str | None = None


class Scoring:
    """Scores one rollout. ``RewardRunner.begin`` makes it, and ``RewardRunner.close`` ends the calls that its threads wait for.

    Functions that ``may_run_beside_sampling`` score a group in a thread as soon as it is added. ``finish`` calls the others, with
    all groups at once. Results and errors do not depend on the order in which groups are added.

    Args:
        rewards: the functions.
        evaluate: calls one of them, from any thread, and returns one outcome per episode.
        stop_at_error: raise ``RewardError`` if a function fails; otherwise leave the episode out.
    """

    def __init__(self, rewards: Sequence[Reward], evaluate: Evaluate, *, stop_at_error: bool) -> None:
        self._all_added = Event()
        self._calls = [_Calls(reward, evaluate, self._all_added) for reward in rewards]
        self._added: set[int] = set()
        self._stop_at_error = stop_at_error

    def add(self, position: int, group: Group) -> None:
        """Start to score a finished group. Returns at once and never raises."""
        self._added.add(position)
        for calls in self._calls:
            if calls.reward.may_run_beside_sampling:
                calls.add({position: group})

    def finish(self, groups: Sequence[Group]) -> RewardReport:
        """Set ``reward`` and ``reward_parts`` of every episode.

        Args:
            groups: all groups, in order of position, added before or not.

        Raises:
            RewardError: the first function that failed, on the first episode that it failed on.
        """
        everything = dict(enumerate(groups))
        rest = {position: group for position, group in everything.items() if position not in self._added}
        self._all_added.set()
        samples = {(n, i): (g.prompt, episode) for n, g in everything.items() for i, episode in enumerate(g.episodes)}
        with counting("grading", len(self._calls) * len(samples), "rewards", self._done):
            # Functions that must run in this thread come last: the others run in threads of their own meanwhile.
            for calls in sorted(self._calls, key=lambda calls: not calls.reward.may_run_beside_others):
                calls.add(rest if calls.reward.may_run_beside_sampling else everything)
            ended = [(calls.reward, calls.outcomes()) for calls in self._calls]
        failed: dict[Position, str] = {}
        for reward, outcomes in ended:
            for position, (prompt, episode) in samples.items():
                outcome = outcomes[position]
                if isinstance(outcome, Fault):
                    failed.setdefault(position, _show(reward, prompt, episode, outcome))
                episode.reward_parts[reward.name] = None if isinstance(outcome, Fault) else outcome
            if failed and self._stop_at_error:
                first = min(failed)
                outcome = outcomes[first]
                of_call = isinstance(outcome, Fault) and outcome.of_call
                hint = "" if of_call else "; rewards.on_error=mask leaves such samples out"
                raise RewardError(f"{failed[first]}{hint}")
        for position, (_, episode) in samples.items():
            is_left_out = position in failed or episode.finish_reason == "environment"
            episode.reward = None if is_left_out else self._total(episode)
        return RewardReport(len(failed), failed[min(failed)] if failed else None)

    def _done(self) -> int:
        """Number of values so far, one an episode and function."""
        return sum(calls.count for calls in self._calls)

    def _total(self, episode: Episode) -> float | None:
        """The weighted sum of the rewards that apply to an episode; None if none applies."""
        parts = [(calls.reward.weight, episode.reward_parts[calls.reward.name]) for calls in self._calls]
        terms = [weight * value for weight, value in parts if value is not None]
        return sum(terms) if terms else None


class _Calls:
    """The calls of one function. Groups added while it is busy wait, and then go into one call together."""

    def __init__(self, reward: Reward, evaluate: Evaluate, all_added: Event) -> None:
        self.reward, self._evaluate, self._all_added = reward, evaluate, all_added
        # A worker process runs one call at a time. Groups that wait for it go into one call.
        self._turn = Semaphore(AT_ONCE if reward.worker is None else 1)
        self._lock = Lock()
        self._waiting: dict[int, Group] = {}
        self._running: list[Future[None]] = []
        self._outcomes: dict[Position, Outcome] = {}

    def add(self, groups: Mapping[int, Group]) -> None:
        """Call the function for these groups (position -> group), in a thread; in this thread, now, if it may not run beside
        others."""
        with self._lock:
            has_thread = bool(self._waiting)  # a thread that has not called yet takes these groups too
            self._waiting |= groups
        if not self.reward.may_run_beside_others:
            self._call()
        elif groups and not has_thread:
            done = Future()
            self._running.append(done)
            # A daemon thread: the process can exit although a function never returns.
            Thread(target=self._call_in_turn, args=(done,), name="pgrpo-rewards", daemon=True).start()

    @property
    def count(self) -> int:
        return len(self._outcomes)

    def outcomes(self) -> dict[Position, Outcome]:
        """Wait for all calls and return their outcomes."""
        for done in self._running:
            done.result()
        return self._outcomes

    def _call_in_turn(self, done: Future[None]) -> None:
        with self._turn:
            try:
                done.set_result(self._call())
            except BaseException as error:  # raised again in the thread that waits
                done.set_exception(error)

    def _call(self) -> None:
        self._all_added.wait(TOGETHER_S)
        with self._lock:
            groups, self._waiting = sorted(self._waiting.items()), {}
        samples = [(group.prompt, episode) for _, group in groups for episode in group.episodes]
        if samples:
            positions = [(n, i) for n, group in groups for i in range(len(group.episodes))]
            self._outcomes.update(zip(positions, self._evaluate(self.reward, samples), strict=True))


def _show(reward: Reward, prompt: Prompt, episode: Episode, fault: Fault) -> str:
    reason = " ".join(fault.reason.split())
    if fault.of_call:
        return f"reward `{reward.name}` ({reward.key}) failed: {reason}"
    return (
        f"reward `{reward.name}` ({reward.key}) failed on a completion of row {prompt.index}: {reason}; "
        f"prompt: {_shorten(prompt.text)}, completion: {_shorten(episode.text)}"
    )


def _shorten(text: str, limit: int = 400) -> str:
    half = limit // 2
    return repr(text if len(text) <= limit else f"{text[:half]} [...] {text[-half:]}")
