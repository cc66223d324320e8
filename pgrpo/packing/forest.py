"""Samples -> the forest that is packed. The forest of a micro-batch is flat: each tree has a prompt as its root and a leaf for each
sample behind it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pgrpo.types import Group, Sample


@dataclass(frozen=True, slots=True)
class Tree:
    """A prompt, stored and computed once, and the samples behind it."""

    prompt_ids: list[int]
    samples: Sequence[Sample]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample behind the prompt."""
        return [len(sample.token_ids) for sample in self.samples]

    def with_samples(self, samples: Sequence[Sample]) -> Tree:
        """The same prompt with other samples."""
        return Tree(self.prompt_ids, samples)


def trees_of(groups: Iterable[Group]) -> list[Tree]:
    """One tree for each distinct prompt of each group, in order: one a group, unless an episode rewrote its history."""
    trees = []
    for group in groups:
        by_prompt: dict[tuple[int, ...], list[Sample]] = {}
        for sample in group.samples:
            by_prompt.setdefault(tuple(sample.prompt_ids), []).append(sample)
        trees += [Tree(samples[0].prompt_ids, samples) for samples in by_prompt.values()]
    return trees


def packed_tokens(tree: Tree, share_prompts: bool = True) -> int:
    """Rows that the tree takes in a packed batch."""
    copies = 1 if share_prompts else len(tree.samples)
    return copies * len(tree.prompt_ids) + sum(tree.lengths)
