"""The geometry of a packed batch: which rows are prompts, which are completions, and who attends to whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """All prefixes first, then all suffixes in the order of their groups.

    A suffix row attends to all of its own group's prefix and causally to its own suffix; a prefix row causally to its
    prefix. Without prefixes (``num_prefix_rows`` 0) every segment is an ordinary causal sequence.

    Attributes:
        cu_seqlens: [segments + 1] int32, starts of every segment (prefixes, then suffixes) and the end.
        cu_seqlens_prefix: [groups + 1] int32, the prefix segments alone.
        cu_seqlens_group: [groups + 1] int32, rows of the suffix block by group, counted from the suffix block's start.
        num_prefix_rows: rows of the prefix block.
        max_seqlen: the longest segment.
        max_prefix: the longest prefix.
        max_group: the most suffix rows of one group.
        max_sample: the longest sample, prompt and completion together.
    """

    cu_seqlens: Tensor
    cu_seqlens_prefix: Tensor
    cu_seqlens_group: Tensor
    num_prefix_rows: int
    max_seqlen: int
    max_prefix: int
    max_group: int
    max_sample: int

    @staticmethod
    def from_lengths(
        prefix_lens: Sequence[int], suffix_lens: Sequence[Sequence[int]], device: torch.device | str = "cpu"
    ) -> PackedLayout:
        """Build the layout of groups with these prefix lengths [N] and suffix lengths [N][G]."""
        if len(prefix_lens) != len(suffix_lens):
            raise ValueError(f"{len(prefix_lens)} prefixes, but suffixes for {len(suffix_lens)} groups")
        flat_suffixes = [length for group in suffix_lens for length in group]
        group_rows = [sum(group) for group in suffix_lens]
        return PackedLayout(
            cu_seqlens=_cumulative([*prefix_lens, *flat_suffixes], device),
            cu_seqlens_prefix=_cumulative(prefix_lens, device),
            cu_seqlens_group=_cumulative(group_rows, device),
            num_prefix_rows=sum(prefix_lens),
            max_seqlen=max([*prefix_lens, *flat_suffixes], default=0),
            max_prefix=max(prefix_lens, default=0),
            max_group=max(group_rows, default=0),
            max_sample=max((p + max(s, default=0) for p, s in zip(prefix_lens, suffix_lens, strict=True)), default=0),
        )

    def attend(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, scale: float, layer: int) -> Tensor:
        """Grouped attention over the packed rows: [T, H, D]. ``layer`` is not used: a packed batch keeps no cache."""
        from pgrpo.attention.grouped import grouped_attention

        return grouped_attention(q_THD, k_TKD, v_TKD, self, scale)


def _cumulative(lengths: Sequence[int], device: torch.device | str) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
