"""Plays one episode: the environment's reset, turns of the model, its calls, and what ends it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pgrpo.config.schema import EnvironmentConfig
from pgrpo.environments.calls import CallFailed, Calls, CallTimeout
from pgrpo.environments.chat import Chat
from pgrpo.environments.conversation import Conversation, Ended, Lengths
from pgrpo.environments.parsing import Call
from pgrpo.environments.tools import BadCall, Kind, Tool
from pgrpo.environments.turns import Key, Turns
from pgrpo.types import Episode, Prompt


@dataclass(frozen=True)
class Stage:
    """What the episodes of one class of environments have in common.

    Attributes:
        kind: the class; None for tools alone.
        is_chosen: whether a row's column ``environment`` chooses the class.
        tools: by name.
        max_prompt_tokens: of a prompt with what the environment adds to it.
        call: calls the user's functions.
    """

    kind: Kind | None
    is_chosen: bool
    chat: Chat
    tools: dict[str, Tool]
    settings: EnvironmentConfig
    lengths: Lengths
    max_prompt_tokens: int
    call: Calls


class Player:
    """Plays one episode.

    Attributes:
        environment: its instance; None until one is made.
    """

    def __init__(self, stage: Stage, prompt: Prompt, seed: int) -> None:
        self._stage, self._prompt, self._seed, self._settings = stage, prompt, seed, stage.settings
        self._kind, self._chat, self._lengths = stage.kind, stage.chat, stage.lengths
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
        if self._stage.is_chosen:
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
        if len(ids) > self._stage.max_prompt_tokens:
            raise CallFailed(
                f"with its text the prompt has {len(ids)} tokens, more than data.max_prompt_tokens={self._stage.max_prompt_tokens}"
            )
        return replace(self._prompt, text=text, token_ids=ids, messages=messages)

    async def _run(self, call: Call, talk: Conversation) -> tuple[str, str]:
        """Name and result of a call, as text for the model."""
        counts, started = talk.counts, self._seconds
        tool = self._stage.tools.get(call.name)
        try:
            if call.error:
                raise BadCall(f"this call cannot be read: {call.error}")
            if tool is None:
                raise BadCall(f"there is no tool {call.name}; there are {', '.join(self._stage.tools)}")
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
            return await self._stage.call(function, arguments, min(left, self._settings.call_timeout_s))
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
