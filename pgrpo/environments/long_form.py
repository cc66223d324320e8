"""The long form of an environment: an async method ``converse`` that is given a ``Conversation`` and leads it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, NoReturn, get_args

from pgrpo.config.task import ImageConfig
from pgrpo.environments.calls import CallFailed
from pgrpo.environments.content import content_of
from pgrpo.types import FinishReason, Messages

Ask = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
"""Puts a question to the trainer and waits for its answer."""


class Ended(Exception):
    """The episode has ended; ``reason`` says why."""

    def __init__(self, reason: FinishReason) -> None:
        super().__init__(reason)
        self.reason: FinishReason = reason


class Said(NamedTuple):
    """A turn of the model. ``content`` is what is neither reasoning nor a call."""

    content: str
    reasoning: str


class Conversation:
    """One branch of an episode.

    Attributes:
        messages: all that was said, with the prompt's messages.
    """

    def __init__(self, ask: Ask, messages: Messages, branch: int = 0, limits: ImageConfig | None = None) -> None:
        self.messages, self._ask, self._branch, self._limits = messages, ask, branch, limits
        self._unheard: Messages = []

    async def generate(self) -> Said:
        """The model's next turn, behind all that was said. Tools that it calls run, and it goes on, until it calls none.

        Raises:
            Ended: a limit of the episode was reached, or a tool or deadline ended it. Leave it to end the episode.
        """
        answer = await self._put("generate")
        self.messages += answer["messages"]
        if answer["ended"]:
            raise Ended(answer["ended"])
        return Said(answer["content"], answer["reasoning"])

    def say(self, message: str | dict[str, Any]) -> None:
        """Tell the model something before its next turn: a text of the user, or a message with ``role`` and ``content``. A content
        is a text, a PIL image, or a list of blocks as of a tool."""
        if isinstance(message, str):
            message = {"role": "user", "content": message}
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"a message has a role and a content, unlike {message!r:.80}")
        content = message.get("content")
        try:
            shown = content_of(content, self._limits)
        except CallFailed as error:
            raise ValueError(str(error)) from None
        if isinstance(shown, str) and not isinstance(content, str | list):
            raise ValueError(f"a message's content is a text, an image or blocks of both, unlike {message!r:.80}")
        message = {**message, "content": shown}
        self.messages.append(message)
        self._unheard.append(message)

    async def fork(self) -> Conversation:
        """A second branch that begins with all that was said here. Its turns are trained on as well, with the same reward."""
        answer = await self._put("fork")
        return Conversation(self._ask, [dict(message) for message in self.messages], answer["branch"], self._limits)

    def end(self, reason: FinishReason = "stop") -> NoReturn:
        """End the episode here, with a reason for metrics. Returning from ``converse`` does the same with ``stop``."""
        if reason not in get_args(FinishReason):
            raise ValueError(f"{reason!r} is no reason; there are {', '.join(get_args(FinishReason))}")
        raise Ended(reason)

    async def _put(self, do: str) -> dict[str, Any]:
        unheard, self._unheard = self._unheard, []
        return await self._ask({"do": do, "branch": self._branch, "say": unheard})


async def lead(converse: Callable[[Conversation], Awaitable[None]], conversation: Conversation) -> FinishReason:
    """Why the episode ended."""
    try:
        await converse(conversation)
    except Ended as ended:
        return ended.reason
    return "stop"


class Led:
    """A conversation that is led in this process, in steps from one question to the next. Lives on one event loop."""

    def __init__(
        self, converse: Callable[[Conversation], Awaitable[None]], messages: Messages, limits: ImageConfig | None
    ) -> None:
        self._converse, self._messages, self._limits = converse, messages, limits
        self._task: asyncio.Task[FinishReason] | None = None

    async def step(self, answer: dict[str, Any] | None) -> dict[str, Any] | FinishReason:
        """Answer the last question (None: there is none yet). Returns the next one, or why the episode ended."""
        if self._task is None:
            self._turn, self._questions = asyncio.Lock(), asyncio.Queue[dict[str, Any]]()
            self._task = asyncio.ensure_future(
                lead(self._converse, Conversation(self._ask, self._messages, limits=self._limits))
            )
        else:
            self._answer.set_result(answer)
        question = asyncio.ensure_future(self._questions.get())
        try:
            await asyncio.wait({self._task, question}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:  # its deadline passed
            self._task.cancel()
            question.cancel()
            raise
        if question.done():
            return question.result()
        question.cancel()
        return await self._task

    async def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        async with self._turn:  # branches may ask at the same time
            self._answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            self._questions.put_nowait(question)
            return await self._answer
