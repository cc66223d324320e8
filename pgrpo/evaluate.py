"""Mean reward and pass@k on the held-out split."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pgrpo.distributed import World
from pgrpo.metrics import group_metrics, pass_at_k
from pgrpo.rewards.run import RewardRunner
from pgrpo.types import Group, Prompt, SamplingParams

Generate = Callable[[Sequence[Prompt], SamplingParams, Sequence[Sequence[int]]], list[Group]]


def evaluate(
    generate: Generate,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    seeds: Sequence[Sequence[int]],
    rewards: RewardRunner,
    world: World,
    *,
    full_score: float,
) -> tuple[dict[str, float], list[Group]]:
    """Sample ``len(seeds[n])`` completions of each prompt, shared out among ranks, and score them.

    Returns:
        ``eval/reward``, ``eval/rewards/<name>/mean``, ``eval/completions/...``, ``eval/pass@1`` and ``eval/pass@k``, for
        which a sample is correct when its total reward is at least ``full_score``; and the scored groups, on every rank.
    """
    # Every rank must decode the same number of prompts: the last one is repeated, and left out of the result.
    padded = -(-len(prompts) // world.size) * world.size
    indices = world.share([min(i, len(prompts) - 1) for i in range(padded)])
    groups = generate([prompts[i] for i in indices], params, [seeds[i] for i in indices])
    world.together(lambda: rewards.score(groups), break_off=True)
    groups = world.gather(groups)[: len(prompts)]
    metrics = group_metrics(groups)
    samples = len(seeds[0])
    correct = [sum(r is not None and r >= full_score for r in g.rewards) for g in groups]
    for k in {1, samples}:
        metrics[f"pass@{k}"] = sum(pass_at_k(c, samples, k) for c in correct) / len(groups)
    dropped = ("reward_std", "frac_reward_zero_std")
    return {f"eval/{name}": value for name, value in metrics.items() if name not in dropped}, groups
