"""Samples -> a forest. The forest of a micro-batch is flat: the root of each tree is a prompt, and its leaves are the samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pgrpo.types import Group, Sample


@dataclass(frozen=True, slots=True)
class Tree:
    """A prompt, which is stored and computed once, and its samples."""

    prompt_ids: list[int]
    samples: Sequence[Sample]
    is_filler: bool = False
    """A copy that only keeps ranks in step: no token of it is in the loss or in a count."""

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each sample after the prompt."""
        return [len(sample.token_ids) for sample in self.samples]

    def with_samples(self, samples: Sequence[Sample]) -> Tree:
        """The same prompt with other samples."""
        return Tree(self.prompt_ids, samples)


def trees_of(groups: Iterable[Group]) -> list[Tree]:
    """One tree for each distinct prompt of each group, in order. A group has several if an episode rewrote its history."""
    trees = []
    for group in groups:
        by_prompt: dict[tuple[int, ...], list[Sample]] = {}
        for sample in group.samples:
            by_prompt.setdefault(tuple(sample.prompt_ids), []).append(sample)
        trees += [Tree(samples[0].prompt_ids, samples) for samples in by_prompt.values()]
    return trees


def packed_tokens(tree: Tree, share_prompts: bool = True) -> int:
    """Number of rows of the tree in a packed batch."""
    copies = 1 if share_prompts else len(tree.samples)
    return copies * len(tree.prompt_ids) + sum(tree.lengths)
