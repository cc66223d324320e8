"""Group-relative advantages (GRPO: DeepSeekMath, arXiv 2402.03300, section 4.1.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

EPS = 1e-4
"""Added to the standard deviation, so that a group of nearly equal rewards is not blown up."""


def group_advantages(rewards: Sequence[float | None], scale: Literal["group", "none"] = "group") -> list[float]:
    """Advantage of each sample over its group's mean.

    Args:
        rewards: one total a sample; None marks a sample that takes no part (its advantage is 0).
        scale: ``group`` divides by the group's standard deviation (n - 1 in the denominator) plus 1e-4;
            ``none`` does not (Dr. GRPO, arXiv 2503.20783, section 3.1).

    Returns:
        One number a sample: exactly 0 in a group whose rewards are all equal (max == min: a computed mean need not be
        equal to them).
    """
    present = [r for r in rewards if r is not None]
    if not has_spread(rewards):
        return [0.0] * len(rewards)
    mean = math.fsum(present) / len(present)
    divisor = 1.0
    if scale == "group":
        divisor = math.sqrt(math.fsum((r - mean) ** 2 for r in present) / (len(present) - 1)) + EPS
    return [0.0 if r is None else (r - mean) / divisor for r in rewards]


def has_spread(rewards: Sequence[float | None]) -> bool:
    """Whether the rewards differ; without spread a group has no policy gradient."""
    present = [r for r in rewards if r is not None]
    return bool(present) and max(present) != min(present)
