"""The episodes of a rollout: prompts in, groups out.

Without tools and environments an episode is one completion (``SingleTurn``). With them (``ToolLoop``) all episodes of a rollout run
at once, each on its own: an environment is reset, the model has a turn, its calls run, it reads the results and has another turn,
until it calls nothing more or a limit ends the episode.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from typing import Any, Protocol

from pgrpo.config import ConfigError
from pgrpo.config.schema import EnvironmentConfig
from pgrpo.environments.calls import CallFailed, Calls, CallTimeout
from pgrpo.environments.chat import Chat
from pgrpo.environments.conversation import Conversation, Ended, Lengths
from pgrpo.environments.parsing import Call
from pgrpo.environments.tools import BadCall, Kind, Tool
from pgrpo.environments.turns import Key, Turns
from pgrpo.rollout.base import RolloutEngine, generate
from pgrpo.types import Episode, Group, Prompt, SamplingParams

MOST_FAILURES = 32
"""Episodes in a row that an environment or tool may fail; then the run stops."""
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

        def finished(position: int, group: Group) -> None:
            if position < count:
                on_group(position, group)

        return generate(self.engine, prompts, params, seeds, finished)[:count]

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
    ) -> None:
        self.engine, self.kinds, self.chats, self.settings = engine, kinds, chats, settings
        self._max_episode, self._max_prompt, self._interrupted = max_episode_tokens, max_prompt_tokens, interrupted
        names = kinds or {"": None}
        self._tools = {
            name: {tool.name: tool for tool in (*tools, *(kind.tools if kind else ()))} for name, kind in names.items()
        }
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
        players = [
            [Player(self, prompt, seed, params) for seed in own]
            for prompt, own in zip(prompts[:count], seeds, strict=False)
        ]
        self._lend([player for group in players for player in group])
        turns = Turns(sum(map(len, players)), self._interrupted)

        async def play_group(n: int) -> None:
            groups[n].episodes = await asyncio.gather(*(p.play((n, i), turns) for i, p in enumerate(players[n])))
            on_group(n, groups[n])

        self._running = [self._calls.episodes.submit(play_group(n)) for n in range(count)]
        try:
            self.engine.sample((), params, turns.finished, turns.take)
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
            self._failures = self._failures + 1 if episode.finish_reason == "environment" else 0
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
                    is_lost = episode.finish_reason == "timeout"
                    pool[self.name_of(group.prompt)].append(None if is_lost else episode.environment)
                episode.environment = None
        for name, free in self._pool.items():
            pool[name] += free[len(pool[name]) :]
        self._pool = pool

    def close(self) -> None:
        """Close all instances that have ``close``."""
        for free in self._pool.values():
            for instance in free:
                if callable(close := getattr(instance, "close", None)):
                    close()
        self._calls.close()

    def name_of(self, prompt: Prompt) -> str:
        """Which class of environments a row has."""
        return kind_name(self.kinds, prompt.columns)

    def _lend(self, players: Sequence[Player]) -> None:
        """The k-th episode of a class gets its k-th instance, so that a run does not depend on which was free first."""
        used = dict.fromkeys(self._pool, 0)
        for player in players:
            if self.kinds:
                free, k = self._pool[player.name], used[player.name]
                player.environment = free[k] if k < len(free) else None
                used[player.name] += 1


def kind_name(kinds: Mapping[str, Kind], row: Mapping[str, Any]) -> str:
    """The name of a row's class of environments. ConfigError if there is none of that name."""
    if not kinds or "" in kinds:
        return ""
    if (name := row.get("environment")) not in kinds:
        raise ConfigError(
            f"environment.factory: a row has {name!r:.80} in its column `environment`; there are {', '.join(kinds)}"
        )
    return str(name)


