"""Metrics of a step's groups, with TRL's names where TRL has one."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import get_args

from pgrpo.algorithm.advantages import has_spread
from pgrpo.types import Episode, FinishReason, Group


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
        values = [v for g in groups for v in g.reward_part(name) if v is not None]
        metrics[f"rewards/{name}/mean"] = _mean(values)
    return metrics | turn_metrics(episodes)


def turn_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """Turns, calls and ends of episodes with tools; nothing for single turns."""
    if not any(episode.counts for episode in episodes):
        return {}
    totals = Counter[str]()
    for episode in episodes:
        totals.update(episode.counts)
    calls, count = totals["calls"], len(episodes)
    metrics = {
        "episodes/turns/mean": totals["turns"] / count,
        "episodes/samples/mean": _mean([len(e.samples) for e in episodes]),
        "episodes/read_tokens/mean": _mean([len(e.token_ids) - e.sampled_tokens for e in episodes]),
        "episodes/seconds_in_calls/mean": totals["seconds"] / count,
        "episodes/cut_results": float(totals["cut_results"]),
        "tools/call_frequency": calls / count,
        "tools/bad_call_frequency": totals["bad_calls"] / calls if calls else 0.0,
        "tools/failure_frequency": totals["failures"] / calls if calls else 0.0,
    }
    for reason in get_args(FinishReason):
        metrics[f"episodes/end/{reason}"] = _mean([episode.finish_reason == reason for episode in episodes])
    for name in sorted(name.removesuffix("/calls") for name in totals if name.endswith("/calls")):
        own = totals[f"{name}/calls"]
        metrics[f"tools/{name}/call_frequency"] = own / count
        metrics[f"tools/{name}/failure_frequency"] = totals[f"{name}/failures"] / own
        metrics[f"tools/{name}/latency_s"] = totals[f"{name}/seconds"] / own
    return metrics


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of k samples is correct (Codex, arXiv 2107.03374, equation 1)."""
    failure = 1.0
    for i in range(k):
        failure *= max(samples - correct - i, 0) / (samples - i)
    return 1.0 - failure


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
