"""Groups -> packed tensors -> per-sample tensors. The prompt of a group is stored, and computed, once.

Shapes: T packed tokens, L completion tokens of the batch, B samples, R tokens of the longest completion, N groups.

Two groups, prompt A (3 tokens) with completions of 2 and 3 tokens, prompt B (2 tokens) with completions of 1 and 2 tokens:

    row          0 1 2 | 3 4 | 5 6 | 7 8 9 | 10 | 11 12
    segment      A A A | B B | a a | a'a'a'| b  | b' b'
    position_ids 0 1 2 | 0 1 | 3 4 | 3 4 5 | 2  | 2  3
    cu_seqlens          [0, 3, 5, 7, 10, 11, 13]     every segment (prefixes, then suffixes)
    cu_seqlens_prefix   [0, 3, 5]                    rows of the prefix block
    cu_seqlens_group    [0, 5, 8]                    rows of the suffix block, by group
    logit_index  a: 2 5   a': 2 7 8   b: 4   b': 4 11     the row that predicts each completion token

The first token of every completion is predicted by the last prompt row, which the group shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from pgrpo.attention.choose import AttentionChoice
from pgrpo.attention.layout import PackedLayout
from pgrpo.types import Group


@dataclass(slots=True)
class GroupedBatch:
    """One micro-batch.

    Attributes:
        input_ids: [T] int64.
        position_ids: [T] int64, each completion goes on where its prompt ended.
        layout: who attends to whom.
        logit_index: [L] int64, the packed row that predicts each completion token, sample by sample.
        target_ids: [L] int64, the completion tokens.
        unpack_index: [L] int64, where each completion token lies in a flattened [B, R].
        mask: [B, R] bool, True on tokens that take part in the loss.
        advantages: [B] float32.
        rollout_logprobs: [B, R] float32, 0 where there is no token.
        repeated_tokens: packed tokens if every sample had its own copy of the prompt.
        old_logprobs: [B, R] float32 once they have been computed; None means "those of the current weights".
    """

    input_ids: Tensor
    position_ids: Tensor
    layout: PackedLayout
    logit_index: Tensor
    target_ids: Tensor
    unpack_index: Tensor
    mask: Tensor
    advantages: Tensor
    rollout_logprobs: Tensor
    repeated_tokens: int
    old_logprobs: Tensor | None = None

    def unpack(self, flat_L: Tensor) -> Tensor:
        """Values of the completion tokens [L] -> per-sample rows [B, R], 0 where there is no token."""
        flat_BR = flat_L.new_zeros(self.mask.numel()).index_copy(0, self.unpack_index, flat_L)
        return flat_BR.view(self.mask.shape)


def build_batch(
    groups: Sequence[Group],
    *,
    share_prompts: bool = True,
    device: torch.device | str = "cpu",
    attention: AttentionChoice | None = None,
) -> GroupedBatch:
    """Pack groups. ``share_prompts=False`` packs every sample as a sequence of its own: the same numbers, more tokens.
    ``attention`` is the policy's way of computing it (PyTorch's own kernel and two calls unless given)."""
    if share_prompts:
        prefixes = [g.prompt.token_ids for g in groups]
        suffixes = [[c.token_ids for c in g.completions] for g in groups]
    else:  # no prefix block; a suffix is a whole sample, the first `head` rows of which are its prompt
        prefixes = [[] for _ in groups]
        suffixes = [[g.prompt.token_ids + c.token_ids for c in g.completions] for g in groups]
    lengths = [len(p) for p in prefixes], [[len(s) for s in ss] for ss in suffixes]
    layout = PackedLayout.from_lengths(*lengths, device, attention)
    flat_suffixes = [s for ss in suffixes for s in ss]
    input_ids = [t for segment in [*prefixes, *flat_suffixes] for t in segment]
    position_ids = [i for p in prefixes for i in range(len(p))]
    position_ids += [len(p) + i for p, ss in zip(prefixes, suffixes, strict=True) for s in ss for i in range(len(s))]

    completions = [c for g in groups for c in g.completions]
    width = max((len(c.token_ids) for c in completions), default=0)
    prefix_ends = list(accumulate(len(p) for p in prefixes))
    row = layout.sizes.prefix_rows  # where the next suffix starts
    logit_index: list[int] = []
    unpack_index: list[int] = []
    sample = 0
    for n, group in enumerate(groups):
        head = 0 if share_prompts else len(group.prompt.token_ids)
        for completion in group.completions:
            length = len(completion.token_ids)
            if length:
                first = prefix_ends[n] - 1 if share_prompts else row + head - 1
                logit_index.append(first)
                logit_index.extend(range(row + head, row + head + length - 1))
                unpack_index.extend(range(sample * width, sample * width + length))
            row += head + length
            sample += 1

    def long(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    unpack = long(unpack_index)
    flat_mask = torch.tensor([m for c in completions for m in c.mask], dtype=torch.bool, device=device)
    flat_rollout = torch.tensor(
        [x for c in completions for x in c.rollout_logprobs], dtype=torch.float32, device=device
    )
    shape = len(completions), width
    size = shape[0] * shape[1]
    return GroupedBatch(
        input_ids=long(input_ids),
        position_ids=long(position_ids),
        layout=layout,
        logit_index=long(logit_index),
        target_ids=long([t for c in completions for t in c.token_ids]),
        unpack_index=unpack,
        mask=flat_mask.new_zeros(size).index_copy(0, unpack, flat_mask).view(shape),
        advantages=torch.tensor([a for g in groups for a in g.advantages], dtype=torch.float32, device=device),
        rollout_logprobs=flat_rollout.new_zeros(size).index_copy(0, unpack, flat_rollout).view(shape),
        repeated_tokens=sum(packed_tokens(g, share_prompts=False) for g in groups),
    )


def packed_tokens(group: Group, share_prompts: bool = True) -> int:
    """Rows that the group takes in a packed batch."""
    copies = 1 if share_prompts else len(group.completions)
    return copies * len(group.prompt.token_ids) + sum(len(c.token_ids) for c in group.completions)
