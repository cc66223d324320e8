"""Contents of messages that may have images: a text, or a list of parts in the order in which they are shown.

A part is ``{"type": "text", "text": ...}`` or ``{"type": "image", ...}``. An image has its (width, height) under ``size`` and the
hash of its file under ``key``. One that a tool or environment gave has its file under ``image`` (bytes); one of the data set does
not.
"""

from __future__ import annotations

from typing import Any

MARK = "<image>"
"""The place of an image in a message's text."""
Content = str | list[dict[str, Any]]


def images_in(content: Content) -> list[dict[str, Any]]:
    """The image parts."""
    return [] if isinstance(content, str) else [part for part in content if part["type"] == "image"]


def as_text(content: Any) -> str:
    """For a reader: ``[image 640x480]`` stands for an image."""
    return _joined(content, lambda part: size_text(part.get("size") or (0, 0)))


def with_marks(content: Any) -> str:
    """As the contents of a data set have it: a mark stands for an image."""
    return _joined(content, lambda part: MARK)


def _joined(content: Any, image: Any) -> str:
    if not isinstance(content, list):
        return str(content)
    return "".join(image(part) if part["type"] == "image" else part["text"] for part in content)


def size_text(size: Any) -> str:
    """``[image 640x480]``; ``size``: (width, height)."""
    width, height = size
    return f"[image {width}x{height}]"
