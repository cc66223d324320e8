"""Group-relative advantages (GRPO: DeepSeekMath, arXiv 2402.03300, section 4.1.2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain

from pgrpo.config import LossConfig
from pgrpo.types import Group

EPS = 1e-4
"""Added to the standard deviation, so that nearly equal rewards do not give huge advantages."""

Rewards = Sequence[float | None]


def compare(groups: Sequence[Group], config: LossConfig, weights: Mapping[str, float]) -> list[list[float]]:
    """The advantage of each episode of a step's groups.

    ``sum_then_normalize``: ``step_advantages`` of the total rewards. ``normalize_then_sum`` (GDPO, arXiv 2601.05242, equations 4
    to 7): ``step_advantages`` of each reward function alone, then their weighted sum, divided by its standard deviation over the
    step plus 1e-4. The mean that the paper subtracts is 0, as every reward's is in every group.

    Args:
        groups: scored.
        config: the section ``loss``.
        weights: name of each reward function -> its weight.
    """
    if config.combine_rewards == "sum_then_normalize" or not any(weights.values()):
        return step_advantages([group.rewards for group in groups], config)
    used = {name: weight for name, weight in weights.items() if weight}
    parts = [step_advantages([_part(group, name) for group in groups], config) for name in used]
    sums = [
        [math.fsum(w * a for w, a in zip(used.values(), values, strict=True)) for values in zip(*group, strict=True)]
        for group in zip(*parts, strict=True)
    ]
    pairs = zip(chain.from_iterable(group.rewards for group in groups), chain.from_iterable(sums), strict=True)
    counted = [value for reward, value in pairs if reward is not None]
    divisor = standard_deviation(counted) + EPS
    return [[value / divisor for value in values] for values in sums]


def rewards_differ(group: Group, config: LossConfig, weights: Mapping[str, float]) -> bool:
    """Whether the group's rewards differ, so that its advantages may: the totals, or with ``normalize_then_sum`` those of some
    function. If not, all of its advantages are 0."""
    if config.combine_rewards == "sum_then_normalize":
        return has_spread(group.rewards)
    return any(has_spread(_part(group, name)) for name, weight in weights.items() if weight)


def _part(group: Group, name: str) -> list[float | None]:
    """One function's rewards; None for episodes that take no part."""
    return [None if episode.reward is None else episode.reward_parts[name] for episode in group.episodes]


def step_advantages(rewards: Sequence[Rewards], config: LossConfig) -> list[list[float]]:
    """``group_advantages`` of each group of a step."""
    together = standard_deviation([r for group in rewards for r in group if r is not None])
    return [group_advantages(group, config, together) for group in rewards]


def group_advantages(rewards: Rewards, config: LossConfig, batch_std: float = 0.0) -> list[float]:
    """Advantage of each sample: its reward minus the group's baseline, scaled.

    Args:
        rewards: one total a sample; None leaves the sample out, and its advantage is 0.
        config: the section ``loss``. ``scale_advantages``: ``group`` divides by the group's standard deviation (n - 1 in the
            denominator) plus 1e-4; ``batch`` by ``batch_std`` plus 1e-4 (arXiv 2508.08221); ``none`` does not divide (Dr. GRPO,
            arXiv 2503.20783, section 3.2). ``advantage_baseline``: ``group_mean``, or ``leave_one_out``: the mean of the group's
            other samples (RLOO, arXiv 2402.14740); the difference to it is n / (n - 1) times as large.
        batch_std: standard deviation of the rewards of all samples of the step, on all ranks.

    Returns:
        One number a sample: exactly 0 in a group whose rewards are all equal. Tested by max == min, as rounding can make a
        computed mean differ from them.
    """
    present = [r for r in rewards if r is not None]
    if not has_spread(rewards):
        return [0.0] * len(rewards)
    mean, divisor = math.fsum(present) / len(present), 1.0
    if config.scale_advantages != "none":
        divisor = (standard_deviation(present) if config.scale_advantages == "group" else batch_std) + EPS
    if config.advantage_baseline == "leave_one_out":
        divisor *= (len(present) - 1) / len(present)
    return [0.0 if r is None else (r - mean) / divisor for r in rewards]


def standard_deviation(values: Sequence[float]) -> float:
    """With n - 1 in the denominator; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    mean = math.fsum(values) / len(values)
    # Squares of large rewards would overflow.
    return math.hypot(*(v - mean for v in values)) / math.sqrt(len(values) - 1)


def has_spread(rewards: Rewards) -> bool:
    """Whether the rewards differ. If not, all advantages are 0 and the group has no policy gradient."""
    present = [r for r in rewards if r is not None]
    return bool(present) and max(present) != min(present)
