"""A step's groups: completions sampled and scored, and sampled again where a group has nothing to compare."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from pgrpo.algorithm.advantages import has_spread
from pgrpo.rollout.base import sample_seeds, sampling_params
from pgrpo.training.run import Run
from pgrpo.types import Group, Prompt

log = logging.getLogger(__name__)


@dataclass
class Sampled:
    """What one step sampled.

    Attributes:
        groups: those that are trained on, ``prompts_per_step`` of them. On rank 0 alone, as ``all_groups`` are.
        all_groups: those that were given up for them too. Their rewards are the policy's; those of ``groups`` are a selection.
        metrics: on rank 0 seconds, errors of rewards, and what was sampled again.
    """

    groups: list[Group]
    all_groups: list[Group]
    metrics: dict[str, float] = field(default_factory=dict)


def sample_step(run: Run) -> Sampled:
    """Every rank samples and scores its share of the prompts, and rank 0 gets them all.

    Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): a group whose rewards are all equal makes room for one of a fresh
    prompt, in at most ``rollout.resample_limit`` extra rounds. Rank 0 decides which, and a prompt's seeds derive from its number
    in the step, so that any number of ranks samples the same.
    """
    config, world = run.config, run.world
    timings = {"time/rollout": 0.0, "time/reward": 0.0, "rewards/errors": 0.0}

    def round_of(count: int, first: int) -> list[Group]:
        prompts = run.stream.take(count)
        step, size = run.progress.step, config.rollout.group_size
        seeds = [sample_seeds(config.seed, step, first + i, group_size=size) for i in range(count)]
        return _generate_and_score(run, prompts, seeds, timings)

    with run.engine.awake():
        canary = run.canary.look() if run.canary else {}
        sampled = config.rollout.prompts_per_step
        groups = round_of(sampled, 0)
        all_groups, rounds = list(groups), 0
        for _ in range(config.rollout.resample_limit):
            flat = world.from_main([i for i, group in enumerate(groups) if not has_spread(group.rewards)])
            if not flat:
                break
            fresh = round_of(len(flat), sampled)
            for i, group in zip(flat, fresh, strict=world.is_main):  # on the other ranks there are no groups
                groups[i] = group
            all_groups += fresh
            sampled += len(flat)
            rounds += 1
    metrics = timings | run.engine.timings | canary
    if config.rollout.resample_limit:
        still = sum(not has_spread(group.rewards) for group in groups)
        metrics |= {
            "resampling/rounds": rounds,
            "resampling/groups": sampled - config.rollout.prompts_per_step,
            "resampling/frac_reward_zero_std": still / config.rollout.prompts_per_step,
        }
    return Sampled(groups, all_groups, metrics)


def _generate_and_score(
    run: Run, prompts: Sequence[Prompt], seeds: Sequence[list[int]], metrics: dict[str, float]
) -> list[Group]:
    """One group a prompt, with rewards, on rank 0. Adds to ``metrics``."""
    world, started = run.world, time.perf_counter()
    (own_prompts, count), (own_seeds, _) = world.share(prompts), world.share(seeds)
    own = run.engine.generate(own_prompts, sampling_params(run.config), own_seeds)[:count]
    sampled = time.perf_counter()
    report = world.together(lambda: run.rewards.score(own if world.leads else []), break_off=True)
    if report.first_error:
        log.warning("%d completions are left out; the first: %s", report.errors, report.first_error)
    # Without the prompts, which rank 0 has: their columns may be large.
    scored = world.to_main([(g.completions, g.rewards, g.reward_parts) for g in own])
    groups = [Group(prompt, *parts) for prompt, parts in zip(prompts, scored, strict=world.is_main)]
    errors = world.sum(torch.tensor([report.errors], dtype=torch.float64, device=world.device)).item()
    metrics["rewards/errors"] += errors
    metrics["time/rollout"] += sampled - started
    metrics["time/reward"] += time.perf_counter() - sampled
    return groups
