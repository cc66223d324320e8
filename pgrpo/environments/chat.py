"""The chat template as token ids: prompts with their tools, and what stands between two turns of the model.

What the model sampled is never rendered or tokenized again. What it is told then (results of tools, messages) is the difference
of two renderings of a dummy conversation: all that the template writes behind the model's turn. The end of the turn is the first
of the model's end tokens there; it was sampled already, or is added in front where the model ended its turn otherwise. An image is
one placeholder in rendered text, and all of its tokens in ids.

``check`` renders the transitions that a run may need, before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from pgrpo.config import ConfigError
from pgrpo.data.control import MARK, Control, unmarked
from pgrpo.data.images import as_parts
from pgrpo.environments.parsing import FAMILIES, Parse, Reply, own_template, split_reasoning
from pgrpo.environments.written import Written, each_text, image_parts, joined, texts_of
from pgrpo.types import Messages
from pgrpo.vision.parts import Content
from pgrpo.vision.reader import ImageReader
from pgrpo.vision.rows import placeholder_runs

SENTINEL = "PROBE-OF-THE-TURN"
RESULT = "PROBE-OF-RESULT-"
CUT = "\n[the rest is cut]"
REASONING = "PROBE-OF-REASONING"
USER = {"role": "user", "content": "?"}
PROBE_ARGUMENTS = {"number": 7, "text": SENTINEL}
PROBE_IMAGE = {"type": "image", "size": (64, 64), "key": "probe"}
IMAGE_RESULT = "a call and its result with an image"


History = Literal["append", "fork"] | None
"""``environment.history``."""


class TemplateProblem(ValueError):
    """The template cannot do a transition; the message says what is wrong with it."""


class Transition(NamedTuple):
    """One kind of step between two turns.

    Attributes:
        name: for messages.
        problem: why it cannot be done; None if it can.
        rewrites: text of the earlier turns that the template writes in another way once this step is made. None if it keeps all.
        can_fork: whether the history can be rendered with it, as the beginning of another sample.
    """

    name: str
    problem: str | None
    rewrites: str | None
    can_fork: bool = True


class Chat:
    """The chat template of one set of tools.

    Args:
        tokenizer: of the model, with a chat template.
        end_ids: tokens that end a turn of the model.
        schemas: of the tools; may be empty.
        kwargs: ``prompt.chat_template_kwargs``.
        reader: expands images; None where prompts and results are text.
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
        self._ends = {str(tokenizer.convert_ids_to_tokens(token)): token for token in end_ids}
        self._rows, self._others = Control(tokenizer, special_only=True), Control(tokenizer, special_only=False)
        self._by_template = own_template(tokenizer, schemas)
        self._family: Parse | None = None
        self._one_call = False  # the template renders no turn with several calls

    @property
    def sees_whole_images(self) -> bool:
        """Whether an image's row sees the rows behind it in its image too."""
        return self.reader is not None and self.reader.processor.family.sees_whole_images

    def prompt(self, messages: Messages, more: Content) -> Written:
        """A prompt whose last message has ``more`` at its end, which the environment says."""
        guarded = [self._guarded(message, self._rows) for message in messages]
        guarded[-1]["content"] = joined(guarded[-1]["content"], each_text(more, self._others.guard))
        return self._written(self._render(guarded, generate=True), guarded)

    def prompt_with(self, messages: Messages, more: Messages) -> Written:
        """A prompt with further messages of the environment."""
        guarded = [self._guarded(message, self._rows) for message in messages]
        guarded += [self._guarded(message, self._others) for message in more]
        return self._written(self._render(guarded, generate=True), guarded)

    def _written(self, text: str, messages: Messages, behind: str = "") -> Written:
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
        before, after = self._render(said, generate=False), self._render([*said, *told], generate=True)
        end = max((before.rfind(text) for text in self._ends), default=-1)
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
        end, text = self._behind(_turn(names[:1] if self._one_call else names), guarded)
        return self._ends[end], self._written(text, guarded, behind=end)

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
        ids = list(ids[:-1] if ids and ids[-1] in self._ends.values() else ids)
        if self._by_template:
            return self._by_template(ids, list(prompt_ids))
        text = str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        before = str(self.tokenizer.decode(list(prompt_ids[-8:]), clean_up_tokenization_spaces=False))
        is_thinking = before.rstrip().endswith("<think>")
        if self._family is None:
            reasoning, content = split_reasoning(text, is_thinking)
            return Reply(content.strip() if reasoning else content, reasoning, [])
        return self._family(text, is_thinking)

    def check(
        self, key: str, history: History = None, *, is_led: bool = False, with_images: bool = False
    ) -> list[Transition]:
        """Choose how calls are parsed, and try the transitions. What the run needs must be possible: what is told can be appended,
        or the history can be rendered anew (``environment.history``).

        Args:
            key: of the tools or environments, for messages.
            is_led: an environment leads the conversation, and speaks as the user.
            with_images: what is told may have images (``environment.max_images``).

        Raises:
            ConfigError: the template has no tools, or nothing reads its calls, or what is told cannot be.
        """
        template = f"{key}: the chat template of {self.tokenizer.name_or_path or 'this model'}"
        user = {"role": "user", "content": f"{RESULT}2"}
        transitions: list[Transition] = []
        tool = self.schemas[0]["function"]["name"] if self.schemas else ""
        if not self.schemas and "<|channel|>" in map(str, self.tokenizer.added_tokens_decoder.values()):
            self._family = FAMILIES["gpt-oss"]  # which writes reasoning as a message
        if self.schemas:
            self._choose_parser(template, tool)
            transitions += [
                self._try("a call and its result", _turn([tool]), _results([tool])),
                self._try("a call behind reasoning and its result", _turn([tool], REASONING), _results([tool])),
                self._try("two calls and their results", _turn([tool, tool]), _results([tool, tool])),
            ]
            self._one_call = transitions[2].problem is not None
        transitions.append(self._try("an answer behind reasoning and a user message", _turn([], REASONING), [user]))
        if self.schemas:
            name, told = "a call behind reasoning, its result and a user message", [*_results([tool]), user]
            transitions.append(self._try(name, _turn([tool], REASONING), told))
        if with_images:
            transitions += self._try_images(tool)
        needed = [transitions[0]] * bool(self.schemas) + [t for t in transitions if is_led and "user" in t.name]
        needed += [t for t in transitions if t.name == IMAGE_RESULT]
        for one in needed:
            if one.problem and not (history == "fork" and one.can_fork):
                fix = "use another template" + (", or environment.history=fork" if one.can_fork else "")
                fix += ", or environment.max_images=0" if "image" in one.name else ""
                raise ConfigError(f"{template}: {one.name}: {one.problem}; {fix}")
        return transitions

    def _try_images(self, tool: str) -> list[Transition]:
        """Results and user messages that have a text and an image."""
        found = []
        user = {"role": "user", "content": [{"type": "text", "text": f"{RESULT}2"}, PROBE_IMAGE]}
        if tool:
            result = _results([tool])[0]
            result["content"] = [{"type": "text", "text": result["content"]}, PROBE_IMAGE]
            found.append(self._try(IMAGE_RESULT, _turn([tool]), [result]))
        return [*found, self._try("an answer and a user message with an image", _turn([]), [user])]

    def _choose_parser(self, template: str, tool: str) -> None:
        try:
            written = self._written_call(tool)
        except (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise ConfigError(f"{template} does not render calls of tools ({error}); use a model with tools") from error
        if written is None:
            raise ConfigError(
                f"{template} leaves out calls or results of tools; use a model that was trained with tools"
            )
        if self._by_template is None:
            self._family = next((parse for parse in FAMILIES.values() if _reads(parse, written, tool)), None)
            if self._family is None:
                raise ConfigError(
                    f"{template} writes calls in a format that pgrpo cannot read ({written.strip()!r:.200}); it reads those of "
                    f"{', '.join(FAMILIES)}. Give the tokenizer a response_template"
                )

    def _written_call(self, tool: str) -> str | None:
        """What the template writes for a turn that calls a tool; None if call or result is not in it."""
        turn = _turn([tool])
        turn["tool_calls"][0]["function"]["arguments"] = PROBE_ARGUMENTS
        head = self._render([USER, turn], generate=False)
        full = self._render([USER, turn, *_results([tool])], generate=True)
        if not (tool in head and SENTINEL in head and f"{RESULT}0" in full):
            return None
        start = _same(head, self._render([USER], generate=True))
        end = next((at for text in self._ends if (at := head.find(text, head.rfind(SENTINEL))) >= 0), len(head))
        return head[start:end]

    def _try(self, name: str, turn: dict[str, Any], messages: Messages) -> Transition:
        rendered: list[str] = []
        wanted = [texts_of(message["content"]) for message in messages]
        try:
            rendered += [
                self._render([USER, turn, *more], generate=bool(more)) for more in ([], messages)
            ]  # what a fork needs
            end, text = self._behind(turn, messages)
            if missing := [said for said in wanted if said not in text]:
                raise TemplateProblem(
                    f"{missing[0]!r} is not behind one of the model's end tokens ({', '.join(self._ends)})"
                )
            self._written(text, messages, behind=end)
        except (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            can_fork = bool(rendered) and all(said in rendered[1] for said in wanted)
            if can_fork and image_parts(messages):
                assert self.reader is not None
                can_fork = rendered[1].count(self.reader.placeholder) == len(image_parts(messages))
            return Transition(name, " ".join(str(error).split()), None, can_fork)
        head, full = rendered
        kept = head[: head.rfind(SENTINEL)]
        rewritten = kept[_same(kept, full) :]
        return Transition(name, None, rewritten[:80] or None, True)

    def _behind(self, turn: dict[str, Any], guarded: Messages) -> tuple[str, str]:
        """The text of the token that ends a turn, and the rendered text behind it.

        Raises:
            TemplateProblem: there is none of the model's end tokens behind the turn.
        """
        full = self._render([USER, turn, *guarded], generate=True)
        start = full.rfind(SENTINEL) + len(SENTINEL)
        found = [(at, -len(text), text) for text in self._ends if (at := full.find(text, start)) >= 0]
        if start < len(SENTINEL) or not found:
            raise TemplateProblem(f"the turn does not end in one of the model's end tokens ({', '.join(self._ends)})")
        at, _, end = min(found)
        return end, full[at + len(end) :]

    def _render(self, messages: Messages, *, generate: bool) -> str:
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


def _same(one: str, other: str) -> int:
    """Number of characters with which both begin."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def call_id(number: int) -> str:
    """Of the n-th call of an episode: nine letters and digits, as some templates demand."""
    return f"call{number:05d}"


def _turn(names: Sequence[str], reasoning: str = "") -> dict[str, Any]:
    """A turn of the model that calls these tools, or answers. Its last text is the sentinel."""
    thought = {"reasoning_content": reasoning} if reasoning else {}
    if not names:
        return {"role": "assistant", "content": SENTINEL, **thought}
    calls = [
        {"type": "function", "id": call_id(i), "function": {"name": name, "arguments": {"text": SENTINEL}}}
        for i, name in enumerate(names)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls, **thought}


def _results(names: Sequence[str]) -> Messages:
    return [
        {"role": "tool", "name": name, "tool_call_id": call_id(i), "content": f"{RESULT}{i}"}
        for i, name in enumerate(names)
    ]


def _reads(parse: Callable[..., Reply], written: str, tool: str) -> bool:
    """Whether a parser reads the template's rendering of the probe's call back."""
    calls = parse(written, False).calls
    wanted = {name: str(value) for name, value in PROBE_ARGUMENTS.items()}
    return [(c.name, {k: str(v) for k, v in c.arguments.items()}, c.error) for c in calls] == [(tool, wanted, None)]
