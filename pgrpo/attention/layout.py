"""The geometry of a packed batch: which rows are prompts, which are completions, and who attends to whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from pgrpo.attention.choose import AttentionChoice


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """All prefixes first, then all suffixes in the order of their groups.

    A suffix row attends to all of its own group's prefix and causally to its own suffix; a prefix row causally to its
    prefix. Without prefixes (``num_prefix_rows`` 0) every segment is an ordinary causal sequence.

    Attributes:
        cu_seqlens: [segments + 1] int32, starts of every segment (prefixes, then suffixes) and the end.
        cu_seqlens_prefix: [groups + 1] int32, the prefix segments alone.
        cu_seqlens_group: [groups + 1] int32, rows of the suffix block by group, counted from the suffix block's start.
        numbers: [5] int64 on the CPU: rows of the prefix block, the longest segment, the longest prefix, the most suffix rows of
            one group, the longest copied segment. A tensor, so that torch.compile does not specialise on the values.
        copies: how prefixes are copied in front of their suffixes; placeholders where they are not (last of ``numbers`` 0).
        max_sample: the longest sample, prompt and completion together.
        kernel: name of the flash kernel to use.
    """

    cu_seqlens: Tensor
    cu_seqlens_prefix: Tensor
    cu_seqlens_group: Tensor
    numbers: Tensor
    copies: Copies
    max_sample: int
    kernel: str

    @staticmethod
    def from_lengths(
        prefix_lens: Sequence[int],
        suffix_lens: Sequence[Sequence[int]],
        device: torch.device | str = "cpu",
        choice: AttentionChoice | None = None,
    ) -> PackedLayout:
        """Build the layout of groups with these prefix lengths [N] and suffix lengths [N][G]."""
        if len(prefix_lens) != len(suffix_lens):
            raise ValueError(f"{len(prefix_lens)} prefixes, but suffixes for {len(suffix_lens)} groups")
        choice = choice or AttentionChoice()
        flat_suffixes = [length for group in suffix_lens for length in group]
        group_rows = [sum(group) for group in suffix_lens]
        concat = any(prefix_lens) and choice.choose(prefix_lens, suffix_lens) == "concat"
        copies = Copies.of(prefix_lens, suffix_lens, device) if concat else Copies.none(device)
        max_sample = max((p + max(s, default=0) for p, s in zip(prefix_lens, suffix_lens, strict=True)), default=0)
        longest = [[*prefix_lens, *flat_suffixes], prefix_lens, group_rows]
        numbers = [sum(prefix_lens), *(max(lengths, default=0) for lengths in longest), max_sample if concat else 0]
        return PackedLayout(
            cu_seqlens=cumulative([*prefix_lens, *flat_suffixes], device),
            cu_seqlens_prefix=cumulative(prefix_lens, device),
            cu_seqlens_group=cumulative(group_rows, device),
            numbers=torch.tensor(numbers, dtype=torch.int64),
            copies=copies,
            max_sample=max_sample,
            kernel=choice.kernel,
        )

    @property
    def num_prefix_rows(self) -> int:
        return int(self.numbers[0])

    def attend(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, scale: float, layer: int) -> Tensor:
        """Grouped attention over the packed rows: [T, H, D]. ``layer`` is unused: a packed batch has no cache."""
        from pgrpo.attention.grouped import grouped_attention

        return grouped_attention(q_THD, k_TKD, v_TKD, self, scale)


@dataclass(frozen=True, slots=True)
class Copies:
    """Key rows of ``concat``: those of every segment, with a copy of its prefix in front of each suffix. C copied rows.

    Attributes:
        source: [C] int64, the packed row of which each copied row is a copy.
        order: [C] int32, the copies sorted by their source.
        offsets: [T + 1] int32, where each packed row's copies begin in ``order``.
        cu_seqlens: [segments + 1] int32, starts of the key segments.
    """

    source: Tensor
    order: Tensor
    offsets: Tensor
    cu_seqlens: Tensor

    @staticmethod
    def of(prefix_lens: Sequence[int], suffix_lens: Sequence[Sequence[int]], device: torch.device | str) -> Copies:
        prefix_starts = [0, *accumulate(prefix_lens)]
        ranges = [torch.arange(a, a + n) for a, n in zip(prefix_starts, prefix_lens, strict=False)]
        lengths = list(prefix_lens)
        row = prefix_starts[-1]
        for start, prefix, suffixes in zip(prefix_starts, prefix_lens, suffix_lens, strict=False):
            for suffix in suffixes:
                if suffix:  # an empty suffix has no queries, so it gets no keys
                    ranges += [torch.arange(start, start + prefix), torch.arange(row, row + suffix)]
                lengths.append(prefix + suffix if suffix else 0)
                row += suffix
        source = torch.cat(ranges)
        order = source.argsort(stable=True)
        offsets = torch.zeros(row + 1, dtype=torch.int32)
        offsets[1:] = source.bincount(minlength=row).cumsum(0)
        return Copies(source.to(device), order.int().to(device), offsets.to(device), cumulative(lengths, device))

    @staticmethod
    def none(device: torch.device | str) -> Copies:
        """Placeholders of length 2: torch.compile treats lengths of 0 and 1 as constants."""
        placeholders = [torch.zeros(2, dtype=torch.int32, device=device) for _ in range(3)]
        return Copies(torch.zeros(2, dtype=torch.int64, device=device), *placeholders)


def cumulative(lengths: Sequence[int], device: torch.device | str) -> Tensor:
    """[0, a, a + b, ...] as int32."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
