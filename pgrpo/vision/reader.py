"""Reads the images of rows, puts their tokens into prompts, and gives their pixels by key as often as a model asks."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pgrpo.config import ConfigError, ModelConfig
from pgrpo.config.task import ImageConfig
from pgrpo.types import Image, PromptImages
from pgrpo.vision.files import Source, check_pillow, find, open_image
from pgrpo.vision.pixels import Pixels, PixelStore
from pgrpo.vision.processors import Expansion, Processor, positions_3d
from pgrpo.vision.rows import placeholder_runs

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

log = logging.getLogger(__name__)


class Read(NamedTuple):
    """An image that was read once: its key, (width, height), and what stands for it in a prompt."""

    key: str
    size: tuple[int, int]
    expansion: Expansion


class ImageReader:
    """The images of a run. Their files are read again when their pixels are needed.

    Attributes:
        pixels: the tower's arguments for an image, by its key; and its file, if it is not one of the data.

    Args:
        model, config, tokenizer: of the model that sees the images.
        limits: sizes and hosts.

    Raises:
        ConfigError: Pillow or the model's image processor cannot be loaded, or ``limits`` do not fit it.
    """

    def __init__(
        self, model: ModelConfig, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, limits: ImageConfig
    ) -> None:
        check_pillow()
        self.limits = limits
        self.processor = Processor(model, config, tokenizer, limits)
        self.teacher: Processor | None = None
        """Of the model of ``loss.teacher``, which must make as many tokens of an image."""
        self._sources: dict[str, tuple[Source, str]] = {}
        self.pixels = self._store(self.processor)

    @property
    def placeholder(self) -> str:
        """What the chat template writes for an image."""
        return self.processor.placeholder

    def read(self, rows: Sequence[Sequence[Any]], where: Callable[[int], str], folder: Path) -> list[list[Read]]:
        """Read and check the images of all rows, many at a time.

        Args:
            rows: of each row its images, as ``files.find`` takes them.
            where: the row and column of a row's number, for errors.
            folder: where relative paths begin.

        Raises:
            ConfigError: of the first row with an image that cannot be used: row, file and reason.
        """
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            return list(
                pool.map(lambda i: [self._read(value, where(i), folder) for value in rows[i]], range(len(rows)))
            )

    def expand(self, text: str, images: Sequence[Read], where: str) -> str:
        """The text with each placeholder replaced by the tokens of its image.

        Raises:
            ConfigError: it has not as many placeholders as there are images.
        """
        first, *rest = text.split(self.placeholder)
        if len(rest) != len(images):
            raise ConfigError(
                f"{where}: the chat template wrote {len(rest)} placeholders ({self.placeholder}) for {len(images)} images: "
                "it must write one an image, and the text none"
            )
        return first + "".join(image.expansion.text + part for image, part in zip(images, rest, strict=True))

    def placed(self, ids: list[int], unexpanded: list[int], images: Sequence[Read], where: str) -> PromptImages:
        """Where the images are in the expanded ids.

        Raises:
            ConfigError: the ids have other image tokens than the images.
        """
        try:
            runs = placeholder_runs(ids, self.processor.token_id, [image.expansion.counts for image in images])
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from error
        found = tuple(Image(image.key, own, image.size) for image, own in zip(images, runs, strict=True))
        placed = self.gathered(found, unexpanded, len(ids), where)
        assert placed is not None
        return placed

    @cached_property
    def teacher_pixels(self) -> PixelStore:
        """The arguments of the teacher's tower."""
        teacher = self.teacher
        assert teacher is not None
        return self.pixels if teacher.settings == self.processor.settings else self._store(teacher)

    def _store(self, processor: Processor) -> PixelStore:
        return PixelStore(partial(self._pixels, processor), self._sources.__contains__)

    def _pixels(self, processor: Processor, key: str, content: bytes | None) -> Pixels:
        image = self.picture(key, content)
        try:
            return processor.pixels(image)
        except ValueError as error:
            raise _refused(*self._source(key, content), error) from error

    def dummy(self) -> Pixels:
        """Pixels of a small gray image."""
        from PIL import Image as pillow

        return self.processor.pixels(pillow.new("RGB", (64, 64), "gray"))

    def picture(self, key: str, content: bytes | None = None) -> Any:
        """The image itself, for a reader of a report or for vLLM; ``content`` as of ``pixels``."""
        return open_image(*self._source(key, content), self.limits)

    def _source(self, key: str, content: bytes | None) -> tuple[Source, str]:
        """The source of an image, and where it is."""
        if content is None:
            return self._sources[key]
        return Source(content, "an image that the model was told", key), "environment"

    def told(self, content: bytes) -> Read:
        """Check an image that a tool or environment gave. Its file stays with the sample that has it.

        Raises:
            ConfigError: it cannot be used; the model is told the message.
        """
        if len(content) > 4 * self.limits.max_file_pixels:
            raise ConfigError(f"an image of {len(content)} bytes is too large; make it smaller")
        source = Source(content, "an image", hashlib.sha256(content).hexdigest())
        return self._measured(source, open_image(source, "its result", self.limits), "its result")

    def image_of(self, part: Mapping[str, Any], runs: tuple[tuple[int, int], ...]) -> Image:
        """The image of a message's part, at these tokens."""
        return Image(part["key"], runs, tuple(part["size"]), part.get("image"))

    def gathered(self, images: Sequence[Image], unexpanded: list[int], length: int, where: str) -> PromptImages | None:
        """The images of a sample's first ``length`` tokens; None if there are none."""
        if not images:
            return None
        positions = None
        if self.processor.family.positions_3d:
            grids = [self.processor.expansion(image.size).grid or (0, 0) for image in images if image.size]
            positions = positions_3d(length, images, grids)
        return PromptImages(tuple(images), unexpanded, positions, where)

    def _read(self, value: Any, where: str, folder: Path) -> Read:
        source = find(value, where, self.limits, folder)
        image = open_image(source, where, self.limits)
        if not any(high for _, high in image.getextrema()):  # pyright: ignore[reportGeneralTypeIssues]
            log.warning("%s, %s: the image is all black", where, source.name)
        self._sources.setdefault(source.key, (source, where))
        return self._measured(source, image, where)

    def _measured(self, source: Source, image: Picture, where: str) -> Read:
        try:
            expansion = self.processor.expansion(image.size)
            theirs = self.teacher.expansion(image.size) if self.teacher else expansion
        except ValueError as error:
            raise _refused(source, where, error) from error
        if theirs != expansion:
            raise ConfigError(
                f"{where}, {source.name}: loss.teacher makes {sum(theirs.counts)} tokens of an image of {image.size[0]} x "
                f"{image.size[1]} pixels, the policy {sum(expansion.counts)}: name a teacher whose preprocessor_config.json has "
                "the policy's sizes"
            )
        return Read(source.key, image.size, expansion)


def _refused(source: Source, where: str, error: ValueError) -> ConfigError:
    reason = " ".join(str(error).split())
    return ConfigError(f"{where}, {source.name}: the model's image processor refuses it: {reason}")
