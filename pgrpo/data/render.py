"""Turns rows into prompt texts and token ids. Templates are strict: a missing column is an error.

In a chat the texts of rows never become control tokens (``control.py``); a raw prompt's may, as it spells its own chat format.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pgrpo.config import ConfigError, PromptConfig
from pgrpo.data.chats import ImagePart, read_chat
from pgrpo.data.control import MARK, Control, unmarked
from pgrpo.data.images import images_of, place
from pgrpo.data.templates import Row, column_of, compile_template, no_column
from pgrpo.types import Messages, PromptImages
from pgrpo.vision import reader as vision
from pgrpo.vision.parts import MARK as IMAGE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class Rendered(NamedTuple):
    """A prompt; its text has one placeholder an image, its ids have all tokens."""

    text: str
    messages: Messages | None
    ids: list[int]
    images: PromptImages | None = None


ToolsOf = Callable[[Row], list[dict[str, Any]]]

_OURS = {
    "tools",
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "return_dict",
    "return_tensors",
    "padding",
}


def render_prompts(
    rows: Sequence[Row],
    prompt: PromptConfig,
    tokenizer: PreTrainedTokenizerBase,
    tools: ToolsOf | None = None,
    reader: vision.ImageReader | None = None,
    folder: Path = Path(),
) -> list[Rendered]:
    """The prompt of every row. ConfigError if a row does not give one.

    Args:
        tools: the JSON schemas of the tools that a row's chat template is given.
        reader: reads images; None for a model without a vision tower.
        folder: where the paths of images begin.
    """
    if prompt.images_column and reader is None:
        raise ConfigError(
            f"prompt.images_column: {prompt.images_column}: model.path has no vision tower that is known; leave it out, or name a "
            "vision-language model (docs/vision.md)"
        )
    given = [name for name in ("template", "messages", "messages_column") if getattr(prompt, name)]
    if len(given) != 1:
        raise ConfigError(
            f"give exactly one of prompt.template, prompt.messages, prompt.messages_column, not {given or 'none'}"
        )
    columns = list(rows[0])
    if prompt.template:
        fill = compile_template(prompt.template, columns, "prompt.template")
        texts = [fill(row, index) for index, row in enumerate(rows)]
        read = _read_images(rows, prompt, reader, [[]] * len(rows), folder)
        if reader is not None:
            texts = [text.replace(IMAGE, reader.placeholder) for text in texts]
        return _tokenized(
            texts, [None] * len(rows), read, reader, lambda t: _tokenize_raw(t, tokenizer), "prompt.template"
        )
    control = Control(tokenizer, special_only=True)

    def guard(text: str) -> str:
        return IMAGE.join(map(control.guard, text.split(IMAGE))) if reader else control.guard(text)

    parts: list[list[ImagePart]] = [[] for _ in rows]
    if column := prompt.messages_column:
        key, prefill = "prompt.messages_column", False
        if not {column, column.split(".")[0]} & {*columns}:
            raise ConfigError(no_column(key, column, columns))
        if (answer := prompt.answer_column) in columns:
            raise ConfigError(f"prompt.answer_column: the data already has a column `{answer}`; give another name")
        chats = [
            _prompt_of_chat(row, column, prompt.answer_column, i, parts[i] if reader else None)
            for i, row in enumerate(rows)
        ]
        chats = [[{**m, "content": guard(m["content"])} for m in chat] for chat in chats]
    else:
        key, prefill = "prompt.messages", prompt.messages[-1].role == "assistant"
        fills = [
            (m.role, compile_template(m.content, columns, f"{key}[{i}]", guard)) for i, m in enumerate(prompt.messages)
        ]
        chats = [[{"role": role, "content": fill(row, i)} for role, fill in fills] for i, row in enumerate(rows)]
    read = _read_images(rows, prompt, reader, parts, folder)
    shown = chats
    if reader is not None:
        shown = [
            place(chat, len(own), f"{key}: row {i}") for i, (chat, own) in enumerate(zip(chats, read, strict=True))
        ]
    texts = _apply_chat_template(
        shown, prompt.chat_template_kwargs, tokenizer, key, prefill, [*map(tools or _none, rows)]
    )

    def tokenize(texts: list[str]) -> list[list[int]]:
        # The chat template already wrote bos and other special tokens, so the tokenizer must not add them again.
        ids = _tokenize([text.replace(MARK, "") for text in texts], tokenizer, add_special_tokens=False)
        return [control.encode(text) if MARK in text else own for text, own in zip(texts, ids, strict=True)]

    return _tokenized(texts, [unmarked(chat) for chat in chats], read, reader, tokenize, key)


def _read_images(
    rows: Sequence[Row],
    prompt: PromptConfig,
    reader: vision.ImageReader | None,
    parts: Sequence[Sequence[ImagePart]],
    folder: Path,
) -> list[list[vision.Read]]:
    """The images of every row."""
    if reader is None:
        return [[] for _ in rows]
    column = prompt.images_column
    named = f"column `{column}`" if column else "messages"
    values = [column_of(row, column, "prompt.images_column", i) if column else None for i, row in enumerate(rows)]
    found = [images_of(v, own, f"row {i}, {named}") for i, (v, own) in enumerate(zip(values, parts, strict=True))]
    if column and (lacking := sum(not own for own in found)):
        log.warning("%d of %d rows have no image in %s", lacking, len(found), named)
    return reader.read(found, lambda i: f"row {i}, {named}", folder)


def _tokenized(
    texts: list[str],
    chats: Sequence[Messages | None],
    read: list[list[vision.Read]],
    reader: vision.ImageReader | None,
    tokenize: Callable[[list[str]], list[list[int]]],
    key: str,
) -> list[Rendered]:
    """Token ids of the texts, in which images become all of their tokens."""
    ids = tokenize(texts)
    images: list[PromptImages | None] = [None] * len(texts)
    if reader is not None and (rows := [i for i, own in enumerate(read) if own]):
        expanded = tokenize([reader.expand(texts[i], read[i], f"{key}: row {i}") for i in rows])
        for i, own in zip(rows, expanded, strict=True):
            images[i], ids[i] = reader.placed(own, ids[i], read[i], f"{key}: row {i}"), own
    return _checked([unmarked(text) for text in texts], chats, ids, images, key)


def _none(_: Row) -> list[dict[str, Any]]:
    return []


def _prompt_of_chat(
    row: Row, column: str, answer_column: str | None, index: int, images: list[ImagePart] | None
) -> Messages:
    """The messages before the model's turn. The assistant's answer at their end becomes the row's ``answer_column``."""
    where = f"prompt.messages_column: row {index}, column `{column}`"
    chat = read_chat(column_of(row, column, "prompt.messages_column", index), where, images)
    if ends := chat[-1]["role"] == "assistant":
        if answer_column is None:
            raise ConfigError(
                f"{where}: ends with an assistant message; a prompt must end before the model's turn. "
                "prompt.answer_column=NAME makes a column NAME of it, for rewards (args.column: NAME)"
            )
        row[answer_column] = chat.pop()["content"]
    if not chat or (answer_column is not None and not ends):
        what = "must end with the assistant's answer (prompt.answer_column is set)" if chat else "has an answer alone"
        raise ConfigError(f"{where}: {what}")
    return chat


