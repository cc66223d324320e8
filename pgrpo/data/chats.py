"""Conversations in the shapes that data sets have, as lists of ``{"role": ..., "content": text}``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pgrpo.config import ConfigError
from pgrpo.types import Messages

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"}
"""ShareGPT's names, and others' -> the names that chat templates know. Other roles are taken as they are."""
WRITE = 'convert it in a function that data.path names (file.py:function) to [{"role": "user", "content": "..."}, ...]'


@dataclass(slots=True)
class ImagePart:
    """A part of a content that is an image: a path, URL, bytes or PIL image, or None where it stands for one of a column."""

    image: Any


IMAGE_KEYS = ("image", "path", "url", "image_url", "bytes")
"""Where a part of type ``image`` or ``image_url`` may have its image."""


def read_chat(value: Any, where: str, images: list[ImagePart] | None = None) -> Messages:
    """Return the messages of a row.

    Args:
        value: a list, tuple or numpy array of messages, its JSON text, or a mapping of lists, as Arrow has it. A message has `role`
            and `content` or, as in ShareGPT, `from` and `value`. A content is a text, or a list of parts that are texts.
        where: the row and column, for errors.
        images: gets the image parts, which become the mark ``<image>``. None: images are an error.

    Raises:
        ConfigError: it is something else; the message says what to write.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise ConfigError(f"{where}: must be a list of messages or its JSON, not {value!r:.80}; {WRITE}") from None
    if hasattr(value, "tolist"):  # of numpy
        value = value.tolist()
    if isinstance(value, Mapping) and value and all(isinstance(field, list) for field in value.values()):
        lengths = {len(field) for field in value.values()}
        if len(value) == 1:
            (name,) = value
            raise ConfigError(
                f"{where}: is a mapping; name its field: {where.rpartition('`')[0].rpartition('`')[2]}.{name}"
            )
        if len(lengths) == 1:
            value = [dict(zip(value, fields, strict=True)) for fields in zip(*value.values(), strict=True)]
    if not isinstance(value, list | tuple) or not value:
        raise ConfigError(f"{where}: must be a list of messages, not {value!r:.80}; {WRITE}")
    return [_message(message, where, images) for message in value]


def _message(message: Any, where: str, images: list[ImagePart] | None) -> dict[str, Any]:
    # Columnar files give every message the same keys; absent ones are null.
    fields = {k: v for k, v in message.items() if v is not None} if isinstance(message, Mapping) else {}
    if "role" not in fields and "from" in fields:
        fields["role"] = fields.pop("from")
    if "content" not in fields and "value" in fields:
        fields["content"] = fields.pop("value")
    if "content" not in fields and "tool_calls" in fields:
        fields["content"] = ""
    if not isinstance(fields.get("role"), str) or "content" not in fields:
        raise ConfigError(f"{where}: a message is a dict with `role` and `content` texts, not {message!r:.80}; {WRITE}")
    return fields | {
        "role": ROLES.get(fields["role"].lower(), fields["role"]),
        "content": _text(fields["content"], where, images),
    }


def _text(content: Any, where: str, images: list[ImagePart] | None) -> str:
    """The text of a content, of which parts are put together."""
    if isinstance(content, str):
        return content
    if hasattr(content, "tolist"):
        content = content.tolist()
    texts = []
    for part in content if isinstance(content, list | tuple) else [content]:
        text = part.get("text") if isinstance(part, Mapping) else part
        if isinstance(part, Mapping) and part.get("type") in ("image", "image_url"):
            if images is None:
                raise ConfigError(f"{where}: it has an image, which needs a vision-language model in model.path")
            found = next((part[name] for name in IMAGE_KEYS if part.get(name) is not None), None)
            images.append(ImagePart(found["url"] if isinstance(found, Mapping) and "url" in found else found))
            text = "<image>"
        if not isinstance(text, str):
            raise ConfigError(
                f"{where}: a content is a text, or a list of parts with a `text`, not {part!r:.80}; {WRITE}"
            )
        texts.append(text)
    return "".join(texts)
