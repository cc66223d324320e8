"""Group-relative advantages (GRPO: DeepSeekMath, arXiv 2402.03300, section 4.1.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

EPS = 1e-4
"""Added to the standard deviation, so that nearly equal rewards do not give huge advantages."""

Scale = Literal["group", "batch", "none"]
Baseline = Literal["group_mean", "leave_one_out"]
Rewards = Sequence[float | None]


def step_advantages(
    rewards: Sequence[Rewards], scale: Scale = "group", baseline: Baseline = "group_mean"
) -> list[list[float]]:
    """``group_advantages`` of each group of a step. The scale ``batch`` is the standard deviation of all rewards of the step."""
    together = standard_deviation([r for group in rewards for r in group if r is not None])
    return [group_advantages(group, scale, baseline, batch_std=together) for group in rewards]


def group_advantages(
    rewards: Rewards, scale: Scale = "group", baseline: Baseline = "group_mean", *, batch_std: float = 0.0
) -> list[float]:
    """Advantage of each sample: its reward minus the group's baseline, scaled.

    Args:
        rewards: one total a sample; None leaves the sample out, and its advantage is 0.
        scale: ``group`` divides by the group's standard deviation (n - 1 in the denominator) plus 1e-4; ``batch`` by
            ``batch_std`` plus 1e-4 (arXiv 2508.08221); ``none`` does not divide (Dr. GRPO, arXiv 2503.20783, section 3.2).
        baseline: ``group_mean``, or ``leave_one_out``: the mean of the group's other samples (RLOO, arXiv 2402.14740); the
            difference to it is n / (n - 1) times as large.
        batch_std: standard deviation of the rewards of all samples of the step, on all ranks.

    Returns:
        One number a sample: exactly 0 in a group whose rewards are all equal. Tested by max == min, as rounding can make a
        computed mean differ from them.
    """
    present = [r for r in rewards if r is not None]
    if not has_spread(rewards):
        return [0.0] * len(rewards)
    mean, divisor = math.fsum(present) / len(present), 1.0
    if scale != "none":
        divisor = (standard_deviation(present) if scale == "group" else batch_std) + EPS
    if baseline == "leave_one_out":
        divisor *= (len(present) - 1) / len(present)
    return [0.0 if r is None else (r - mean) / divisor for r in rewards]


def standard_deviation(values: Sequence[float]) -> float:
    """With n - 1 in the denominator; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.hypot(*(v - mean for v in values)) / math.sqrt(
        len(values) - 1
    )  # hypot: squares of large rewards would overflow


def has_spread(rewards: Rewards) -> bool:
    """Whether the rewards differ. If not, all advantages are 0 and the group has no policy gradient."""
    present = [r for r in rewards if r is not None]
    return bool(present) and max(present) != min(present)
