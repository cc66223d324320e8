"""A forest -> packed tensors -> per-sample tensors. Each tree's prompt is stored and computed once.

Shapes: T packed tokens, L tokens of all samples after their prompts, B samples, R tokens of the longest sample, N trees.

Two trees, prompt A (3 tokens) with samples of 2 and 3 tokens, prompt B (2 tokens) with samples of 1 and 2 tokens:

    row          0 1 2 | 3 4 | 5 6 | 7 8 9 | 10 | 11 12
    segment      A A A | B B | a a | a'a'a'| b  | b' b'
    position_ids 0 1 2 | 0 1 | 3 4 | 3 4 5 | 2  | 2  3
    logit_index  a: 2 5   a': 2 7 8   b: 4   b': 4 11     the row that predicts each token

The first token of every sample is predicted by the last row of its prompt, which the tree shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from pgrpo.attention.choose import AttentionChoice
from pgrpo.attention.layout import PackedLayout
from pgrpo.packing.forest import Tree, packed_tokens


@dataclass(slots=True)
class GroupedBatch:
    """One micro-batch.

    Attributes:
        inputs: arguments of the model by name: ``input_ids`` [T] int64 and ``position_ids`` [T] int64. Positions of a sample
            continue those of its prompt.
        layout: who attends to whom.
        logit_index: [L] int64, the packed row that predicts each token, sample by sample.
        target_ids: [L] int64, these tokens.
        unpack_index: [L] int64, their positions in a flattened [B, R].
        mask: [B, R] bool, True on tokens in the loss.
        advantages: [B, R] float32, 0 where there is no token.
        rollout_logprobs: [B, R] float32, 0 where there is no token.
        counted_tokens: number of packed tokens, without those of fillers.
        repeated_tokens: the same if every sample had its own copy of the prompt.
        old_logprobs: [B, R] float32; None until computed, if the current weights are those that sampled.
        teacher_logprobs: [B, R] float32 of a teacher, for all epochs; None until computed.
    """

    inputs: dict[str, Tensor]
    layout: PackedLayout
    logit_index: Tensor
    target_ids: Tensor
    unpack_index: Tensor
    mask: Tensor
    advantages: Tensor
    rollout_logprobs: Tensor
    counted_tokens: int
    repeated_tokens: int
    old_logprobs: Tensor | None = None
    teacher_logprobs: Tensor | None = None

    @property
    def packed_tokens(self) -> int:
        """T."""
        return len(self.inputs["input_ids"])

    def unpack(self, flat_L: Tensor) -> Tensor:
        """[L] values, one a token -> [B, R] per-sample rows, 0 where there is no token."""
        return _unpack(flat_L, self.unpack_index, *self.mask.shape)


def build_batch(
    trees: Sequence[Tree],
    *,
    share_prompts: bool = True,
    device: torch.device | str = "cpu",
    attention: AttentionChoice | None = None,
) -> GroupedBatch:
    """Pack trees. ``share_prompts=False`` packs every sample with its own copy of the prompt: the same log-probs, more tokens.
    ``attention`` chooses the kernel and passes (default: PyTorch's own kernel and two passes)."""
    if share_prompts:
        prefixes = [tree.prompt_ids for tree in trees]
        suffixes = [[s.token_ids for s in tree.samples] for tree in trees]
    else:  # no prefix block; a suffix is a whole sample, and its first `head` rows are the prompt
        prefixes = [[] for _ in trees]
        suffixes = [[tree.prompt_ids + s.token_ids for s in tree.samples] for tree in trees]
    lengths = [len(p) for p in prefixes], [[len(s) for s in ss] for ss in suffixes]
    layout = PackedLayout.flat(*lengths, device, attention)
    flat_suffixes = [s for ss in suffixes for s in ss]
    input_ids = [t for segment in [*prefixes, *flat_suffixes] for t in segment]
    position_ids = [i for p in prefixes for i in range(len(p))]
    position_ids += [len(p) + i for p, ss in zip(prefixes, suffixes, strict=True) for s in ss for i in range(len(s))]

    samples = [sample for tree in trees for sample in tree.samples]
    width = max((len(s.token_ids) for s in samples), default=0)
    prefix_ends = list(accumulate(len(p) for p in prefixes))
    row = sum(map(len, prefixes))  # where the next suffix starts
    logit_index: list[int] = []
    unpack_index: list[int] = []
    b = 0
    for n, tree in enumerate(trees):
        head = 0 if share_prompts else len(tree.prompt_ids)
        for length in tree.lengths:
            if length:
                first = prefix_ends[n] - 1 if share_prompts else row + head - 1
                logit_index.append(first)
                logit_index.extend(range(row + head, row + head + length - 1))
                unpack_index.extend(range(b * width, b * width + length))
            row += head + length
            b += 1

    def long(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    unpack = long(unpack_index)

    def rows(values: list[list[float]] | list[list[bool]], dtype: torch.dtype) -> Tensor:
        """One value a token -> [B, R]."""
        flat_L = torch.tensor([x for sample in values for x in sample], dtype=dtype, device=device)
        return _unpack(flat_L, unpack, len(samples), width)

    return GroupedBatch(
        inputs={"input_ids": long(input_ids), "position_ids": long(position_ids)},
        layout=layout,
        logit_index=long(logit_index),
        target_ids=long([t for s in samples for t in s.token_ids]),
        unpack_index=unpack,
        mask=rows([s.mask for s in samples], torch.bool),
        advantages=rows([s.advantages or [0.0] * len(s.token_ids) for s in samples], torch.float32),
        rollout_logprobs=rows([s.rollout_logprobs for s in samples], torch.float32),
        counted_tokens=sum(packed_tokens(tree, share_prompts) for tree in trees if not tree.is_filler),
        repeated_tokens=sum(packed_tokens(tree, share_prompts=False) for tree in trees if not tree.is_filler),
    )


def _unpack(flat_L: Tensor, unpack_index: Tensor, samples: int, width: int) -> Tensor:
    return flat_L.new_zeros(samples * width).index_copy(0, unpack_index, flat_L).view(samples, width)
