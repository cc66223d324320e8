"""A forest -> packed tensors -> per-sample tensors. ``forest.py`` has a worked example.

Shapes: T packed tokens, L tokens of all samples behind their prompts, B samples, R tokens of the longest sample behind its prompt.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from pgrpo.attention.choose import AttentionChoice
from pgrpo.attention.layout import Node, PackedLayout, rows_of
from pgrpo.packing.forest import Forest, Work, length
from pgrpo.types import Sample
from pgrpo.vision.rows import ImageRows, forest_pieces, image_rows, predicted_ids


@dataclass(slots=True)
class GroupedBatch:
    """One micro-batch.

    Attributes:
        inputs: arguments of the model by name: ``input_ids`` [T] int64 and ``position_ids`` [T] int64, each row's position in its
            samples; [3, T] where images have positions of three dimensions.
        layout: who attends to whom.
        logit_index: [L] int64, the packed row that predicts each token, sample by sample.
        target_ids: [L] int64, these tokens; 0 for one of an image.
        distinct: [U] int64, of tokens that samples share (one row predicts one token) the first: U of the L tokens need a log-prob.
        pair_index: [L] int64, which of these each token is.
        unpack_index: [L] int64, their positions in a flattened [B, R].
        mask: [B, R] bool, True on tokens in the loss.
        advantages: [B, R] float32, 0 where there is no token.
        rollout_logprobs: [B, R] float32, 0 where there is no token.
        counts: numbers of tokens, all 0 for a filler.
        work: what the forward computes of each node; nothing for a filler.
        images: the rows of images; None if there are none.
        old_logprobs: [B, R] float32; None until computed, if the current weights are those that sampled.
        teacher_logprobs, ref_logprobs: [B, R] float32 of a teacher and of the reference, for all epochs; None until computed.
        kept: the layout of the other rows, if the first need not be computed where ``model/kept.py`` keeps them.
        span: batches from this one on that are passes of one kept prefix, on some rank at least.
    """

    inputs: dict[str, Tensor]
    layout: PackedLayout
    logit_index: Tensor
    target_ids: Tensor
    distinct: Tensor
    pair_index: Tensor
    unpack_index: Tensor
    mask: Tensor
    advantages: Tensor
    rollout_logprobs: Tensor
    counts: TokenCounts
    work: Work
    images: ImageRows | None = None
    old_logprobs: Tensor | None = None
    teacher_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    kept: PackedLayout | None = None
    span: int = 1

    @property
    def packed_tokens(self) -> int:
        """T."""
        return len(self.inputs["input_ids"])

    def unpack(self, flat_L: Tensor) -> Tensor:
        """[L] values, one a token -> [B, R] per-sample rows, 0 where there is no token."""
        return _unpack(flat_L, self.unpack_index, *self.mask.shape)


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Numbers of tokens.

    Attributes:
        packed: rows.
        repeated: rows if every sample had all of its own.
        shared_above_prompt: rows that prompts save by sharing their beginnings with each other.
    """

    packed: int = 0
    repeated: int = 0
    shared_above_prompt: int = 0

    @staticmethod
    def of(forest: Forest, nodes: list[Node]) -> TokenCounts:
        prompt_rows = [0 for _ in nodes]  # of each node, by the longest prompt that goes through it
        for sample, node in zip(forest.samples, forest.leaves, strict=True):
            while node >= 0:
                prompt_rows[node] = max(prompt_rows[node], len(sample.prompt_ids) - nodes[node].offset)
                node = nodes[node].parent
        distinct = {id(sample.prompt_ids): len(sample.prompt_ids) for sample in forest.samples}
        in_prompts = sum(min(rows, node.length) for rows, node in zip(prompt_rows, nodes, strict=True))
        again = forest.kept * forest.is_again
        above = sum(distinct.values()) - in_prompts + again * (not forest.goes_on)
        return TokenCounts(forest.rows - again, sum(map(length, forest.samples)), max(0, above))


