"""What tools and environments return, as contents of messages: texts and images that a worker's JSON can hold."""

from __future__ import annotations

import base64
import sys
from collections.abc import Mapping
from io import BytesIO
from threading import Lock
from typing import Any

from pgrpo.config import ConfigError
from pgrpo.config.task import ImageConfig
from pgrpo.environments.calls import CallFailed
from pgrpo.types import Messages
from pgrpo.vision.files import Source, open_image
from pgrpo.vision.parts import Content

NAMES = ("image", "base64", "data", "bytes", "image_url", "url", "path")
"""Under which a block may have its image."""
_decoding = Lock()
"""Episodes may be given one image, and Pillow reads its file at the first use, in no safe way for threads."""


def content_of(result: Any, limits: ImageConfig | None = None) -> Content:
    """A result as the model is shown it: a text as it is, a PIL image, blocks of texts and images in their order (a list or tuple,
    or one block), anything else as Python prints it. Halves of characters, which no tokenizer takes, become question marks. An
    image part has its file in ``base64``, of a PIL image as the model sees it: in RGB, upright, on white. Applied to what it
    returns this function returns the same.

    Args:
        limits: of the sizes of PIL images (default: those of a config that says nothing).

    Raises:
        CallFailed: it holds blocks that are neither texts nor images, an image that cannot be had, or one beside something else.
    """
    items = list(result) if isinstance(result, list | tuple) else [result] if _is_alone(result) else []
    if not (all(map(_is_part, items)) and any(map(_is_block, items))):
        if not isinstance(result, str) and _holds_image(result):
            raise CallFailed(
                f"there is an image within a {type(result).__name__}; return a PIL image, or a list of texts, images and blocks"
            )
        return _clean(str(result))
    parts: list[dict[str, Any]] = []
    for item in items:
        part = _part(item, limits or ImageConfig())
        if parts and part["type"] == parts[-1]["type"] == "text":
            parts[-1]["text"] += part["text"]
        else:
            parts.append(part)
    return parts[0]["text"] if len(parts) == 1 and "text" in parts[0] else parts


def said_at_reset(said: Any, limits: ImageConfig | None = None) -> Content | Messages | None:
    """What ``reset`` returned: a content, or messages with contents; None for nothing. As of ``content_of``."""
    if said is None or (isinstance(said, str | list) and not said):
        return None
    if not (isinstance(said, str | list) or is_image(said)):
        raise CallFailed(
            f"it gave {said!r:.80} ({type(said).__name__}); return a text, a list of messages or of blocks, or None"
        )
    if not (isinstance(said, list) and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in said)):
        return content_of(said, limits)
    for message in said:
        if not (isinstance(message.get("content"), str | list) or is_image(message.get("content"))):
            raise CallFailed(f"the message {message!r:.80} has no text as its `content`")
    return [message | {"content": content_of(message["content"], limits)} for message in said]


def file_of(part: dict[str, Any]) -> bytes:
    """The file of an image part."""
    return base64.b64decode(part["base64"])


def is_image(value: Any) -> bool:
    """Whether it is a Pillow image."""
    pillow = sys.modules.get("PIL.Image")  # who has such an image has imported it
    return pillow is not None and isinstance(value, pillow.Image)


def _is_block(value: Any) -> bool:
    return is_image(value) or (isinstance(value, dict) and isinstance(value.get("type"), str))


def _is_part(value: Any) -> bool:
    return _is_block(value) or isinstance(value, str)


def _is_alone(value: Any) -> bool:
    """Whether it is one image or block, and no other dict that has a ``type``."""
    if is_image(value) or not _is_block(value):
        return is_image(value)
    return isinstance(value.get("text"), str) if value["type"] == "text" else _has_image(value)


def _has_image(block: Mapping[Any, Any]) -> bool:
    return block.get("type") in ("image", "image_url") and any(block.get(name) is not None for name in NAMES)


def _holds_image(value: Any) -> bool:
    """Whether there is an image anywhere in lists, tuples, sets and dicts."""
    left, seen = [value], set()
    while left:
        one = left.pop()
        if is_image(one) or (
            isinstance(one, dict) and any(isinstance(one.get(n), bytes) for n in NAMES if _has_image(one))
        ):
            return True
        if isinstance(one, list | tuple | set | frozenset | dict) and id(one) not in seen:
            seen.add(id(one))
            left += one.values() if isinstance(one, dict) else one
    return False


def _part(item: Any, limits: ImageConfig) -> dict[str, Any]:
    if isinstance(item, str):
        return {"type": "text", "text": _clean(item)}
    if is_image(item):
        return {"type": "image", "base64": _base64(item, limits)}
    if item["type"] == "text":
        return {"type": "text", "text": _clean(str(item.get("text", "")))}
    if item["type"] not in ("image", "image_url"):
        raise CallFailed(f"a block of type {item['type']!r} is not supported; return texts and images")
    found = next(((name, item[name]) for name in NAMES if item.get(name) is not None), None)
    if found is None:
        raise CallFailed("a block of type 'image' has no image; give a PIL image, or its file as bytes, under `image`")
    name, value = found
    if isinstance(value, dict):  # as OpenAI's clients write it
        value = value.get("url")
    if isinstance(value, str) and value.startswith("data:") and ";base64," in value:
        name, value = "base64", value.partition(";base64,")[2]
    if isinstance(value, str) and name not in ("base64", "data"):
        raise CallFailed(f"an image is not read from {value!r:.80}; return it as a PIL image, or its file as bytes")
    return {"type": "image", "base64": _base64(value, limits)}


def _base64(value: Any, limits: ImageConfig) -> str:
    if isinstance(value, str):
        try:
            base64.b64decode(value, validate=True)
        except ValueError as error:
            raise CallFailed(f"an image's base64 cannot be read: {error}") from None
        return value
    if is_image(value):
        try:
            with _decoding:
                image = open_image(Source(value, "an image", ""), "its result", limits)
        except ConfigError as error:
            raise CallFailed(str(error)) from None
        data = BytesIO()
        image.save(data, "PNG", compress_level=1)
        value = data.getvalue()
    if not isinstance(value, bytes | bytearray):
        raise CallFailed(f"an image is a PIL image or the bytes of a file, not {type(value).__name__}")
    return base64.b64encode(value).decode()


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")
