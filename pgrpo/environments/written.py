"""What a chat template wrote, as token ids with their images; and contents of messages, which are texts or lists of parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from pgrpo.types import Image, Messages
from pgrpo.vision.parts import Content, images_in, size_text


class Written(NamedTuple):
    """What the template wrote.

    Attributes:
        text: with one placeholder an image.
        ids: with all tokens of images.
        unexpanded: with one token an image.
        images: at their places in ``ids``.
    """

    text: str
    ids: list[int]
    unexpanded: list[int]
    images: list[Image]

    def behind(self, ids: list[int]) -> Written:
        """The same with these tokens in front of it."""
        images = [moved(image, len(ids)) for image in self.images]
        return Written(self.text, [*ids, *self.ids], [*ids, *self.unexpanded], images)


def moved(image: Image, by: int) -> Image:
    """An image with so many tokens more in front of it."""
    return image._replace(runs=tuple((start + by, end + by) for start, end in image.runs))


def joined(one: Content, other: Content) -> Content:
    """Two contents as one."""
    if isinstance(one, str) and isinstance(other, str):
        return one + other
    lists = ([{"type": "text", "text": x}] * bool(x) if isinstance(x, str) else x for x in (one, other))
    return [part for parts in lists for part in parts]


def each_text(content: Content, change: Callable[[str], str]) -> Content:
    """The content with its texts changed."""
    if isinstance(content, str):
        return change(content)
    return [part | {"text": change(part["text"])} if part["type"] == "text" else part for part in content]


def texts_of(content: Content) -> str:
    """The texts of a content as one."""
    return content if isinstance(content, str) else "".join(p["text"] for p in content if p["type"] == "text")


def image_parts(messages: Messages) -> list[dict[str, Any]]:
    """The image parts of all messages, in order."""
    return [part for message in messages for part in images_in(message["content"])]


def with_images(content: Content, most: int) -> Content:
    """The content with its first images, at most so many, and a note in place of the others."""
    others = images_in(content)[max(most, 0) :]
    if not others or isinstance(content, str):
        return content
    what = f"{size_text(others[0]['size'])[:-1]} does" if len(others) == 1 else f"[{len(others)} images do"
    note = {"type": "text", "text": f"{what} not fit and {'is' if len(others) == 1 else 'are'} left out]"}
    parts = [note if part is others[0] else part for part in content if all(part is not other for other in others[1:])]
    return parts if images_in(parts) else texts_of(parts)
