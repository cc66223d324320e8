"""Images in chats: which a row has, and where they stand in its messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pgrpo.config import ConfigError
from pgrpo.data.chats import ImagePart
from pgrpo.types import Messages
from pgrpo.vision.files import listed
from pgrpo.vision.parts import MARK


def images_of(value: Any, parts: Sequence[ImagePart], where: str) -> list[Any]:
    """The images of a row.

    Args:
        value: of ``prompt.images_column``; None without.
        parts: the image parts of its messages; a part may have its image itself.

    Raises:
        ConfigError: some parts have their images and others do not, or the column has images too.
    """
    own = [part.image for part in parts if part.image is not None]
    if own and (len(own) < len(parts) or listed(value)):
        raise ConfigError(f"{where}: images are in parts of messages and elsewhere too; give all in one place")
    return own or list(listed(value))


def as_parts(message: Mapping[str, Any]) -> Any:
    """A message's content as chat templates of vision-language models want it: a list of parts. The result of a tool is the text
    that it was, and so is nothing beside a call, which templates ask for."""
    content = message["content"]
    if not isinstance(content, str) or message["role"] == "tool" or (not content and message.get("tool_calls")):
        return content
    return [{"type": "text", "text": content}]


def place(chat: Messages, count: int, where: str) -> Messages:
    """The messages with contents as lists of text and image parts, as chat templates of vision-language models want them.

    Args:
        chat: contents are texts with a mark for each image; without any mark all images are in front of the first user message.
        count: images of the row.

    Raises:
        ConfigError: there are marks, but not as many as images; or no user message to put images in front of.
    """
    marks = sum(message["content"].count(MARK) for message in chat)
    if marks != count and marks:
        raise ConfigError(
            f"{where}: {marks} {MARK} marks in its messages, and {count} images; give as many, or no marks"
        )
    in_front = count if not marks else 0
    placed = []
    for message in chat:
        parts: list[dict[str, Any]] = []
        if in_front and message["role"] == "user":
            parts += [{"type": "image"} for _ in range(in_front)]
            in_front = 0
        for i, text in enumerate(message["content"].split(MARK)):
            parts += [{"type": "image"}] if i else []
            parts += [{"type": "text", "text": text}] if text else []
        placed.append({**message, "content": parts or as_parts(message)})
    if in_front:
        raise ConfigError(f"{where}: no user message for its {count} images; write {MARK} where they belong")
    return placed
