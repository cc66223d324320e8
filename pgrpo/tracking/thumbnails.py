"""Small pictures of the images that logged completions are about, in ``thumbnails/`` of the run folder, for the report and wandb.

An image is written once, whatever prompts have it. Rows name it by its key; texts have ``[image 640x480]`` in its place.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

from pgrpo.tracking.record import writing
from pgrpo.types import Episode, Image, Prompt
from pgrpo.vision.parts import size_text

SIDE = 128
"""Pixels of the longer side of a thumbnail, a JPEG of some 3 kB."""
MOST = 2000
"""Thumbnails of a run."""
IN_A_ROW = 8
"""Images of a row that are shown side by side."""
KEY = re.compile(r"[0-9a-f]{16,128}")

log = logging.getLogger(__name__)
Row = dict[str, Any]


class Pictures(Protocol):
    """``vision.reader.ImageReader``.

    Attributes:
        placeholder: what a prompt's text has for an image.
    """

    @property
    def placeholder(self) -> str: ...

    def picture(self, key: str, content: bytes | None = None) -> Any:
        """The image as Pillow has it."""
        ...


class Thumbnails:
    """Those of a run. Several of these may write to one folder, one behind the other.

    Args:
        run_dir: the run folder.
        pictures: reads images; None for a model without a vision tower.
    """

    def __init__(self, run_dir: Path, pictures: Pictures | None) -> None:
        self.folder, self.pictures = run_dir / "thumbnails", pictures
        self._keys: set[str] = set()  # that there are, or that cannot be made

    def keep(self, images: Iterable[Image]) -> None:
        """Write those that are not there, up to ``MOST`` in the folder. RuntimeError if the folder cannot be written to."""
        if self.pictures is None:
            return
        new = [image for image in images if image.key not in self._keys]
        if new:  # an evaluation may have written some
            self._keys |= {path.stem for path in self.folder.glob("*.jpg")}
        for image in new:
            if image.key in self._keys or len(self._keys) >= MOST:
                continue
            self._keys.add(image.key)
            if len(self._keys) == MOST:
                log.warning("%s has %d thumbnails; images that come later get none", self.folder, MOST)
            try:
                picture = self.pictures.picture(image.key, image.content)
            except Exception as error:  # its file may be gone by now
                log.warning("no thumbnail of an image: %s", error)
                continue
            picture.thumbnail((SIDE, SIDE))
            data = BytesIO()
            picture.save(data, "JPEG", quality=80)
            path = self.folder / f"{image.key}.jpg"
            part = path.with_name(f".{path.name}.{os.getpid()}")
            with writing(path):
                self.folder.mkdir(exist_ok=True)
                try:
                    part.write_bytes(data.getvalue())
                    part.replace(path)  # a run that is killed leaves no half of a file that counts as one
                finally:
                    part.unlink(missing_ok=True)

    def named(self, row: Row) -> Row:
        """A row whose prompt has ``[image 640x480]`` in place of each placeholder."""
        first, *rest = row["prompt"].split(self.pictures.placeholder) if self.pictures else [row["prompt"]]
        sizes = [image["size"] for image in row.get("images", ())]
        if len(rest) != len(sizes):  # something else wrote such a text
            return row
        return row | {"prompt": first + "".join(f"{size_text(s)}{part}" for s, part in zip(sizes, rest, strict=True))}


def images_of(prompt: Prompt, episode: Episode) -> tuple[list[Image], list[Image]]:
    """The images of an episode's prompt, and those that it was shown later, in order."""
    began = (episode.prompt or prompt).images
    first = list(began.images) if began else []
    later: dict[str, Image] = {}
    for sample in episode.samples:
        for image in sample.images.images if sample.images else ():
            if image.runs[0][0] >= len((episode.prompt or prompt).token_ids):
                later.setdefault(image.key, image)
    return first, list(later.values())


def rows_of(prompt: Prompt, episode: Episode) -> Row:
    """What a record says of an episode's images; nothing where there are none."""
    names = zip(("images", "told_images"), images_of(prompt, episode), strict=True)
    return {
        name: [{"key": image.key, "size": list(image.size or (0, 0))} for image in found]
        for name, found in names
        if found
    }


def paths_of(folder: Path, row: Row) -> Iterator[Path]:
    """Thumbnails of a row's images that are there."""
    for image in [*row.get("images", ()), *row.get("told_images", ())]:
        if KEY.fullmatch(str(image["key"])) and (path := folder / f"{image['key']}.jpg").is_file():
            yield path


def sheet(paths: Iterable[Path]) -> Any:
    """Thumbnails side by side, as one Pillow image; None if there are none. One that cannot be read is left out with a warning."""
    from PIL import Image as pillow

    parts = []
    for path in list(paths)[:IN_A_ROW]:
        try:
            with pillow.open(path) as image:
                parts.append(image.copy())
        except (OSError, SyntaxError) as error:
            log.warning("%s: this thumbnail cannot be read and is left out; remove it: %s", path, error)
    if not parts:
        return None
    made = pillow.new("RGB", (sum(part.width + 4 for part in parts) - 4, max(part.height for part in parts)), "white")
    left = 0
    for part in parts:
        made.paste(part, (left, 0))
        left += part.width + 4
    return made
