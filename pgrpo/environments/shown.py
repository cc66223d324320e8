"""Images that tools and environments give an episode: read, bounded in number, and put where the chat template looks for them."""

from __future__ import annotations

import asyncio

from pgrpo.config import ConfigError
from pgrpo.environments.calls import CallFailed
from pgrpo.environments.content import file_of
from pgrpo.vision.parts import Content, images_in
from pgrpo.vision.reader import ImageReader


class ImagesRefused(RuntimeError):
    """An image came where a run is not made for any."""


class Shown:
    """Reads the images that tools and environments give one episode, and counts them.

    Args:
        max_images: ``environment.max_images``.
        reader: of the run's images; None where it has none.
    """

    def __init__(self, max_images: int, reader: ImageReader | None) -> None:
        self._max_images, self._reader, self._count = max_images, reader, 0

    async def __call__(self, content: Content) -> Content:
        """The content with its images read.

        Raises:
            CallFailed: it has an image that cannot be used, or more images than the episode may have.
            ImagesRefused: this run is not made for images.
        """
        if not (images := images_in(content)):
            return content
        most, reader = self._max_images, self._reader
        if not most or reader is None:
            raise ImagesRefused(
                "a tool or environment gave an image, which environment.max_images=0 does not allow: set it to the most images "
                "that an episode may be given, with a vision-language model in model.path, or return texts"
            )
        if self._count + len(images) > most:
            raise CallFailed(
                f"this episode was given {self._count} images, and {len(images)} more would be above environment.max_images={most}"
            )
        try:
            for part in images:
                content_of_file = file_of(part)
                read = await asyncio.to_thread(reader.told, content_of_file)
                part.clear()
                part |= {"type": "image", "image": content_of_file, "size": read.size, "key": read.key}
        except ConfigError as error:
            raise CallFailed(str(error)) from None
        self._count += len(images)
        return content
