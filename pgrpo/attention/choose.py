"""Two ways to let completions see their prompt, and which of them is faster for a batch of given lengths.

``two calls`` copies nothing, but passes over all completion rows twice. ``concat`` copies the prompt's keys and values in front
of each completion's (one call; the method of PrefixGrouper), which is cheap where prompts are short and completions long.
Both compute each prompt once everywhere else, and both are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

PassPlan = Literal["two_calls", "concat"]

TWO_CALLS_NS_PER_MIB = 7700.0
CONCAT_NS_PER_MIB = 4760.0
"""Time that a plan adds to forward and backward of one layer, for each MiB (bf16) of completion rows' queries (two calls) or of
copied keys and values (concat). Measured by benchmarks/attention_plans.py on an H100 with flash4, see
benchmarks/h100_attention_plans.json: they pick the faster plan in 29 of 30 shapes, at worst one that takes 1.06 times as long."""
TWO_CALLS_NS = 155_000.0
"""... and for the additional launches of two calls."""


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """How a policy's attention is computed on its device.

    Attributes:
        kernel: a name in ``kernels.py``.
        heads, kv_heads, head_dim: of the model.
        plan: ``auto`` picks the faster one for each batch.
        reason: why this kernel was taken.
    """

    kernel: str = "builtin"
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 1
    plan: Literal["auto", "two_calls", "concat"] = "two_calls"
    reason: str = ""

    def choose(self, prefix_lens: Sequence[int], suffix_lens: Sequence[Sequence[int]]) -> PassPlan:
        """The plan for groups with these prefix lengths [N] and suffix lengths [N][G]."""
        if self.plan != "auto":
            return self.plan
        suffix_rows = sum(map(sum, suffix_lens))
        copied_rows = sum(prefix_lens) + sum(p + s for p, ss in zip(prefix_lens, suffix_lens, strict=True) for s in ss)
        mib = 2 * self.head_dim / 2**20
        two_calls = TWO_CALLS_NS + TWO_CALLS_NS_PER_MIB * suffix_rows * self.heads * mib
        concat = CONCAT_NS_PER_MIB * copied_rows * 2 * self.kv_heads * mib
        return "concat" if concat < two_calls else "two_calls"
