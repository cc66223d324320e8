"""Two exact ways to let a node attend to its ancestors, and a cost model that picks the faster one for each depth.

``between_depths`` copies nothing: one more pass for each pair of depths, over all rows of the deeper one. ``copied_keys`` copies
the ancestors' keys and values in front of each descendant's own (no more passes; for prompts, the method of PrefixGrouper), which
is cheap where ancestors are short and their descendants long. Both compute each node once everywhere else, and both are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

PASS_NS_PER_MIB = 7700.0
COPY_NS_PER_MIB = 4760.0
"""Time that each way adds to forward and backward of one layer, for each MiB (bf16) of a pass's queries or of copied keys and
values. Fitted to measurements on an H100 with flash4 (benchmarks/h100_attention_plans.json): they pick the faster way in 29 of 30
shapes, at worst one that takes 1.06 times as long."""
PASS_NS = 155_000.0
"""Time of a pass's launches."""
UPDATE_FLOPS_PER_NS = {"cuda": 430e3, "cpu": 60.0}
"""FLOPs of an update in a nanosecond: 430 TFLOP/s, of Qwen3-4B on an H100. On a CPU a pass takes longer than these constants say,
about as long as 40 rows of a model with two layers and a hidden size of 64; the smaller rate makes up for it."""


class Ancestry(NamedTuple):
    """Sums over the nodes of one depth.

    Attributes:
        rows: their rows.
        copied_rows: rows that copies of them have, one in front of each descendant.
    """

    rows: int
    copied_rows: int


class Chosen(NamedTuple):
    """Depths whose nodes are copied in front of their descendants (others are read where they are), and the time that it adds to
    forward and backward of one layer."""

    copied: frozenset[int]
    ns: float


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """How a policy's attention is computed on its device.

    Attributes:
        kernel: a name in ``kernels/flash.py``.
        heads, kv_heads, head_dim: of the model.
        way: one of the two ways; ``auto`` picks the faster one for each depth of each batch.
        windows: the sliding windows of the model's layers, in tokens.
        flops_per_ns: FLOPs of all layers' matrices that take as long as a nanosecond in the attention of each; 0 if unknown.
        reason: why this kernel was taken.
    """

    kernel: str = "builtin"
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 1
    way: Literal["auto", "between_depths", "copied_keys"] = "between_depths"
    windows: tuple[int, ...] = ()
    flops_per_ns: float = 0.0
    reason: str = ""

    def choose(self, depths: Sequence[Ancestry]) -> Chosen:
        """The faster way for the nodes of each depth, shallowest first."""
        mib = 2 * self.head_dim / 2**20
        total = sum(depth.rows for depth in depths)
        copy_ns = COPY_NS_PER_MIB * 2 * self.kv_heads * mib
        passes = [
            sum(PASS_NS + PASS_NS_PER_MIB * below.rows * self.heads * mib for below in depths[d + 1 :])
            for d in range(len(depths))
        ]
        copies = [copy_ns * depth.copied_rows for depth in depths]
        ancestors = {d for d, depth in enumerate(depths) if depth.copied_rows}
        copied = {d for d in ancestors if self.way == "copied_keys" or copies[d] < passes[d]}

        def ns(copied: set[int]) -> float:  # with any copy, all rows are copied once
            own = copy_ns * total if copied else 0.0
            return own + sum(copies[d] if d in copied else passes[d] for d in ancestors)

        if self.way == "between_depths" or (self.way == "auto" and ns(set()) <= ns(copied)):
            copied = set()
        return Chosen(frozenset(copied), ns(copied))