class Player:
    """Plays one episode.

    Attributes:
        environment: its instance; None until one is made.
    """

    def __init__(self, loop: ToolLoop, prompt: Prompt, seed: int, params: SamplingParams) -> None:
        self._loop, self._prompt, self._seed, self._settings = loop, prompt, seed, loop.settings
        self.name = loop.name_of(prompt)
        self._kind, self._chat, self._tools = loop.kinds.get(self.name), loop.chats[self.name], loop._tools[self.name]
        self._lengths = Lengths(params.max_completion_tokens, loop._max_episode)
        self.environment: Any = None
        self._seconds = 0.0
        self._error = ""

    async def play(self, key: Key, turns: Turns) -> Episode:
        """The whole episode. Whatever a tool or environment does, it ends with a reason."""
        talk: Conversation | None = None
        own: dict[str, Any] = {}
        try:
            try:
                prompt = await self._begin()
                talk = Conversation(
                    prompt, self._seed, self._chat, self._settings, self._lengths, lambda r: turns.complete(key, r)
                )
                await self._talk(talk)
                reason = "stop"
            except Ended as ended:
                reason = ended.reason
            if self._kind and self._kind.has_reward and reason not in ("environment", "timeout"):
                own[self._kind.name] = await self._reward()
        finally:
            turns.ended()
        if talk is None:
            talk = Conversation(self._prompt, self._seed, self._chat, self._settings, self._lengths, None)
        if self._error:
            talk.messages.append({"role": "environment", "content": self._error})
        counts = {
            "turns": 0,
            "calls": 0,
            "bad_calls": 0,
            "failures": 0,
            "cut_results": 0,
            "seconds": self._seconds,
            **talk.counts,
        }
        return Episode(
            [talk.sample], talk.text, reason, messages=talk.messages, counts=counts, own_rewards=own,
            environment=self.environment, prompt=None if talk.prompt is self._prompt else replace(talk.prompt, columns={}),
        )  # fmt: skip

    async def _talk(self, talk: Conversation) -> None:
        while True:
            reply = await talk.generate()
            if not reply.calls:
                return
            for i, call in enumerate(reply.calls):
                if talk.counts["calls"] == self._settings.max_tool_calls:
                    raise Ended("tool_calls")
                talk.counts["calls"] += 1
                name, text = await self._run(call, talk)
                talk.answer(i, name, text)

    async def _begin(self) -> Prompt:
        """An instance, reset with the row; the prompt with what it has to say."""
        if self._kind is None:
            return self._prompt
        row = {"prompt": self._prompt.messages, **self._prompt.columns}
        if "" not in self._loop.kinds:
            del row["environment"]
        try:
            if self.environment is None:
                self.environment = await self._call(self._kind.make, {})
            said = await self._call(self.environment.reset, row)
            return self._prompt_with(said)
        except CallFailed as error:
            raise self._failed(f"reset: {error}") from None

    def _prompt_with(self, said: Any) -> Prompt:
        messages = [dict(message) for message in self._prompt.messages or []]
        if said is None or said == "" or said == []:
            return self._prompt
        if isinstance(said, list) and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in said):
            more = [{**message, "content": text_of(message.get("content"))} for message in said]
            text, ids = self._chat.prompt_with(messages, more)
            messages += more
        else:
            more = text_of(said)
            text, ids = self._chat.prompt(messages, more)
            messages[-1]["content"] += more
        if len(ids) > self._loop._max_prompt:
            raise CallFailed(
                f"with its text the prompt has {len(ids)} tokens, more than data.max_prompt_tokens={self._loop._max_prompt}"
            )
        return replace(self._prompt, text=text, token_ids=ids, messages=messages)

    async def _run(self, call: Call, talk: Conversation) -> tuple[str, str]:
        """Name and result of a call, as text for the model."""
        counts, started = talk.counts, self._seconds
        tool = self._tools.get(call.name)
        try:
            if call.error:
                raise BadCall(f"this call cannot be read: {call.error}")
            if tool is None:
                raise BadCall(f"there is no tool {call.name}; there are {', '.join(self._tools)}")
            arguments = tool.checked(call.arguments)
        except BadCall as error:
            counts["bad_calls"] += 1
            if self._settings.on_bad_call == "end":
                raise Ended("parse_error") from None
            return call.name, _error(str(error))
        try:
            function = tool.function or getattr(self.environment, tool.name)
            return tool.name, text_of(await self._call(function, arguments))
        except CallFailed as error:
            counts["failures"] += 1
            counts[f"{tool.name}/failures"] += 1
            if self._settings.on_error == "end":
                raise self._failed(f"{tool.name}: {error}") from None
            return tool.name, _error(str(error))
        finally:
            counts[f"{tool.name}/calls"] += 1
            counts[f"{tool.name}/seconds"] += self._seconds - started  # pyright: ignore[reportArgumentType]

    async def _reward(self) -> Any:
        """What ``get_reward`` gave; an exception if it failed, for ``rewards.on_error``."""
        try:
            return await self._call(self.environment.get_reward, {})
        except (CallFailed, Ended) as error:
            return RuntimeError(f"get_reward: {error}")

    async def _call(self, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Call it, within the deadlines of a call and of the episode's calls together.

        Raises:
            CallFailed: it raised.
            Ended: a deadline passed.
        """
        left = self._settings.episode_timeout_s - self._seconds
        started = time.monotonic()
        try:
            return await self._loop._calls(function, arguments, min(left, self._settings.call_timeout_s))
        except CallTimeout:
            raise Ended("timeout") from None
        finally:
            self._seconds += time.monotonic() - started

    def _failed(self, error: str) -> Ended:
        self._error = error
        return Ended("environment")


def _error(text: str) -> str:
    return json.dumps({"error": text}, ensure_ascii=False)


def text_of(result: Any) -> str:
    """A result as the model reads it: a text as it is, text blocks joined, anything else as Python prints it.

    Raises:
        CallFailed: it holds blocks that are no text.
    """
    is_blocks = isinstance(result, list) and bool(result) and all(isinstance(b, dict) and "type" in b for b in result)
    if not is_blocks:
        return str(result)
    if other := [block["type"] for block in result if block["type"] != "text"]:
        raise CallFailed(f"a block of type {other[0]!r} is not supported; return text")
    return "".join(str(block.get("text", "")) for block in result)
