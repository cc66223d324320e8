"""Samples -> a forest: equal tokens after equal tokens are one row. Nobody declares what is shared; the token ids say it.

A system prompt S (2 tokens) shared by two prompts, A (1 token more; completions a of 2 tokens and a' of 1) and B (2 more; one
completion b of 2, which nothing else shares, so B and b are one node):

    row          0 1 | 2 | 3 4 5 6 | 7 8 | 9
    node         S S | A | B B b b | a a | a'
    position_ids 0 1 | 2 | 2 3 4 5 | 3 4 | 3
    parent       -     S   S         A     A
    logit_index  a: 2 7   a': 2   b: 4 5         the row that predicts each completion token

A node ends only where samples diverge: a sample may end inside a node, and equal samples share all of their rows. Samples are
sorted by their tokens, so that what shares a beginning lies together. How many leading tokens each has in common with the sample
before it is then all that the forest follows from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from pgrpo.types import Sample
from pgrpo.vision.rows import token_keys


@dataclass(frozen=True, slots=True)
class Forest:
    """The samples of a micro-batch and their nodes, in order of depth, children in the order of their parents.

    Attributes:
        samples: B samples.
        lengths, parents: of each node, in tokens; the number of its parent, -1 for a root.
        through: a sample that goes through the node.
        leaves: [B] the last node of each sample's path. The sample may end before the node does.
        is_filler: a copy that only keeps ranks in step: no token of it is in the loss or in a count.
        kept: leading tokens of all samples, whose rows need not be computed where ``model/kept.py`` keeps them.
        is_again: whether an earlier forest of the span has these rows.
        goes_on: whether that has samples of this forest's first prompt.
        span: forests from this one on that are passes of one kept prefix, on some rank at least.
    """

    samples: list[Sample]
    lengths: list[int]
    parents: list[int]
    through: list[int]
    leaves: list[int]
    is_filler: bool = False
    kept: int = 0
    is_again: bool = False
    goes_on: bool = False
    span: int = 1

    @staticmethod
    def of(samples: Sequence[Sample], least: int = 1) -> Forest:
        """Share every prompt, and every other beginning of at least ``least`` tokens."""
        return Sorted.of(samples).forest(least)

    @staticmethod
    def repeated(samples: Sequence[Sample]) -> Forest:
        """Share nothing: every sample has rows of its own."""
        numbers = list(range(len(samples)))
        return Forest(list(samples), [*map(length, samples)], [-1] * len(samples), numbers, numbers)

    @property
    def rows(self) -> int:
        """Number of rows of the packed batch."""
        return sum(self.lengths)


class Run(NamedTuple):
    """A node: samples ``first`` to ``end`` of a ``Sorted`` go through it; it has the tokens ``start`` to ``stop`` of each."""

    first: int
    end: int
    parent: int
    start: int
    stop: int


class Work(NamedTuple):
    """What runs of rows cost: rows at positions ``starts[i]`` to ``ends[i]`` of samples, ``scored[i]`` of their tokens with a
    log-prob."""

    starts: np.ndarray
    ends: np.ndarray
    scored: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        return self.ends - self.starts


@dataclass(frozen=True)
class Sorted:
    """Samples in the order of their tokens.

    Attributes:
        samples: B samples.
        order: [B] their numbers before they were sorted.
        lengths, prompts: [B] tokens of samples and of their prompts.
        shared: [B] leading tokens that are those of the sample before; 0 for the first.
    """

    samples: list[Sample]
    order: np.ndarray
    lengths: np.ndarray
    prompts: np.ndarray
    shared: np.ndarray

    @staticmethod
    def of(samples: Sequence[Sample]) -> Sorted:
        keys = token_keys(samples)
        order = sorted(range(len(keys)), key=[key.astype(">u4").tobytes() for key in keys].__getitem__)
        shared = [_equal(keys[a], keys[b]) for a, b in pairwise(order)]
        placed = [samples[i] for i in order]
        numbers = order, map(length, placed), (len(s.prompt_ids) for s in placed), [0, *shared][: len(placed)]
        return Sorted(placed, *(np.array(list(x), dtype=np.int64) for x in numbers))

    def take(self, kept: np.ndarray) -> Sorted:
        """Some of the samples, by their ascending numbers in this order."""
        shared = np.minimum.reduceat(self.shared[: kept[-1] + 1], np.concatenate([[0], kept[:-1] + 1]))
        shared[0] = 0
        numbers = self.order[kept], self.lengths[kept], self.prompts[kept], shared
        return Sorted([self.samples[i] for i in kept], *numbers)

    def runs(self, least: int) -> Iterator[Run]:
        """The nodes in order of depth. Where samples diverge, a beginning of fewer than ``least`` tokens is not shared, unless a
        prompt of all of them ends in it."""
        level = [(0, len(self.samples), -1, 0)] if self.samples else []
        count = 0
        while level:
            stack, level = level[::-1], []
            while stack:
                first, end, parent, start = stack.pop()
                stop, shortest, parts = self._diverge(first, end)
                if parts and stop - start < least and not start < shortest <= stop:
                    stack += [(a, b, parent, start) for a, b in reversed(parts)]
                    continue
                yield Run(first, end, parent, start, stop)
                level += [(a, b, count, stop) for a, b in parts]
                count += 1

    def _diverge(self, first: int, end: int) -> tuple[int, int, list[tuple[int, int]]]:
        """Where the samples of a run diverge, their shortest prompt, and the runs they part into, each in the order of first
        appearance. A sample that is the beginning of the next one does not diverge from it."""
        order, lengths, prompts, shared = self._lists
        if end - first == 1:
            return lengths[first], prompts[first], []
        live = first
        while live + 1 < end and lengths[live] <= shared[live + 1]:
            live += 1
        stop = min(shared[live + 1 : end], default=lengths[live])
        cuts = [first, *(i for i in range(live + 1, end) if shared[i] == stop), end]
        parts = sorted(pairwise(cuts), key=lambda part: min(order[part[0] : part[1]])) if live + 1 < end else []
        return stop, min(prompts[first:end]), parts

    @cached_property
    def _lists(self) -> list[list[int]]:
        return [x.tolist() for x in (self.order, self.lengths, self.prompts, self.shared)]

    def forest(self, least: int = 1) -> Forest:
        """The forest; its samples are in the order that they had before they were sorted."""
        runs = list(self.runs(least))
        rank = self.order.argsort()  # where each sample of the old order is now
        place = rank.argsort()  # and where each was
        leaves = np.zeros(len(self.samples), dtype=np.int64)
        for node, run in enumerate(runs):
            leaves[run.first : run.end] = node
        return Forest(
            [self.samples[i] for i in rank],
            [run.stop - run.start for run in runs],
            [run.parent for run in runs],
            [int(place[run.end - 1]) for run in runs],
            leaves[rank].tolist(),
        )

    def kept(self, runs: Iterable[Run]) -> np.ndarray:
        """[B] leading tokens whose rows are those of the sample before, in the forest of these nodes."""
        stops = np.zeros(len(self.samples), dtype=np.int64)
        for run in runs:
            stops[run.first + 1 : run.end] = run.stop
        return np.minimum(self.shared, stops)


def length(sample: Sample) -> int:
    """Tokens of a sample, prompt included."""
    return len(sample.prompt_ids) + len(sample.token_ids)


def _equal(a: np.ndarray, b: np.ndarray) -> int:
    """Number of leading elements that are equal."""
    most = min(len(a), len(b))
    return int(next(iter(np.flatnonzero(a[:most] != b[:most])), most))
