"""Two exact ways to let completions attend to their prompt, and a cost model that picks the faster one for given lengths.

``two_calls`` copies nothing, but reads all completion rows twice. ``concat`` copies the prompt's keys and values in front of each
completion's and makes one call (the method of PrefixGrouper), which is cheap where prompts are short and completions long. All
other operations compute each prompt once in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

PassPlan = Literal["two_calls", "concat"]

TWO_CALLS_NS_PER_MIB = 7700.0
CONCAT_NS_PER_MIB = 4760.0
"""Time that each way adds to forward and backward of one layer, for each MiB (bf16) of completion rows' queries (two_calls) or of
copied keys and values (concat). Measured by benchmarks/attention_plans.py on an H100 with flash4. In its 30 shapes
(benchmarks/h100_attention_plans.json) these constants pick the faster way 29 times, and once one that takes 1.06 times as long."""
TWO_CALLS_NS = 155_000.0
"""Time that two_calls adds for its additional kernel launches."""


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """How a policy's attention is computed on its device.

    Attributes:
        kernel: a name in ``kernels/flash.py``.
        heads, kv_heads, head_dim: of the model.
        plan: the way; ``auto`` picks the faster one for each batch.
        reason: why this kernel was chosen, for the log.
    """

    kernel: str = "builtin"
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 1
    plan: Literal["auto", "two_calls", "concat"] = "two_calls"
    reason: str = ""

    def choose(self, prefix_lens: Sequence[int], suffix_lens: Sequence[Sequence[int]]) -> PassPlan:
        """The way for groups with these prefix lengths [N] and suffix lengths [N][G]."""
        if self.plan != "auto":
            return self.plan
        suffix_rows = sum(map(sum, suffix_lens))
        copied_rows = sum(prefix_lens) + sum(p + s for p, ss in zip(prefix_lens, suffix_lens, strict=True) for s in ss)
        mib = 2 * self.head_dim / 2**20
        two_calls = TWO_CALLS_NS + TWO_CALLS_NS_PER_MIB * suffix_rows * self.heads * mib
        concat = CONCAT_NS_PER_MIB * copied_rows * 2 * self.kv_heads * mib
        return "concat" if concat < two_calls else "two_calls"
