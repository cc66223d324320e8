"""What tools and environments return, as contents of messages: texts and images that a worker's JSON can hold."""

from __future__ import annotations

import base64
import binascii
import sys
from io import BytesIO
from typing import Any

from pgrpo.environments.calls import CallFailed
from pgrpo.vision.parts import Content

PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
"""What a PNG holds without a change that is seen."""


def content_of(result: Any) -> Content:
    """A result as the model is shown it: a text as it is, a PIL image, blocks of texts and images in their order, anything else as
    Python prints it. Halves of characters, which no tokenizer takes, become question marks. An image part has its file in
    ``base64``; applied to what it returns this function returns the same.

    Raises:
        CallFailed: it holds blocks that are neither texts nor images, or an image that cannot be had.
    """
    if is_image(result):
        result = [result]
    if not (isinstance(result, list) and all(map(_is_part, result)) and any(map(_is_block, result))):
        return _clean(str(result))
    parts: list[dict[str, Any]] = []
    for item in result:
        part = _part(item)
        if parts and part["type"] == parts[-1]["type"] == "text":
            parts[-1]["text"] += part["text"]
        else:
            parts.append(part)
    return parts[0]["text"] if len(parts) == 1 and "text" in parts[0] else parts


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


def _part(item: Any) -> dict[str, Any]:
    if isinstance(item, str):
        return {"type": "text", "text": _clean(item)}
    if is_image(item):
        return {"type": "image", "base64": _base64(item)}
    if item["type"] == "text":
        return {"type": "text", "text": _clean(str(item.get("text", "")))}
    if item["type"] not in ("image", "image_url"):
        raise CallFailed(f"a block of type {item['type']!r} is not supported; return texts and images")
    names = ("image", "base64", "data", "bytes", "image_url", "url", "path")
    found = next(((name, item[name]) for name in names if item.get(name) is not None), None)
    if found is None:
        raise CallFailed("a block of type 'image' has no image; give a PIL image, or its file as bytes, under `image`")
    name, value = found
    if isinstance(value, dict):  # as OpenAI's clients write it
        value = value.get("url")
    if isinstance(value, str) and value.startswith("data:") and ";base64," in value:
        name, value = "base64", value.partition(";base64,")[2]
    if isinstance(value, str) and name not in ("base64", "data"):
        raise CallFailed(f"an image is not read from {value!r:.80}; return it as a PIL image, or its file as bytes")
    return {"type": "image", "base64": _base64(value)}


def _base64(value: Any) -> str:
    if isinstance(value, str):
        try:
            base64.b64decode(value, validate=True)
        except binascii.Error as error:
            raise CallFailed(f"an image's base64 cannot be read: {error}") from None
        return value
    if is_image(value):
        data = BytesIO()
        if value.mode in ("I", "F"):
            raise CallFailed(f"an image of mode {value.mode} has numbers without a largest one; convert it to 8 bits")
        (value if value.mode in PNG_MODES else value.convert("RGB")).save(data, "PNG", compress_level=1)
        value = data.getvalue()
    if not isinstance(value, bytes | bytearray):
        raise CallFailed(f"an image is a PIL image or the bytes of a file, not {type(value).__name__}")
    return base64.b64encode(value).decode()


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")
