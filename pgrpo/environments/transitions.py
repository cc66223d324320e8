"""Tries a chat template before a model is loaded: which format of calls it has, and what it writes between two turns.

Probes (texts that no template has) are rendered in dummy conversations and looked for in what comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateError

from pgrpo.config import ConfigError
from pgrpo.environments.chat import SENTINEL, USER, Chat, TemplateProblem, call_id, turn_of
from pgrpo.environments.parsing import FAMILIES, Reply
from pgrpo.environments.written import image_parts, texts_of
from pgrpo.types import Messages

RESULT = "PROBE-OF-RESULT-"
REASONING = "PROBE-OF-REASONING"
PROBE_ARGUMENTS = {"number": 7, "text": SENTINEL}
PROBE_IMAGE = {"type": "image", "size": (64, 64), "key": "probe"}
IMAGE_RESULT = "a call and its result with an image"
FAULTS_OF_TEMPLATES = (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError)
"""What Jinja raises of a template that does not expect the messages it is given."""

History = Literal["append", "fork"] | None
"""``environment.history``."""


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


def check_transitions(
    chat: Chat, key: str, history: History = None, *, is_led: bool = False, with_images: bool = False
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
    template = f"{key}: the chat template of {chat.tokenizer.name_or_path or 'this model'}"
    user = {"role": "user", "content": f"{RESULT}2"}
    transitions: list[Transition] = []
    tool = chat.schemas[0]["function"]["name"] if chat.schemas else ""
    if not chat.schemas and "<|channel|>" in map(str, chat.tokenizer.added_tokens_decoder.values()):
        chat.family = FAMILIES["gpt-oss"]  # which writes reasoning as a message
    if chat.schemas:
        _choose_parser(chat, template, tool)
        transitions += [
            _try(chat, "a call and its result", turn_of([tool]), _results([tool])),
            _try(chat, "a call behind reasoning and its result", turn_of([tool], REASONING), _results([tool])),
            _try(chat, "two calls and their results", turn_of([tool, tool]), _results([tool, tool])),
        ]
        chat.one_call = transitions[2].problem is not None
    transitions.append(_try(chat, "an answer behind reasoning and a user message", turn_of([], REASONING), [user]))
    if chat.schemas:
        name, told = "a call behind reasoning, its result and a user message", [*_results([tool]), user]
        transitions.append(_try(chat, name, turn_of([tool], REASONING), told))
    if with_images:
        transitions += _try_images(chat, tool)
    needed = [transitions[0]] * bool(chat.schemas) + [t for t in transitions if is_led and "user" in t.name]
    needed += [t for t in transitions if t.name == IMAGE_RESULT]
    for one in needed:
        if one.problem and not (history == "fork" and one.can_fork):
            fix = "use another template" + (", or environment.history=fork" if one.can_fork else "")
            fix += ", or environment.max_images=0" if "image" in one.name else ""
            raise ConfigError(f"{template}: {one.name}: {one.problem}; {fix}")
    return transitions


def _try_images(chat: Chat, tool: str) -> list[Transition]:
    """Results and user messages that have a text and an image."""
    found = []
    user = {"role": "user", "content": [{"type": "text", "text": f"{RESULT}2"}, PROBE_IMAGE]}
    if tool:
        result = _results([tool])[0]
        result["content"] = [{"type": "text", "text": result["content"]}, PROBE_IMAGE]
        found.append(_try(chat, IMAGE_RESULT, turn_of([tool]), [result]))
    return [*found, _try(chat, "an answer and a user message with an image", turn_of([]), [user])]


def _choose_parser(chat: Chat, template: str, tool: str) -> None:
    try:
        written = _written_call(chat, tool)
    except FAULTS_OF_TEMPLATES as error:
        raise ConfigError(f"{template} does not render calls of tools ({error}); use a model with tools") from error
    if written is None:
        raise ConfigError(f"{template} leaves out calls or results of tools; use a model that was trained with tools")
    if chat.by_template is None:
        chat.family = next((parse for parse in FAMILIES.values() if _reads(parse, written, tool)), None)
        if chat.family is None:
            raise ConfigError(
                f"{template} writes calls in a format that pgrpo cannot read ({written.strip()!r:.200}); it reads those of "
                f"{', '.join(FAMILIES)}. Give the tokenizer a response_template"
            )


def _written_call(chat: Chat, tool: str) -> str | None:
    """What the template writes for a turn that calls a tool; None if call or result is not in it."""
    turn = turn_of([tool])
    turn["tool_calls"][0]["function"]["arguments"] = PROBE_ARGUMENTS
    head = chat.render([USER, turn], generate=False)
    full = chat.render([USER, turn, *_results([tool])], generate=True)
    if not (tool in head and SENTINEL in head and f"{RESULT}0" in full):
        return None
    start = _same_start(head, chat.render([USER], generate=True))
    end = next((at for text in chat.ends if (at := head.find(text, head.rfind(SENTINEL))) >= 0), len(head))
    return head[start:end]


def _try(chat: Chat, name: str, turn: dict[str, Any], messages: Messages) -> Transition:
    rendered: list[str] = []
    wanted = [texts_of(message["content"]) for message in messages]
    try:
        # What a fork needs: the turn as the last message, and with what is told.
        rendered += [chat.render([USER, turn, *more], generate=bool(more)) for more in ([], messages)]
        end, text = chat.behind(turn, messages)
        if missing := [said for said in wanted if said not in text]:
            raise TemplateProblem(
                f"{missing[0]!r} is not behind one of the model's end tokens ({', '.join(chat.ends)})"
            )
        chat.written(text, messages, behind=end)
    except FAULTS_OF_TEMPLATES as error:
        can_fork = bool(rendered) and all(said in rendered[1] for said in wanted)
        if can_fork and image_parts(messages):
            assert chat.reader is not None
            can_fork = rendered[1].count(chat.reader.placeholder) == len(image_parts(messages))
        return Transition(name, " ".join(str(error).split()), None, can_fork)
    head, full = rendered
    kept = head[: head.rfind(SENTINEL)]
    rewritten = kept[_same_start(kept, full) :]
    return Transition(name, None, rewritten[:80] or None, True)


def _results(names: Sequence[str]) -> Messages:
    return [
        {"role": "tool", "name": name, "tool_call_id": call_id(i), "content": f"{RESULT}{i}"}
        for i, name in enumerate(names)
    ]


def _same_start(one: str, other: str) -> int:
    """Number of characters with which both begin."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _reads(parse: Callable[..., Reply], written: str, tool: str) -> bool:
    """Whether a parser reads the template's rendering of the probe's call back."""
    calls = parse(written, False).calls
    wanted = {name: str(value) for name, value in PROBE_ARGUMENTS.items()}
    return [(c.name, {k: str(v) for k, v in c.arguments.items()}, c.error) for c in calls] == [(tool, wanted, None)]
