"""Two exact ways to let completions attend to their prompt, and a cost model that picks the faster one for given lengths.

``two_passes`` copies nothing, but passes over all completion rows twice. ``copied_keys`` copies the prompt's keys and values in
front of each completion's (one pass; the method of PrefixGrouper), which is cheap where prompts are short and completions long.
Both compute each prompt once everywhere else, and both are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Passes = Literal["two_passes", "copied_keys"]

TWO_PASSES_NS_PER_MIB = 7700.0
COPIED_KEYS_NS_PER_MIB = 4760.0
"""Time that each way adds to forward and backward of one layer, for each MiB (bf16) of completion rows' queries (two passes) or of
copied keys and values. Fitted to measurements on an H100 with flash4 (benchmarks/h100_attention_plans.json): they pick the faster
way in 29 of 30 shapes, at worst one that takes 1.06 times as long."""
TWO_PASSES_NS = 155_000.0
"""Time of the additional launches of two passes."""


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """How a policy's attention is computed on its device.

    Attributes:
        kernel: a name in ``kernels/flash.py``.
        heads, kv_heads, head_dim: of the model.
        passes: one of the two ways; ``auto`` picks the faster one for each batch.
        reason: why this kernel was taken.
    """

    kernel: str = "builtin"
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 1
    passes: Literal["auto", "two_passes", "copied_keys"] = "two_passes"
    reason: str = ""

    def choose(self, prefix_lens: Sequence[int], suffix_lens: Sequence[Sequence[int]]) -> Passes:
        """The faster way for groups with these prefix lengths [N] and suffix lengths [N][G]."""
        if self.passes != "auto":
            return self.passes
        suffix_rows = sum(map(sum, suffix_lens))
        copied_rows = sum(prefix_lens) + sum(p + s for p, ss in zip(prefix_lens, suffix_lens, strict=True) for s in ss)
        mib = 2 * self.head_dim / 2**20
        two_passes = TWO_PASSES_NS + TWO_PASSES_NS_PER_MIB * suffix_rows * self.heads * mib
        copied_keys = COPIED_KEYS_NS_PER_MIB * copied_rows * 2 * self.kv_heads * mib
        return "copied_keys" if copied_keys < two_passes else "two_passes"
