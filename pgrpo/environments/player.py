"""Plays one episode: the environment's reset, turns of the model, its calls, and what ends it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pgrpo.config.task import EnvironmentConfig
from pgrpo.data.images import place
from pgrpo.environments.calls import CallFailed, Calls, CallTimeout, Function, WorkerDied
from pgrpo.environments.chat import Chat
from pgrpo.environments.content import content_of, said_at_reset
from pgrpo.environments.conversation import Lengths, Transcript
from pgrpo.environments.long_form import Ended
from pgrpo.environments.parsing import Call, Reply
from pgrpo.environments.remote import step_of
from pgrpo.environments.shown import Shown
from pgrpo.environments.tools import BadCall, Kind, Tool
from pgrpo.environments.turns import Key, Turns
from pgrpo.environments.written import image_parts, joined
from pgrpo.types import Episode, FinishReason, Messages, Prompt, Sample
from pgrpo.vision.parts import Content, with_marks


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
        self._stage, self._seed, self._settings = stage, seed, stage.settings
        self._kind, self._chat, self._lengths = stage.kind, stage.chat, stage.lengths
        self._row, self._prompt = prompt, _in_parts(prompt)
        self._limits = self._chat.reader and self._chat.reader.limits
        self._shown = Shown(stage.settings.max_images, stage.chat.reader)
        self.environment: Any = None
        self._seconds = 0.0
        self._error = ""

    async def play(self, key: Key, turns: Turns) -> Episode:
        """The whole episode. Whatever a tool or environment does, it ends with a reason."""
        self._branches: list[Transcript] = []
        own: dict[str, Any] = {}
        values: list[float] = []
        try:
            try:
                prompt = await self._begin()
                talk = Transcript(
                    prompt, self._seed, self._chat, self._settings, self._lengths, lambda r: turns.complete(key, r)
                )
                self._branches.append(talk)
                if self._kind and self._kind.is_long:
                    reason = await self._converse(talk)
                else:
                    await self._talk(talk)
                    reason: FinishReason = "stop"
            except Ended as ended:
                reason = ended.reason
            if self._kind and self._kind.has_reward and reason not in ("environment", "timeout"):
                own[self._kind.name], values = await self._reward()
        finally:
            turns.ended()
        talk = (
            self._branches[0]
            if self._branches
            else Transcript(self._prompt, self._seed, self._chat, self._settings, self._lengths, None)
        )
        messages = self._messages(talk)
        if self._error:
            messages.append({"role": "environment", "content": self._error})
        counts = {
            "turns": 0,
            "calls": 0,
            "bad_calls": 0,
            "failures": 0,
            "cut_results": 0,
            "rewritten": 0,
            "seconds": self._seconds,
            **talk.counts,
        }
        return Episode(
            _trained(self._branches or [talk]), talk.text, reason, messages=messages, counts=counts, own_rewards=own,
            environment=self.environment, prompt=None if talk.prompt is self._prompt else _as_row(talk.prompt),
            turn_rewards=values,
        )  # fmt: skip

    def _messages(self, talk: Transcript) -> Messages:
        """What was said in all branches, one behind the other."""
        messages = list(talk.messages)
        for number, branch in enumerate(self._branches[1:], 1):
            messages.append({"role": "environment", "content": f"branch {number}"})
            messages += branch.messages[branch.inherited :]
        return messages

    async def _talk(self, talk: Transcript) -> Reply:
        """Turns of the model, with the results of its calls, until it calls nothing. Returns the last one."""
        while True:
            reply = await talk.generate()
            if not reply.calls:
                return reply
            for i, call in enumerate(reply.calls):
                if talk.counts["calls"] == self._settings.max_tool_calls:
                    raise Ended("tool_calls")
                talk.counts["calls"] += 1
                name, content = await self._run(call, talk)
                talk.answer(i, name, content)

    async def _converse(self, talk: Transcript) -> FinishReason:
        """Let the environment lead: it asks for turns and branches until its ``converse`` returns."""
        begun = _as_row(talk.prompt).messages or []
        step = step_of(self.environment, [dict(message) for message in begun], self._limits)
        answer, reached = None, None
        while True:
            try:
                said = await self._call(step, {"answer": answer})
                if isinstance(said, str):  # a limit that it was told of and that it ended at
                    return reached if said == "stop" and reached else said  # pyright: ignore[reportReturnType]
                answer = await self._answer(said)
            except CallFailed as error:
                raise self._failed(f"converse: {error}") from None
            reached = answer.get("ended") or reached

    async def _answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """What a conversation that is led asks for."""
        talk = self._branches[question["branch"]]
        for message in question["say"]:
            talk.say({**message, "content": await self._content(message["content"])})
        if question["do"] == "fork":
            self._branches.append(talk.fork())
            return {"branch": len(self._branches) - 1}
        if talk.is_new and talk.messages:  # it spoke before the model's first turn: that belongs to the prompt
            self._branches[question["branch"]] = talk = talk.behind(self._prompt_after(talk.prompt, talk.messages))
        seen, said, ended = len(talk.messages), Reply("", "", []), None
        try:
            said = await self._talk(talk)
        except Ended as limit:
            if limit.reason in ("environment", "timeout"):
                raise
            ended = limit.reason
        return {
            "content": said.content,
            "reasoning": said.reasoning,
            "messages": talk.messages[seen:],
            "ended": ended,
        }

    async def _begin(self) -> Prompt:
        """An instance, reset with the row; the prompt with what it has to say."""
        if self._kind is None:
            return self._prompt
        row = {"prompt": self._row.messages, **self._row.columns}
        if self._stage.is_chosen:
            del row["environment"]
        try:
            if self.environment is None:
                self.environment = await self._call(self._kind.make, {})
            said = await self._call(self.environment.reset, row) if self._kind.abilities["can_reset"] else None
            if said is not None and not isinstance(said, str):
                said = await self._call(said_at_reset, {"said": said, "limits": self._limits})
            if not said:
                return self._prompt
            if isinstance(said, list) and "role" in said[0]:
                more = [{**message, "content": await self._content(message["content"])} for message in said]
                return self._prompt_after(self._prompt, more)
            return self._prompt_after(self._prompt, await self._content(said))
        except CallFailed as error:
            raise self._failed(f"reset: {error}") from None

    def _prompt_after(self, prompt: Prompt, more: Messages | Content) -> Prompt:
        """The prompt with further messages, or with more in its last one."""
        messages = [dict(message) for message in prompt.messages or []]
        if isinstance(more, list) and more and "role" in more[0]:
            written = self._chat.prompt_with(messages, more)
            messages += more
        else:
            written = self._chat.prompt(messages, more)
            messages[-1]["content"] = joined(messages[-1]["content"], more)
        if (count := len(written.ids)) > self._stage.max_prompt_tokens:
            raise CallFailed(
                f"with its text the prompt has {count} tokens, more than data.max_prompt_tokens={self._stage.max_prompt_tokens}"
            )
        images, reader = None, self._chat.reader
        if reader is not None:
            where = prompt.images.where if prompt.images else f"row {prompt.index}"
            images = reader.gathered(written.images, written.unexpanded, count, where)
        return replace(prompt, text=written.text, token_ids=written.ids, messages=messages, images=images)

    async def _content(self, result: Any) -> Content:
        """What a tool or environment gave, as the model is shown it. Raises as ``Shown`` does."""
        if isinstance(result, str):
            return content_of(result)
        # It runs the user's code, as `__str__`: its errors and its time are those of a call.
        return await self._shown(await self._call(content_of, {"result": result, "limits": self._limits}))

    async def _run(self, call: Call, talk: Transcript) -> tuple[str, Content]:
        """Name and result of a call, as the model is shown it."""
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
            return tool.name, await self._content(await self._call(function, arguments))
        except CallFailed as error:
            counts["failures"] += 1
            counts[f"{tool.name}/failures"] += 1
            if self._settings.on_error == "end" or isinstance(error, WorkerDied):
                raise self._failed(f"{tool.name}: {error}") from None
            return tool.name, _error(str(error))
        finally:
            counts[f"{tool.name}/calls"] += 1
            counts[f"{tool.name}/seconds"] += self._seconds - started  # pyright: ignore[reportArgumentType]

    async def _reward(self) -> tuple[Any, list[float]]:
        """What the environment gave for the episode, and for each turn; an exception if it failed, for ``rewards.on_error``."""
        has, reward = (self._kind.abilities if self._kind else {}), 0.0
        values: list[float] = []
        try:
            if has["has_turn_rewards"]:
                values = [float(value) for value in await self._call(self.environment.get_turn_rewards, {})]
            if has["has_reward"]:
                reward = await self._call(self.environment.get_reward, {})
            if values:
                reward = math.fsum(values) + (reward or 0.0)
        except (CallFailed, Ended, TypeError, ValueError) as error:
            return RuntimeError(f"get_reward: {error}"), []
        return reward, values

    async def _call(self, function: Function, arguments: dict[str, Any]) -> Any:
        """Call it, within the deadlines of a call and of the episode's calls together.

        Raises:
            CallFailed: it raised.
            Ended: a deadline passed.
        """
        left = min(self._settings.episode_timeout_s - self._seconds, self._settings.call_timeout_s)
        started = time.monotonic()
        try:
            return await self._stage.call(function, arguments, left)
        except CallTimeout as timeout:
            self._error = f"a call took longer than {left:.3g} s{timeout}"
            raise Ended("timeout") from None
        finally:
            self._seconds += time.monotonic() - started

    def _failed(self, error: str) -> Ended:
        self._error = error
        return Ended("environment")


def _in_parts(prompt: Prompt) -> Prompt:
    """The prompt with its images as parts of its messages."""
    if prompt.images is None:
        return prompt
    messages = place(prompt.messages or [], len(prompt.images.images), prompt.images.where)
    for part, image in zip(image_parts(messages), prompt.images.images, strict=True):
        part |= {"size": image.size, "key": image.key}
    return replace(prompt, messages=messages)


def _as_row(prompt: Prompt) -> Prompt:
    """The prompt with texts in its messages, in which marks stand for images; without columns."""
    messages = [{**message, "content": with_marks(message["content"])} for message in prompt.messages or []]
    return replace(prompt, columns={}, messages=messages)


def _trained(branches: Sequence[Transcript]) -> list[Sample]:
    """The samples in which the model said something; one at least."""
    samples = [sample for branch in branches for sample in branch.samples]
    return [sample for sample in samples if any(sample.mask)] or samples[:1]


def _error(text: str) -> str:
    return json.dumps({"error": text}, ensure_ascii=False)
