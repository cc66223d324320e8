"""The chat template as token ids: prompts with their tools, and what stands between two turns of the model.

What the model sampled is never rendered or tokenized again. What it is told then (results of tools, messages) is the difference
of two renderings of a dummy conversation: all that the template writes behind the model's turn. The end of the turn is the first
of the model's end tokens there; it was sampled already, or is added in front where the model ended its turn otherwise. An image is
one placeholder in rendered text, and all of its tokens in ids.

``transitions.py`` tries what a run may need of a template, before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from pgrpo.data.control import MARK, Control, unmarked
from pgrpo.data.images import as_parts
from pgrpo.environments.parsing import Parse, Reply, own_template, split_reasoning
from pgrpo.environments.written import Written, each_text, image_parts, joined
from pgrpo.types import Messages
from pgrpo.vision.parts import Content
from pgrpo.vision.reader import ImageReader
from pgrpo.vision.rows import placeholder_runs

SENTINEL = "PROBE-OF-THE-TURN"
CUT = "\n[the rest is cut]"
USER = {"role": "user", "content": "?"}


class TemplateProblem(ValueError):
    """The template cannot do a transition; the message says what is wrong with it."""


class Chat:
    """The chat template of one set of tools.

    Args:
        tokenizer: of the model, with a chat template.
        end_ids: tokens that end a turn of the model.
        schemas: of the tools; may be empty.
        kwargs: ``prompt.chat_template_kwargs``.
        reader: expands images; None where prompts and results are text.

    Attributes:
        ends: texts of the tokens that end a turn -> their ids.
        by_template: parses a turn, where the tokenizer says how; None where it does not.
        family: parses a turn otherwise; None where no calls are read. Chosen by ``transitions.check_transitions``.
        one_call: whether the template renders no turn with several calls, as that found out too.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: Collection[int],
        schemas: Sequence[dict[str, Any]],
        kwargs: dict[str, Any],
        reader: ImageReader | None = None,
    ) -> None:
        self.tokenizer, self._kwargs, self.reader = tokenizer, kwargs, reader
        self.schemas: list[Any] = list(schemas)
        self.ends = {str(tokenizer.convert_ids_to_tokens(token)): token for token in end_ids}
        self._rows, self._others = Control(tokenizer, special_only=True), Control(tokenizer, special_only=False)
        self.by_template = own_template(tokenizer, schemas)
        self.family: Parse | None = None
        self.one_call = False

    @property
    def sees_whole_images(self) -> bool:
        """Whether an image's row sees the rows behind it in its image too."""
        return self.reader is not None and self.reader.processor.family.sees_whole_images

    def prompt(self, messages: Messages, more: Content) -> Written:
        """A prompt whose last message has ``more`` at its end, which the environment says."""
        guarded = [self._guarded(message, self._rows) for message in messages]
        guarded[-1]["content"] = joined(guarded[-1]["content"], each_text(more, self._others.guard))
        return self.written(self.render(guarded, generate=True), guarded)

    def prompt_with(self, messages: Messages, more: Messages) -> Written:
        """A prompt with further messages of the environment."""
        guarded = [self._guarded(message, self._rows) for message in messages]
        guarded += [self._guarded(message, self._others) for message in more]
        return self.written(self.render(guarded, generate=True), guarded)

    def written(self, text: str, messages: Messages, behind: str = "") -> Written:
        """``text``: rendered, with a placeholder for each image of the messages, in order. TemplateProblem if it has others."""
        ids, parts = self._others.encode(text, behind=behind), image_parts(messages)
        if self.reader is None or not parts:
            return Written(str(unmarked(text)), ids, ids, [])
        first, *rest = text.split(self.reader.placeholder)
        if len(rest) != len(parts):
            raise TemplateProblem(
                f"it writes {len(rest)} placeholders ({self.reader.placeholder}) for {len(parts)} images"
            )
        expansions = [self.reader.processor.expansion(tuple(part["size"])) for part in parts]
        expanded = first + "".join(one.text + piece for one, piece in zip(expansions, rest, strict=True))
        whole = self._others.encode(expanded, behind=behind)
        runs = placeholder_runs(whole, self.reader.processor.token_id, [one.counts for one in expansions])
        images = [self.reader.image_of(part, own) for part, own in zip(parts, runs, strict=True)]
        return Written(str(unmarked(text)), whole, ids, images)

    def rewrites(self, prompt: str, said: Messages, told: Messages) -> bool:
        """Whether the template writes what was said in another way once there are new messages: the prompt's text, the turns as it
        wrote them before, or the model's last reasoning, which it may leave out."""
        before, after = self.render(said, generate=False), self.render([*said, *told], generate=True)
        end = max((before.rfind(text) for text in self.ends), default=-1)
        reasoning = next((m.get("reasoning_content", "") for m in reversed(said) if m["role"] == "assistant"), "")
        kept = before if end < 0 else before[:end]
        return not (after.startswith(prompt) and after.startswith(kept) and reasoning in after)

    def told(self, names: Sequence[str], messages: Messages) -> tuple[int, Written]:
        """What the template writes between a turn of the model and its next one.

        Args:
            names: of the tools that the turn called; empty for a turn without calls.
            messages: what the model is told: a result for each call, in order, and others.

        Returns:
            The token that ends the turn, and what is written behind it.
        """
        guarded = [self._guarded(message, self._others) for message in messages]
        hidden = f"{SENTINEL[0]}{MARK}{SENTINEL[1:]}"
        for message in guarded:  # the probe's text is looked for below
            message["content"] = each_text(message["content"], lambda text: text.replace(SENTINEL, hidden))
        names = [
            name or self.schemas[0]["function"]["name"] for name in names
        ]  # a call that could not be read has none
        end, text = self.behind(turn_of(names[:1] if self.one_call else names), guarded)
        return self.ends[end], self.written(text, guarded, behind=end)

    def shorter(self, text: str, over: int, most: int) -> str | None:
        """The beginning of a text, at least ``over`` tokens shorter, with a note; None if nothing would be left of it.

        Args:
            most: tokens of which it keeps at most as many.
        """
        # A token of text is rarely longer than this; a text of megabytes is not tokenized whole for that.
        ids = self._others.encode(self._others.guard(text[: 32 * (over + most)]))
        note = len(self._others.encode(CUT))
        keep = min(len(ids) - over - note, most)
        if keep <= 0:
            return None
        return str(self.tokenizer.decode(ids[:keep], clean_up_tokenization_spaces=False)).rstrip("\ufffd") + CUT

    def parse(self, ids: Sequence[int], prompt_ids: Sequence[int]) -> Reply:
        """The parts of a turn that was sampled behind ``prompt_ids``, all tokens in front of it."""
        ids = list(ids[:-1] if ids and ids[-1] in self.ends.values() else ids)
        if self.by_template:
            return self.by_template(ids, list(prompt_ids))
        text = str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        before = str(self.tokenizer.decode(list(prompt_ids[-8:]), clean_up_tokenization_spaces=False))
        is_thinking = before.rstrip().endswith("<think>")
        if self.family is None:
            reasoning, content = split_reasoning(text, is_thinking)
            return Reply(content.strip() if reasoning else content, reasoning, [])
        return self.family(text, is_thinking)

    def behind(self, turn: dict[str, Any], guarded: Messages) -> tuple[str, str]:
        """The text of the token that ends a turn, and the rendered text behind it.

        Raises:
            TemplateProblem: there is none of the model's end tokens behind the turn.
        """
        full = self.render([USER, turn, *guarded], generate=True)
        start = full.rfind(SENTINEL) + len(SENTINEL)
        found = [(at, -len(text), text) for text in self.ends if (at := full.find(text, start)) >= 0]
        if start < len(SENTINEL) or not found:
            raise TemplateProblem(f"the turn does not end in one of the model's end tokens ({', '.join(self.ends)})")
        at, _, end = min(found)
        return end, full[at + len(end) :]

    def render(self, messages: Messages, *, generate: bool) -> str:
        messages = [  # templates call it by either name
            {**m, "thinking": m["reasoning_content"]} if m.get("reasoning_content") else m for m in messages
        ]
        if self.reader is not None:
            messages = [{**message, "content": as_parts(message)} for message in messages]
        return str(
            self.tokenizer.apply_chat_template(
                messages, tools=self.schemas or None, tokenize=False, add_generation_prompt=generate, **self._kwargs
            )  # pyright: ignore[reportArgumentType]
        )

    @staticmethod
    def _guarded(message: dict[str, Any], control: Control) -> dict[str, Any]:
        """The message with all that somebody wrote guarded; not names, which a template may compare."""
        names = [name for name in ("content", "reasoning_content") if message.get(name)]
        texts = {name: each_text(message[name], control.guard) for name in names}
        calls = [
            {**call, "function": {**call["function"], "arguments": _guard(call["function"]["arguments"], control)}}
            for call in message.get("tool_calls") or ()
        ]
        return {**message, **texts, **({"tool_calls": calls} if calls else {})}


def _guard(value: Any, control: Control) -> Any:
    """All texts in a value guarded."""
    if isinstance(value, str):
        return control.guard(value)
    if isinstance(value, dict):
        return {name: _guard(item, control) for name, item in value.items()}
    return [_guard(item, control) for item in value] if isinstance(value, list) else value


def call_id(number: int) -> str:
    """Of the n-th call of an episode: nine letters and digits, as some templates demand."""
    return f"call{number:05d}"


def turn_of(names: Sequence[str], reasoning: str = "") -> dict[str, Any]:
    """A turn of the model that calls these tools, or answers. Its last text is the sentinel."""
    thought = {"reasoning_content": reasoning} if reasoning else {}
    if not names:
        return {"role": "assistant", "content": SENTINEL, **thought}
    calls = [
        {"type": "function", "id": call_id(i), "function": {"name": name, "arguments": {"text": SENTINEL}}}
        for i, name in enumerate(names)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls, **thought}
