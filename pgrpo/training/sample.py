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
        groups: those that are trained on, ``prompts_per_step`` of them, on every rank.
        all_groups: those that were given up for them too. Their rewards are the policy's; those of ``groups`` are a selection.
        metrics: seconds, errors of rewards, and what was sampled again.
    """

    groups: list[Group]
    all_groups: list[Group]
    metrics: dict[str, float] = field(default_factory=dict)


def sample_step(run: Run) -> Sampled:
    """Every rank samples and scores its share of the prompts, then all ranks hold all groups.

    Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): a group whose rewards are all equal makes room for one of a fresh
    prompt, in at most ``rollout.resample_limit`` extra rounds. All ranks hold the same groups, so they decide alike, and a
    prompt's seeds derive from its number in the step, so that any number of ranks samples the same.
    """
    config = run.config
    timings = {"time/rollout": 0.0, "time/reward": 0.0, "rewards/errors": 0.0}

    def round_of(count: int, first: int) -> list[Group]:
        prompts = run.stream.take(count)
        step, size = run.progress.step, config.rollout.group_size
        seeds = [sample_seeds(config.seed, step, first + i, group_size=size) for i in range(count)]
        return _generate_and_score(run, prompts, seeds, timings)

    with run.engine.awake():
        canary = run.canary.look() if run.canary else {}
        groups = round_of(config.rollout.prompts_per_step, 0)
        all_groups, rounds = list(groups), 0
        for _ in range(config.rollout.resample_limit):
            flat = [i for i, group in enumerate(groups) if not has_spread(group.rewards)]
            if not flat:
                break
            fresh = round_of(len(flat), len(all_groups))
            for i, group in zip(flat, fresh, strict=True):
                groups[i] = group
            all_groups += fresh
            rounds += 1
    metrics = timings | run.engine.timings | canary
    if config.rollout.resample_limit:
        still = sum(not has_spread(group.rewards) for group in groups)
        metrics |= {
            "resampling/rounds": rounds,
            "resampling/groups": len(all_groups) - len(groups),
            "resampling/frac_reward_zero_std": still / len(groups),
        }
    return Sampled(groups, all_groups, metrics)


def _generate_and_score(
    run: Run, prompts: Sequence[Prompt], seeds: Sequence[list[int]], metrics: dict[str, float]
) -> list[Group]:
    """One group a prompt, with rewards, on every rank. Adds to ``metrics``."""
    world, started = run.world, time.perf_counter()
    # Every rank gets the same number: the last prompt again and again, to be thrown away.
    missing = -len(prompts) % world.size
    prompts, seeds = [*prompts, *[prompts[-1]] * missing], [*seeds, *[seeds[-1]] * missing]
    own = run.engine.generate(world.share(prompts), sampling_params(run.config), world.share(seeds))
    sampled = time.perf_counter()
    report = world.together(lambda: run.rewards.score(own), break_off=True)
    if report.first_error:
        log.warning("%d completions are left out; the first: %s", report.errors, report.first_error)
    groups = world.gather(own)
    errors = world.sum(torch.tensor([report.errors], dtype=torch.float64, device=world.device)).item()
    metrics["rewards/errors"] += errors
    metrics["time/rollout"] += sampled - started
    metrics["time/reward"] += time.perf_counter() - sampled
    return groups[: len(prompts) - missing]
