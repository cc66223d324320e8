"""Metrics of a step's groups, with TRL's names where TRL has one."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from pgrpo.algorithm.advantages import has_spread
from pgrpo.types import Group


def group_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Rewards and completion lengths (tokens). Reward metrics leave out samples whose reward is None."""
    episodes = [episode for group in groups for episode in group.episodes]
    lengths = [episode.sampled_tokens for episode in episodes]
    rewards = [[r for r in g.rewards if r is not None] for g in groups]
    metrics = {
        "reward": _mean([r for group in rewards for r in group]),
        "reward_std": _mean([statistics.stdev(group) for group in rewards if len(group) > 1]),
        "frac_reward_zero_std": _mean([not has_spread(g.rewards) for g in groups]),
        "completions/mean_length": _mean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": _mean([episode.finish_reason == "length" for episode in episodes]),
    }
    for name in episodes[0].reward_parts:
        metrics[f"rewards/{name}/mean"] = _mean([v for g in groups for v in g.reward_part(name) if v is not None])
    return metrics


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
