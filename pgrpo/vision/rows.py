"""Where images lie in packed rows.

All tokens of an image have the id of its placeholder, so ids alone would merge prompts with different images: ``token_keys``
gives an image's tokens a number of their own. A run of an image's rows is never divided between nodes, as samples part at the first
row of an image or behind its last.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pgrpo.attention.layout import Node, rows_of
from pgrpo.types import PromptImages, Request, Sample

FIRST_KEY = 2**31
"""Numbers of images begin here, above all token ids."""


class Piece(NamedTuple):
    """Consecutive rows of one sample: tokens ``offset`` to ``offset + length`` at packed rows ``row`` and so on.

    Attributes:
        images: of the sample.
        above: (first row, end) of the rows that hold the tokens before ``offset``, in order.
    """

    images: PromptImages | None
    row: int
    offset: int
    length: int
    above: tuple[tuple[int, int], ...] = ()


class Block(NamedTuple):
    """A run of an image's rows, ``start`` to ``end``, and the rows in front of it in its sample, in order. Some are missing unless
    ``is_whole``."""

    start: int
    end: int
    before: tuple[tuple[int, int], ...]
    is_whole: bool = True


@dataclass(frozen=True, slots=True)
class ImageRows:
    """The image rows of a packed batch. I rows, F rows of features of all distinct images.

    Attributes:
        keys: of the distinct images, in the order of their first row.
        counts: rows of features of each.
        rows: [I] int64, the packed rows, ascending.
        features: [I] int64, the row of the features that each has.
        blocks: the same rows as runs.
        position_ids: [3, T] int64; None where positions have one dimension.
        contents: files of images that are not of the data, by key.
    """

    keys: list[str]
    counts: list[int]
    rows: Tensor
    features: Tensor
    blocks: list[Block]
    position_ids: Tensor | None
    contents: dict[str, bytes] = field(default_factory=dict)

    def between(self, first: int, end: int) -> ImageRows:
        """For a part of the packed rows: which of them are images, counted from ``first``. Images, and what a row of them sees, are
        those of all rows."""
        at = ((first <= self.rows) & (self.rows < end)).nonzero().flatten()
        return replace(self, rows=self.rows.index_select(0, at) - first, features=self.features.index_select(0, at))

    def among(self, rows: Tensor) -> ImageRows | None:
        """For these packed rows alone, ascending; None if no image is there. They have all rows of an image, or none."""
        here = torch.isin(self.rows, rows).nonzero().flatten()
        if not len(here):
            return None
        new_rows, features = (
            torch.searchsorted(rows, self.rows.index_select(0, here)),
            self.features.index_select(0, here),
        )
        ends = torch.tensor(self.counts, device=rows.device).cumsum(0)
        used = torch.searchsorted(ends, features, right=True).unique().tolist()
        counts = [self.counts[i] for i in used]
        starts = [int(ends[i]) - self.counts[i] for i in used]
        kept = torch.from_numpy(rows_of([*zip(starts, counts, strict=True)])).to(rows.device)
        number = {row: i for i, row in enumerate(rows.tolist())} if self.blocks else {}
        blocks = []
        for block in self.blocks:
            if block.start in number:
                needed = [(a, b) for a, b in block.before if a < b]
                before = [(number[a], number[b - 1] + 1) for a, b in needed if a in number and b - 1 in number]
                is_whole = sum(b - a for a, b in before) == sum(b - a for a, b in needed)
                blocks.append(Block(number[block.start], number[block.end - 1] + 1, (*before,), is_whole))
        positions = self.position_ids if self.position_ids is None else self.position_ids.index_select(1, rows)
        keys = [self.keys[i] for i in used]
        return replace(
            self, keys=keys, counts=counts, rows=new_rows, features=torch.searchsorted(kept, features), blocks=blocks,
            position_ids=positions,
        )  # fmt: skip


def image_rows(pieces: Sequence[Piece], device: torch.device | str) -> ImageRows | None:
    """The image rows of packed pieces, which lie one behind the other from row 0 on; None if no piece has images."""
    if not any(piece.images for piece in pieces):
        return None
    first: dict[str, int] = {}  # of each distinct image, its first row of features
    counts: list[int] = []
    blocks, rows, features = [], [], []
    for piece in pieces:
        for image in piece.images.images if piece.images else ():
            total = sum(end - start for start, end in image.runs)
            feature = first.get(image.key, sum(counts))
            for start, end in image.runs:
                low, high = max(start, piece.offset), min(end, piece.offset + piece.length)
                if low < high:
                    if image.key not in first:
                        first[image.key] = feature
                        counts.append(total)
                    row = piece.row + low - piece.offset
                    rows.append(np.arange(row, row + high - low))
                    features.append(np.arange(high - low) + feature + low - start)
                    blocks.append(Block(row, row + high - low, (*piece.above, (piece.row, row))))
                feature += end - start
    index = [torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *x])).to(device) for x in (rows, features)]
    found = (image for piece in pieces for image in (piece.images.images if piece.images else ()))
    contents = {image.key: image.content for image in found if image.content is not None}
    return ImageRows(list(first), counts, index[0], index[1], blocks, _position_ids(pieces, device), contents)


def forest_pieces(samples: Sequence[Sample], through: Sequence[int], nodes: Sequence[Node]) -> list[Piece]:
    """A piece a node; ``through``: a sample that goes through each."""
    above: list[tuple[tuple[int, int], ...]] = []
    for node in nodes:
        parent = nodes[node.parent]
        above.append((*above[node.parent], (parent.start, parent.end)) if node.parent >= 0 else ())
    return [
        Piece(samples[b].images, node.start, node.offset, node.length, rows)
        for b, node, rows in zip(through, nodes, above, strict=True)
    ]


def next_position(prompt: Sequence[int], images: PromptImages | None) -> int:
    """The position of the first token behind a prompt. An image of h x w rows moves three-dimensional positions by max(h, w)."""
    if images is None or images.positions is None:
        return len(prompt)
    return max(map(max, images.positions)) + 1 + len(prompt) - len(images.positions[0])


def predicted_ids(sample: Sample) -> list[int]:
    """The tokens behind the prompt, as targets of log-probs. Those of an image that the model was told, which are in no loss, are
    id 0: their own has no probability, and may be beyond the vocabulary."""
    first, ids = len(sample.prompt_ids), sample.token_ids
    for image in sample.images.images if sample.images else ():
        for start, end in image.runs:
            if start >= first:
                ids = [*ids[: start - first], *[0] * (end - start), *ids[end - first :]]
    return ids


def shown_tokens(request: Request, count: int | None = None) -> tuple[int | str, ...]:
    """The first ``count`` tokens of a request (default: all), and keys of images in place of theirs: equal where the same was
    shown."""
    found: list[int | str] = [*request.token_ids]
    for image in request.images.images if request.images else ():
        for start, end in image.runs:
            found[start:end] = [image.key] * (end - start)
    return tuple(found[:count])


def token_keys(samples: Sequence[Sample]) -> list[np.ndarray]:
    """[P + R] uint32 of each sample: token ids, and numbers of images in place of their placeholders. Equal where, and only where,
    the same tokens and images are."""
    numbers: dict[str, int] = {}
    prompts = {id(sample.prompt_ids): sample.prompt_ids for sample in samples}  # a group has one list
    arrays = {number: array("I", ids) for number, ids in prompts.items()}  # reads a list in half of numpy's time
    keys = []
    for sample in samples:
        key = np.array(arrays[id(sample.prompt_ids)] + array("I", sample.token_ids), dtype=np.uint32)
        for image in sample.images.images if sample.images else ():
            for start, end in image.runs:
                key[start:end] = numbers.setdefault(image.key, FIRST_KEY + len(numbers))
        keys.append(key)
    return keys


def _position_ids(pieces: Sequence[Piece], device: torch.device | str) -> Tensor | None:
    if not any(piece.images and piece.images.positions for piece in pieces):
        return None
    return torch.from_numpy(np.concatenate([*map(_positions, pieces)], axis=1)).to(device)


def _positions(piece: Piece) -> np.ndarray:
    """[3, length]: those of the prompt, and behind it one more a token."""
    end = piece.offset + piece.length
    if piece.images is None or piece.images.positions is None:
        return np.tile(np.arange(piece.offset, end), (3, 1))
    given = np.array(piece.images.positions, dtype=np.int64)
    behind = np.arange(max(0, end - given.shape[1])) + given.max() + 1
    return np.concatenate([given, np.tile(behind, (3, 1))], axis=1)[:, piece.offset : end]


def placeholder_runs(
    ids: Sequence[int], placeholder: int, counts: Sequence[Sequence[int]]
) -> list[tuple[tuple[int, int], ...]]:
    """Runs of each image in expanded ids.

    Args:
        counts: of each image, the tokens of each of its runs.

    Raises:
        ValueError: the ids have other runs of placeholders.
    """
    found = iter(list(_runs(ids, placeholder)))
    images = []
    left: tuple[int, int] | None = None
    for wanted in counts:
        runs = []
        for count in wanted:
            start, end = left or next(found, (0, 0))
            if end - start < count:
                raise ValueError(f"{end - start} image tokens where an image has {count}")
            runs.append((start, start + count))
            left = (start + count, end) if start + count < end else None  # images may follow each other directly
        images.append(tuple(runs))
    if left or next(found, None):
        raise ValueError("more image tokens than the images have")
    return images


def _runs(ids: Sequence[int], placeholder: int) -> Iterator[tuple[int, int]]:
    at = np.flatnonzero(np.array(ids) == placeholder)
    for run in np.split(at, np.flatnonzero(np.diff(at) > 1) + 1):
        if len(run):
            yield int(run[0]), int(run[-1]) + 1
