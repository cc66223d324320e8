"""The geometry of a packed batch: which rows are prompts, which are completions, and who attends to whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from pgrpo.attention.choose import AttentionChoice


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """All prefixes first, then all suffixes in the order of their groups.

    A suffix row attends to all of its own group's prefix and causally to its own suffix; a prefix row causally to its
    prefix. Without prefixes (no rows in the prefix block) every segment is an ordinary causal sequence.

    Attributes:
        cu_seqlens: [segments + 1] int32, starts of every segment (prefixes, then suffixes) and the end.
        cu_seqlens_prefix: [groups + 1] int32, the prefix segments alone.
        cu_seqlens_group: [groups + 1] int32, rows of the suffix block by group, counted from the suffix block's start.
        size_tensor: [5] int64 on the CPU, a ``Sizes``. A tensor, so that compiled code does not depend on the values.
        copies: the prefixes copied in front of their suffixes, or stand-ins (``longest_copy`` 0).
        max_sample: the longest sample, prompt and completion together.
        kernel: name of the flash kernel to use.
    """

    cu_seqlens: Tensor
    cu_seqlens_prefix: Tensor
    cu_seqlens_group: Tensor
    size_tensor: Tensor
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
        copied = any(prefix_lens) and choice.choose(prefix_lens, suffix_lens) == "copied_keys"
        copies = Copies.of(prefix_lens, suffix_lens, device) if copied else Copies.none(device)
        max_sample = max((p + max(s, default=0) for p, s in zip(prefix_lens, suffix_lens, strict=True)), default=0)
        sizes = Sizes(
            prefix_rows=sum(prefix_lens),
            longest_segment=max([*prefix_lens, *flat_suffixes], default=0),
            longest_prefix=max(prefix_lens, default=0),
            most_group_rows=max(group_rows, default=0),
            longest_copy=max_sample if copied else 0,
        )
        return PackedLayout(
            cu_seqlens=cumulative([*prefix_lens, *flat_suffixes], device),
            cu_seqlens_prefix=cumulative(prefix_lens, device),
            cu_seqlens_group=cumulative(group_rows, device),
            size_tensor=sizes.to_tensor(),
            copies=copies,
            max_sample=max_sample,
            kernel=choice.kernel,
        )

    @property
    def sizes(self) -> Sizes:
        return Sizes.from_tensor(self.size_tensor)


class Sizes(NamedTuple):
    """Sizes of a layout that kernels need on the CPU, in rows.

    Attributes:
        prefix_rows: rows of the prefix block.
        longest_segment: the longest prefix or suffix.
        longest_prefix: the longest prefix.
        most_group_rows: the most suffix rows of one group.
        longest_copy: the longest suffix with its prefix copied in front; 0 where no keys are copied.
    """

    prefix_rows: int
    longest_segment: int
    longest_prefix: int
    most_group_rows: int
    longest_copy: int

    def to_tensor(self) -> Tensor:
        """[5] int64 on the CPU."""
        return torch.tensor(self, dtype=torch.int64)

    @staticmethod
    def from_tensor(size_tensor: Tensor) -> Sizes:
        return Sizes(*size_tensor.tolist())


@dataclass(frozen=True, slots=True)
class Copies:
    """The copied keys: every segment's own rows, a suffix's behind a copy of its prefix. C copied rows.

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
