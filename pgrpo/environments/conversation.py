"""One episode's conversation, token by token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from pgrpo.config.schema import EnvironmentConfig
from pgrpo.environments.chat import Chat, TemplateProblem, call_id
from pgrpo.environments.parsing import Call, Reply
from pgrpo.types import Completion, FinishReason, Messages, Prompt, Request, Sample

TRIES = 8
"""Times that texts are cut, the longest first, before the episode ends: a shorter text may take more tokens than its part took."""


class Ended(Exception):
    """The episode has ended; ``reason`` says why."""

    def __init__(self, reason: FinishReason) -> None:
        super().__init__(reason)
        self.reason: FinishReason = reason


@dataclass(frozen=True)
class Lengths:
    """Limits in tokens: of a turn, and of an episode behind its prompt."""

    turn: int
    episode: int


class Conversation:
    """The tokens and messages of one episode.

    Args:
        prompt: of the episode, which an environment may have written to.
        seed: of the episode; turns have seeds that follow from it, the first turn this one.
        chat: the template with the episode's tools.
        complete: asks the engine; None for an episode that never began.

    Attributes:
        messages: what was said behind the prompt.
        text: of the last turn, for rewards.
        counts: numbers for metrics.
    """

    def __init__(
        self,
        prompt: Prompt,
        seed: int,
        chat: Chat,
        settings: EnvironmentConfig,
        lengths: Lengths,
        complete: Callable[[Request], Awaitable[Completion]] | None,
    ) -> None:
        self.prompt, self._seed, self._chat = prompt, seed, chat
        self._settings, self._lengths, self._complete = settings, lengths, complete
        self.sample = Sample(prompt.token_ids, [], [], [])
        self.messages: Messages = []
        self.text = ""
        self.counts: Counter[str] = Counter()
        self._names: list[str] = []  # of the tools that the last turn called
        self._first_call = 0  # the number of the first of them in the episode
        self._told: Messages = []  # what the model has yet to read

    async def generate(self) -> Reply:
        """The model's next turn, behind all that was said.

        Raises:
            Ended: a limit does not allow another turn, or cut this one: then its calls must not run.
        """
        if self.counts["turns"] == self._settings.max_turns:
            raise Ended("turns")
        sample = self.sample
        if self._told:
            self._read(self._fitting())
        room = self._lengths.episode - len(sample.token_ids)
        if room <= 0:
            raise Ended("length")
        ids = sample.prompt_ids + sample.token_ids
        request = Request(ids, [self._turn_seed()], min(room, self._lengths.turn))
        assert self._complete is not None
        completion = await self._complete(request)
        sample.token_ids += completion.token_ids
        sample.mask += [True] * len(completion.token_ids)
        sample.rollout_logprobs += completion.rollout_logprobs
        sample.weights_version = completion.weights_version
        self.counts["turns"] += 1
        self.text = completion.text
        if completion.finish_reason == "length":
            self.messages.append({"role": "assistant", "content": completion.text})
            raise Ended("length")
        reply = self._chat.parse(completion.token_ids, ids)
        self._first_call += len(self._names)  # ids of calls count over the episode
        self._names = [call.name for call in reply.calls]
        self.messages.append(self._message(reply))
        return reply

    def answer(self, call: int, name: str, content: str) -> None:
        """The result of a call of the last turn, which the model reads before its next turn."""
        message = {"role": "tool", "name": name, "tool_call_id": call_id(self._first_call + call), "content": content}
        self.messages.append(message)
        self._told.append(message)

    def _message(self, reply: Reply) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": reply.content}
        if reply.reasoning:
            message["reasoning_content"] = reply.reasoning
        if reply.calls:
            message["tool_calls"] = [
                {"type": "function", "id": call_id(self._first_call + i), "function": _function(call)}
                for i, call in enumerate(reply.calls)
            ]
        return message

    def _turn_seed(self) -> int:
        if not (turn := self.counts["turns"]):
            return self._seed
        return int.from_bytes(blake2b(f"{self._seed}/{turn}".encode(), digest_size=8).digest(), "little") >> 1

    def _read(self, ids: Sequence[int]) -> None:
        """Append tokens that the model reads and did not sample."""
        self.sample.token_ids += ids
        self.sample.mask += [False] * len(ids)
        self.sample.rollout_logprobs += [0.0] * len(ids)
        self._told = []

    def _fitting(self) -> list[int]:
        """The ids of what the model is told, cut so that another turn fits (``environment.overlong``)."""
        room = self._lengths.episode - len(self.sample.token_ids)
        most = max(room - self._lengths.turn, room // 2)
        ids = self._ids()
        if len(ids) <= most or (self._settings.overlong == "end" and len(ids) < room):
            return ids
        if self._settings.overlong == "end":
            raise Ended("length")
        self.counts["cut_results"] += 1
        for _ in range(TRIES):
            longest = max(self._told, key=lambda message: len(message["content"]))
            shorter = self._chat.shorter(longest["content"], len(ids) - most, most)
            if shorter is None:
                raise Ended("length")
            longest["content"] = shorter
            if len(ids := self._ids()) <= most:
                return ids
        raise Ended("length")

    def _ids(self) -> list[int]:
        sampled = self.sample.token_ids
        try:
            end, ids = self._chat.told(self._names, self._told)
        except TemplateProblem as problem:
            raise RuntimeError(f"the chat template failed on row {self.prompt.index}: {problem}") from problem
        # The model may have ended its turn with another end token, or with a stop string.
        return ids if sampled and sampled[-1] == end else [end, *ids]


def _function(call: Call) -> dict[str, Any]:
    return {"name": call.name, "arguments": {name: _plain(value) for name, value in call.arguments.items()}}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, str) else value
