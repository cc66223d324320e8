"""The episodes of a rollout: prompts in, groups out.

Without tools and environments an episode is one completion (``SingleTurn``). With them (``ToolLoop``) all episodes of a rollout run
at once, each on its own: an environment is reset, the model has a turn, its calls run, it reads the results and has another turn,
until it calls nothing more or a limit ends the episode.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any, Protocol

from pgrpo.config.task import EnvironmentConfig
from pgrpo.environments.calls import Calls
from pgrpo.environments.chat import Chat
from pgrpo.environments.conversation import Lengths
from pgrpo.environments.player import Player, Stage
from pgrpo.environments.remote import abandon, close_all, is_usable
from pgrpo.environments.tools import Kind, Tool, kind_name
from pgrpo.environments.turns import Turns
from pgrpo.environments.workers import Nursery
from pgrpo.rollout.base import RolloutEngine
from pgrpo.types import Completion, Episode, Group, Prompt, Request, Sample, SamplingParams

MOST_FAILURES = 32
"""Episodes in a row that an environment or tool may fail or hold up too long; then the run stops."""
OnGroup = Callable[[int, Group], None]


class Episodes(Protocol):
    """Makes the episodes of a rollout. Every rank calls its methods alike."""

    engine: RolloutEngine

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        seeds: Sequence[Sequence[int]],
        count: int,
        on_group: OnGroup,
    ) -> list[Group]:
        """One group for each of the first ``count`` prompts, with an episode for each of its seeds. The other prompts are fillers,
        which some engines need so that all ranks sample equally many. ``on_group`` is called with a group and its position when
        its episodes have ended, while others go on. It must not raise."""
        ...

    def release(self, groups: Sequence[Group]) -> None:
        """Rewards of these groups, all of a rollout, are done: take their environments back."""
        ...

    def check(self, groups: Sequence[Group]) -> None:
        """Raise what went wrong in the episodes of a rollout; not collective, as ``generate`` is."""
        ...

    def close(self) -> None: ...


def single_turn(prompt: Prompt, completion: Completion) -> Episode:
    """The episode that is one completion."""
    ids = completion.token_ids
    sample = Sample(
        prompt.token_ids, ids, [True] * len(ids), completion.rollout_logprobs, completion.weights_version,
        images=prompt.images,
    )  # fmt: skip
    return Episode([sample], completion.text, completion.finish_reason)


class SingleTurn:
    """Episodes of one completion."""

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        seeds: Sequence[Sequence[int]],
        count: int,
        on_group: OnGroup,
    ) -> list[Group]:
        """See ``Episodes``."""
        groups = [Group(prompt, []) for prompt in prompts]

        def finished(position: int, completions: list[Completion]) -> None:
            group = groups[position]
            group.episodes = [single_turn(group.prompt, completion) for completion in completions]
            if position < count:
                on_group(position, group)

        requests = [Request(p.token_ids, list(own), images=p.images) for p, own in zip(prompts, seeds, strict=True)]
        self.engine.sample(requests, params, finished)
        return groups[:count]

    def release(self, groups: Sequence[Group]) -> None:
        """See ``Episodes``; there are no environments."""

    def check(self, groups: Sequence[Group]) -> None:
        """See ``Episodes``; nothing but the engine can fail."""

    def close(self) -> None:
        """See ``Episodes``; nothing is open."""


class EnvironmentFailed(RuntimeError):
    """Tools or environments failed in too many episodes in a row."""


class ToolLoop:
    """Episodes with tools and environments.

    Args:
        engine: samples the turns.
        tools: plain functions, which every episode has.
        kinds: name -> class of environments, chosen by a row's column ``environment``; the name "" is for all rows.
        chats: name -> chat template with the tools of that class.
        settings: limits, deadlines and what errors do.
        max_episode_tokens: of an episode behind its prompt.
        max_prompt_tokens: of a prompt with what an environment adds to it.
        interrupted: whether a stop signal came.
        nursery: of the worker processes, which end with this.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        tools: Sequence[Tool],
        kinds: dict[str, Kind],
        chats: dict[str, Chat],
        settings: EnvironmentConfig,
        max_episode_tokens: int,
        max_prompt_tokens: int,
        interrupted: Callable[[], bool],
        nursery: Nursery | None = None,
    ) -> None:
        self._nursery = nursery
        self.engine, self.tools, self.kinds, self.chats, self.settings = engine, tools, kinds, chats, settings
        self._max_episode, self._max_prompt, self._interrupted = max_episode_tokens, max_prompt_tokens, interrupted
        self._pool: dict[str, list[Any]] = {name: [] for name in kinds}
        self._calls = Calls()
        self._running: list[Future[None]] = []
        self._failures = 0  # episodes in a row

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        seeds: Sequence[Sequence[int]],
        count: int,
        on_group: OnGroup,
    ) -> list[Group]:
        """See ``Episodes``. Fillers have no episodes: their tools would run for nothing."""
        groups = [Group(prompt, []) for prompt in prompts[:count]]
        lengths = Lengths(params.max_completion_tokens, self._max_episode)
        stages = {name: self._stage(name, lengths) for name in self.chats}
        names = [self._name_of(prompt) for prompt in prompts[:count]]
        players = [
            [Player(stages[name], prompt, seed) for seed in own]
            for name, prompt, own in zip(names, prompts[:count], seeds, strict=False)
        ]
        self._lend([(name, player) for name, own in zip(names, players, strict=True) for player in own])
        turns = Turns(sum(map(len, players)), self._interrupted)

        async def play_group(n: int) -> None:
            groups[n].episodes = await asyncio.gather(*(p.play((n, i), turns) for i, p in enumerate(players[n])))
            on_group(n, groups[n])

        self._running = [self._calls.episodes.submit(play_group(n)) for n in range(count)]
        try:
            self.engine.sample((), params, turns.finished, turns.take)
            if not self._interrupted():
                turns.check()
        except BaseException:
            for future in self._running:
                future.cancel()
            for free in self._pool.values():
                free.clear()  # they may still be in use
            raise
        if not self._interrupted():
            wait(self._running)
        return groups

    def check(self, groups: Sequence[Group]) -> None:
        """See ``Episodes``.

        Raises:
            EnvironmentFailed: ``MOST_FAILURES`` episodes in a row failed.
        """
        for future in self._running:
            future.result()
        for episode in (episode for group in groups for episode in group.episodes):
            failed = episode.finish_reason in ("environment", "timeout")
            self._failures = self._failures + 1 if failed else 0
            if self._failures >= MOST_FAILURES:
                error = episode.messages[-1]["content"] if episode.messages else "no message"
                raise EnvironmentFailed(
                    f"tools or environments failed in {self._failures} episodes in a row; the last error: {error:.500}"
                )

    def release(self, groups: Sequence[Group]) -> None:
        """See ``Episodes``. An instance that timed out is not used again."""
        pool: dict[str, list[Any]] = {name: [] for name in self._pool}
        for group in groups:
            for episode in group.episodes:
                if self.kinds:
                    name = self._name_of(group.prompt)
                    # One that leads may still be in the middle of its `converse`.
                    is_broken_off = episode.finish_reason == "environment" and self.kinds[name].is_long
                    is_lost = episode.finish_reason == "timeout" or is_broken_off or not is_usable(episode.environment)
                    if is_lost:
                        abandon(episode.environment)
                    pool[name].append(None if is_lost else episode.environment)
                episode.environment = None
        for name, free in self._pool.items():
            pool[name] += free[len(pool[name]) :]
        self._pool = pool

    def close(self) -> None:
        """Close all instances that have ``close``, and end the worker processes."""
        close_all([instance for free in self._pool.values() for instance in free])
        self._calls.close()
        if self._nursery is not None:
            self._nursery.close()

    def _name_of(self, prompt: Prompt) -> str:
        return kind_name(self.kinds, prompt.columns)

    def _stage(self, name: str, lengths: Lengths) -> Stage:
        kind = self.kinds.get(name)
        tools = {tool.name: tool for tool in (*self.tools, *(kind.tools if kind else ()))}
        return Stage(kind, bool(name), self.chats[name], tools, self.settings, lengths, self._max_prompt, self._calls)

    def _lend(self, players: Sequence[tuple[str, Player]]) -> None:
        """The k-th episode of a class gets its k-th instance, so that a run does not depend on which was free first."""
        used = dict.fromkeys(self._pool, 0)
        for name, player in players if self.kinds else ():
            free, k = self._pool[name], used[name]
            player.environment = free[k] if k < len(free) else None
            used[name] += 1
