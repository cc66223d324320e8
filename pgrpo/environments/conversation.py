"""One branch of an episode, token by token.

What was sampled stays as it was sampled, and what the model is told is appended (``Chat.told``). Where that would show the model
another history than a chat server does, because the template writes earlier turns in another way once there is a new message, the
history is rendered anew and begins another sample of the episode (``environment.history``). Earlier turns are context there, which
is not trained on again; the forest computes once what both samples begin with.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

from pgrpo.config.task import EnvironmentConfig
from pgrpo.environments.chat import CUT, Chat, TemplateProblem, call_id
from pgrpo.environments.long_form import Ended
from pgrpo.environments.parsing import Call, Reply
from pgrpo.environments.written import Written, each_text, image_parts, moved, texts_of, with_images
from pgrpo.types import Completion, Image, Messages, Prompt, PromptImages, Request, Sample
from pgrpo.vision.parts import Content, images_in

LONGEST_TOKEN = 64
"""Characters; few tokens are longer. A text of more than this for each token that it may take is cut before it is tokenized."""
TRIES = 8
"""Times that texts are cut, the longest first, before the episode ends: a shorter text may take more tokens than its part took."""


@dataclass(frozen=True)
class Lengths:
    """Limits in tokens: of a turn, and of each sample of an episode behind its prompt."""

    turn: int
    episode: int


class Transcript:
    """The tokens and messages of one branch of an episode.

    Args:
        prompt: of the episode, which an environment may have written to.
        seed: of the episode; turns have seeds that follow from it, the first turn this one.
        chat: the template with the episode's tools.
        complete: asks the engine; None for an episode that never began.

    Attributes:
        samples: what is trained on; the last one goes on.
        messages: what was said behind the prompt.
        text: of the last turn, for rewards.
        counts: numbers for metrics, of all branches.
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
        self.samples = [Sample(prompt.token_ids, [], [], [], images=prompt.images)]
        self._unexpanded = list(prompt.images.unexpanded_ids if prompt.images else prompt.token_ids)
        """The tokens of the last sample with one an image."""
        self.messages: Messages = []
        self.inherited = 0  # of them, those of the branch that it began in
        self.text = ""
        self.counts: Counter[str] = Counter()
        self._names: list[str] = []  # of the tools that the last turn called
        self._first_call = 0  # the number of the first of them in the episode
        self._told: Messages = []  # what the model has yet to read
        self._read = 0  # tokens of the last sample with which the model's last turn ended

    @property
    def sample(self) -> Sample:
        return self.samples[-1]

    @property
    def is_new(self) -> bool:
        """Whether the model has not had a turn here."""
        return not self.sample.token_ids

    def fork(self) -> Transcript:
        """Another branch behind all that was said here. It counts with this one."""
        other = Transcript(self.prompt, self._seed, self._chat, self._settings, self._lengths, self._complete)
        sample = self.sample
        other.samples = [_context(sample.prompt_ids, sample.token_ids, sample.images)]
        other._unexpanded = list(self._unexpanded)
        other.messages, other.counts, other.text = list(self.messages), self.counts, self.text
        other.inherited = len(self.messages)
        other._names, other._first_call, other._told = list(self._names), self._first_call, list(self._told)
        other._read = self._read
        return other

    def behind(self, prompt: Prompt) -> Transcript:
        """The same, nothing said yet, behind another prompt."""
        other = Transcript(prompt, self._seed, self._chat, self._settings, self._lengths, self._complete)
        other.counts = self.counts
        return other

    async def generate(self) -> Reply:
        """The model's next turn, behind all that was said.

        Raises:
            Ended: a limit does not allow another turn, or cut this one: then its calls must not run.
        """
        if self.counts["turns"] == self._settings.max_turns:
            raise Ended("turns")
        if self._told:
            self._listen()
        sample = self.sample
        room = self._lengths.episode - len(sample.token_ids)
        if room <= 0:
            raise Ended("length")
        ids = sample.prompt_ids + sample.token_ids
        images = sample.images and replace(sample.images, unexpanded_ids=list(self._unexpanded))
        request = Request(ids, [self._turn_seed()], min(room, self._lengths.turn), images, self._read)
        assert self._complete is not None
        completion = await self._complete(request)
        sample.token_ids += completion.token_ids
        self._unexpanded += completion.token_ids
        self._read = len(ids) + len(completion.token_ids)
        sample.mask += [True] * len(completion.token_ids)
        sample.rollout_logprobs += completion.rollout_logprobs
        sample.weights_version = completion.weights_version
        sample.turns += [self.counts["turns"]] * len(completion.token_ids)
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

    def answer(self, call: int, name: str, content: Content) -> None:
        """The result of a call of the last turn, which the model reads before its next turn."""
        message = {"role": "tool", "name": name, "tool_call_id": call_id(self._first_call + call), "content": content}
        self.messages.append(message)
        self._told.append(message)

    def say(self, message: dict[str, Any]) -> None:
        """A message that the model reads before its next turn."""
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

    def _listen(self) -> None:
        """Read what was told: append it, or begin a sample with the history as the template writes it now."""
        history = self._settings.history
        is_forked = history == "fork" or (history is None and any(m["role"] != "tool" for m in self._told))
        if is_forked and self._is_rewritten():
            self._begin_again()
        else:
            try:
                told = self._fitting(self._tell, len(self.sample.token_ids))
            except TemplateProblem as problem:
                if history != "fork":
                    raise RuntimeError(f"the chat template failed on row {self.prompt.index}: {problem}") from problem
                self._begin_again()
            else:
                self._read_on(told)
        self._told = []

    def _read_on(self, told: Written) -> None:
        """Append what the model was told to its sample."""
        sample, count = self.sample, len(told.ids)
        at = len(sample.prompt_ids) + len(sample.token_ids)
        sample.token_ids += told.ids
        sample.mask += [False] * count
        sample.rollout_logprobs += [0.0] * count
        sample.turns += [-1] * count
        self._unexpanded += told.unexpanded
        if told.images:
            before = sample.images.images if sample.images else ()
            sample.images = self._gathered([*before, *(moved(image, at) for image in told.images)], at + count)
            if (
                self._chat.sees_whole_images
            ):  # rows of an image see what is kept of the turns before, which has no rows any more
                self._read = 0

    def _gathered(self, images: Sequence[Image], length: int) -> PromptImages | None:
        where = self.prompt.images.where if self.prompt.images else f"row {self.prompt.index}"
        return self._chat.reader and self._chat.reader.gathered(images, [], length, where)

    def _is_rewritten(self) -> bool:
        said = [*(self.prompt.messages or []), *self.messages]
        return self._chat.rewrites(self.prompt.text, said[: len(said) - len(self._told)], self._told)

    def _begin_again(self) -> None:
        prompt = self.prompt.token_ids

        def write() -> Written:
            return self._chat.prompt_with(self.prompt.messages or [], self.messages)

        whole = self._fitting(write, 0, len(prompt))
        same = next((i for i, (a, b) in enumerate(zip(whole.ids, prompt, strict=False)) if a != b), len(prompt))
        # Samples of a group share one list; a template that writes the prompt in another way now shares less.
        prompt_ids = prompt if same == len(prompt) else whole.ids[: max(1, same)]
        images = self._gathered(whole.images, len(whole.ids))
        self.samples.append(_context(prompt_ids, whole.ids[len(prompt_ids) :], images))
        self._unexpanded, self._read = list(whole.unexpanded), 0
        self.counts["rewritten"] += 1

    def _fitting(self, make: Callable[[], Written], used: int, free: int = 0) -> Written:
        """What ``make`` writes of what the model is told, cut so that another turn fits (``environment.overlong``): the longest
        text first; where no text is that long, the last images are left out, as many as it takes.

        Args:
            used: tokens of the episode's limit that are in front of it.
            free: its first tokens that are under no limit.
        """
        room = self._lengths.episode - used
        most = max(room - self._lengths.turn, room // 2)
        is_cut = self._settings.overlong == "cut" and self._cut_endless(LONGEST_TOKEN * max(most, 1))
        self.counts["cut_results"] += is_cut
        written = make()
        if (count := len(written.ids) - free) <= most or (self._settings.overlong == "end" and count < room):
            return written
        if self._settings.overlong == "end":
            raise Ended("length")
        self.counts["cut_results"] += not is_cut
        for _ in range(TRIES):
            if not self._cut_text(count - most, most) and not self._leave_out(lambda: len(make().ids) - free <= most):
                break
            if (count := len((written := make()).ids) - free) <= most:
                return written
        raise Ended("length")

    def _cut_endless(self, most: int) -> bool:
        """Cut texts of more than so many characters. Whether there were any."""

        def shorter(text: str) -> str:
            return text[:most] + CUT if len(text) > most else text

        before = [message["content"] for message in self._told]
        for message in self._told:
            message["content"] = each_text(message["content"], shorter)
        return before != [message["content"] for message in self._told]

    def _cut_text(self, over: int, most: int) -> bool:
        """Make the longest text that the model is told at least ``over`` tokens shorter, if it is that long."""
        longest = max(self._told, key=lambda message: len(texts_of(message["content"])))
        content = longest["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        texts = [part for part in parts if part["type"] == "text"]
        text = max(texts, key=lambda part: len(part["text"]), default=None)
        if not text or (shorter := self._chat.shorter(text["text"], over, most)) is None:
            return False
        parts = [part | {"text": shorter} if part is text else part for part in parts]
        longest["content"] = parts[0]["text"] if isinstance(content, str) else parts
        return True

    def _leave_out(self, fits: Callable[[], bool]) -> bool:
        """Leave out the last images that the model is told, as few as it takes or all, with one note a message. Whether there
        were any."""
        before = [message["content"] for message in self._told]
        count = len(image_parts(self._told))

        def fits_with(left_out: int) -> bool:
            first = count - left_out
            for message, content in zip(self._told, before, strict=True):
                message["content"] = with_images(content, first)
                first -= len(images_in(content))
            return fits()

        if count:
            fits_with(1 + bisect_left(range(1, count), True, key=fits_with))
        return count > 0

    def _tell(self) -> Written:
        sampled = self.sample.token_ids
        end, written = self._chat.told(self._names, self._told)
        # The model may have ended its turn with another end token, or with a stop string.
        return written if sampled and sampled[-1] == end else written.behind([end])


def _context(prompt_ids: list[int], token_ids: Sequence[int], images: PromptImages | None) -> Sample:
    """A sample of tokens that the model reads."""
    count = len(token_ids)
    return Sample(prompt_ids, list(token_ids), [False] * count, [0.0] * count, turns=[-1] * count, images=images)


def _function(call: Call) -> dict[str, Any]:
    return {"name": call.name, "arguments": {name: _plain(value) for name, value in call.arguments.items()}}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, str) else value