def build_batch(
    forest: Forest, *, device: torch.device | str = "cpu", attention: AttentionChoice = AttentionChoice()
) -> GroupedBatch:
    """Pack a forest. ``attention`` chooses the kernel and the passes (default: PyTorch's own kernel and passes between depths)."""
    layout = PackedLayout(forest.lengths, forest.parents, device, attention)
    nodes, samples = layout.nodes, forest.samples
    input_ids = chain.from_iterable(
        _tokens(samples[b], node.offset, node.offset + node.length)
        for b, node in zip(forest.through, nodes, strict=True)
    )
    position_ids = rows_of([(node.offset, node.length) for node in nodes])
    width = max((len(s.token_ids) for s in samples), default=0)
    logit_index = rows_of(
        [r for s, leaf in zip(samples, forest.leaves, strict=True) for r in _predicting(nodes, s, leaf)]
    )
    target_ids = np.array([t for s in samples for t in predicted_ids(s)], dtype=np.int64)
    _, first, pair = np.unique(logit_index << 32 | target_ids, return_index=True, return_inverse=True)
    distinct = np.sort(first)
    unpack = torch.from_numpy(rows_of([(b * width, len(s.token_ids)) for b, s in enumerate(samples)])).to(device)

    def rows(values: Iterable[list[float]] | Iterable[list[bool]], dtype: torch.dtype) -> Tensor:
        """One value a token -> [B, R]."""
        flat_L = torch.tensor([x for sample in values for x in sample], dtype=dtype, device=device)
        return _unpack(flat_L, unpack, len(samples), width)

    images = image_rows(forest_pieces(samples, forest.through, nodes), device)
    positions_3T = images.position_ids if images else None
    starts = np.array([node.offset for node in nodes], dtype=np.int64)
    ends = starts + np.array(forest.lengths, dtype=np.int64)
    starts[:1] += forest.kept * forest.is_again
    node_of_row = np.repeat(np.arange(len(nodes)), forest.lengths)
    work = Work(starts, ends, np.bincount(node_of_row[logit_index[distinct]], minlength=len(nodes)))
    return GroupedBatch(
        inputs={
            "input_ids": torch.tensor(list(input_ids), dtype=torch.long, device=device),
            "position_ids": torch.from_numpy(position_ids).to(device) if positions_3T is None else positions_3T,
        },
        layout=layout,
        logit_index=torch.from_numpy(logit_index).to(device),
        target_ids=torch.from_numpy(target_ids).to(device),
        distinct=torch.from_numpy(distinct).to(device),
        pair_index=torch.from_numpy(np.searchsorted(distinct, first[pair])).to(device),
        unpack_index=unpack,
        mask=rows((s.mask for s in samples), torch.bool),
        advantages=rows((s.advantages or [0.0] * len(s.token_ids) for s in samples), torch.float32),
        rollout_logprobs=rows((s.rollout_logprobs for s in samples), torch.float32),
        counts=TokenCounts() if forest.is_filler else TokenCounts.of(forest, nodes),
        work=Work(*(x[: 0 if forest.is_filler else None] for x in work)),
        images=images,
        kept=_behind_kept(forest, device, attention) if forest.kept else None,
        span=forest.span,
    )


def _behind_kept(forest: Forest, device: torch.device | str, attention: AttentionChoice) -> PackedLayout:
    """The layout of the rows behind the kept ones. These are a node; what the first node has more is a child of it."""
    kept, (first, *lengths), parents = forest.kept, forest.lengths, forest.parents
    if first > kept:
        lengths, parents = [first - kept, *lengths], [-1, *(parent + 1 for parent in parents)]
    return PackedLayout([kept, *lengths], parents, device, attention, has_front=True)


def _tokens(sample: Sample, start: int, stop: int) -> list[int]:
    """Tokens ``start`` to ``stop`` of a sample, prompt included."""
    prompt = len(sample.prompt_ids)
    return sample.prompt_ids[start:stop] + sample.token_ids[max(0, start - prompt) : max(0, stop - prompt)]


def _predicting(nodes: list[Node], sample: Sample, leaf: int) -> list[tuple[int, int]]:
    """(first row, rows) that predict the tokens behind the prompt, in their order. Walks the path from its last node up."""
    first, end = len(sample.prompt_ids) - 1, length(sample) - 1  # positions of these rows
    found: list[tuple[int, int]] = []
    while leaf >= 0 and first < end:
        node = nodes[leaf]
        start, stop = max(first, node.offset), min(end, node.offset + node.length)
        if start < stop:
            found.append((start + node.start - node.offset, stop - start))
        leaf = node.parent
    return found[::-1]


def _unpack(flat_L: Tensor, unpack_index: Tensor, samples: int, width: int) -> Tensor:
    return flat_L.new_zeros(samples * width).index_copy(0, unpack_index, flat_L).view(samples, width)