def _checked(
    texts: list[str],
    chats: Sequence[Messages | None],
    ids: list[list[int]],
    images: list[PromptImages | None],
    key: str,
) -> list[Rendered]:
    for index, (text, row_ids) in enumerate(zip(texts, ids, strict=True)):
        if not text.strip() or not row_ids:
            raise ConfigError(f"{key}: the prompt of row {index} is empty")
    return list(map(Rendered, texts, chats, ids, images))


def _apply_chat_template(
    chats: list[Messages],
    kwargs: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    key: str,
    prefill: bool,
    tools: Sequence[list[dict[str, Any]]],
) -> list[str]:
    """Render the chats, each with its tools. ``prefill``: the last message is the beginning of the model's turn, and the
    completion continues it."""
    from jinja2 import TemplateError

    try:
        template = tokenizer.get_chat_template(kwargs.get("chat_template"))
    except ValueError as error:
        raise ConfigError(
            f"{key}: the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template; "
            "give a raw prompt with prompt.template instead"
        ) from error
    for name in kwargs:
        if name in _OURS or (name != "chat_template" and name not in template):
            reason = "is set by pgrpo" if name in _OURS else "is not used by the model's chat template"
            raise ConfigError(f"prompt.chat_template_kwargs: `{name}` {reason}")
    turn = {"continue_final_message": True} if prefill else {"add_generation_prompt": True}
    try:
        texts = [
            # No tools are None: for an empty list some templates say that there are tools.
            tokenizer.apply_chat_template(chat, tools=own or None, tokenize=False, **turn, **kwargs)  # pyright: ignore
            for chat, own in zip(chats, tools, strict=True)
        ]
    except (TemplateError, ValueError, TypeError) as error:
        raise ConfigError(f"{key}: the model's chat template rejects the messages: {error}") from error
    return [str(text) for text in texts]


def _tokenize_raw(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokenize with the tokenizer's default special tokens, but without a second bos if the text begins with one."""
    bos = tokenizer.bos_token
    has_bos = [bos is not None and text.startswith(str(bos)) for text in texts]
    with_bos = iter(_tokenize([t for t, has in zip(texts, has_bos, strict=True) if has], tokenizer, False))
    without = iter(_tokenize([t for t, has in zip(texts, has_bos, strict=True) if not has], tokenizer, True))
    return [next(with_bos if has else without) for has in has_bos]


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool) -> list[list[int]]:
    if not texts:
        return []
    try:
        batch = tokenizer(texts, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False)
    except Exception as error:  # the tokenizers package raises no other class, for a character without an id, say
        if len(texts) == 1:
            raise ConfigError(f"the model's tokenizer cannot encode the prompt {texts[0]!r:.200} ({error})") from error
        return [ids for text in texts for ids in _tokenize([text], tokenizer, add_special_tokens)]  # which one it is
    ids: Any = batch["input_ids"]
    return ids
