"""Metrics of what episodes counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import get_args

from pgrpo.types import FinishReason, Group


def turn_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Turns, calls and ends of episodes with tools; nothing for single turns."""
    episodes = [episode for group in groups for episode in group.episodes]
    if not any(episode.counts for episode in episodes):
        return {}
    totals = Counter[str]()
    for episode in episodes:
        totals.update(episode.counts)
    calls, count = totals["calls"], len(episodes)
    metrics = {
        "episodes/turns/mean": totals["turns"] / count,
        "episodes/samples/mean": sum(len(e.samples) for e in episodes) / count,
        "episodes/read_tokens/mean": sum(len(e.token_ids) - e.sampled_tokens for e in episodes) / count,
        "episodes/seconds_in_calls/mean": totals["seconds"] / count,
        "episodes/cut_results": float(totals["cut_results"]),
        "tools/call_frequency": calls / count,
        "tools/bad_call_frequency": totals["bad_calls"] / calls if calls else 0.0,
        "tools/failure_frequency": totals["failures"] / calls if calls else 0.0,
    }
    for reason in get_args(FinishReason):
        metrics[f"episodes/end/{reason}"] = sum(e.finish_reason == reason for e in episodes) / count
    for name in sorted(name.removesuffix("/calls") for name in totals if name.endswith("/calls")):
        own = totals[f"{name}/calls"]
        metrics[f"tools/{name}/call_frequency"] = own / count
        metrics[f"tools/{name}/failure_frequency"] = totals[f"{name}/failures"] / own
        metrics[f"tools/{name}/latency_s"] = totals[f"{name}/seconds"] / own
    return metrics
