"""Groups of prompts, sampled and scored by all ranks together: what a training step and an evaluation begin with."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from pgrpo.distributed.world import World
from pgrpo.environments.episodes import Episodes
from pgrpo.rewards.runner import RewardRunner
from pgrpo.rewards.scoring import RewardReport
from pgrpo.tracking.live import counting
from pgrpo.types import Group, Prompt, SamplingParams

log = logging.getLogger(__name__)


class Scored(NamedTuple):
    """What one rank sampled and scored.

    Attributes:
        groups: this rank's, one a prompt.
        errors: episodes that a reward failed on and that take no part, on all ranks.
        rollout_s: seconds of sampling.
        reward_s: seconds of scoring after the sampling.
    """

    groups: list[Group]
    errors: int
    rollout_s: float
    reward_s: float


def sample_and_score(
    episodes: Episodes,
    rewards: RewardRunner,
    world: World,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    seeds: Sequence[Sequence[int]],
    purpose: str = "rollout",
) -> Scored:
    """Every rank samples and scores its share of the prompts, an episode for each of a prompt's seeds. Scoring of a group begins
    when it is finished, while others decode; an error in it is raised when sampling has ended. ``purpose`` begins the warning
    of rewards that failed. A collective call."""
    started = time.perf_counter()
    (own_prompts, count), (own_seeds, _) = world.share(prompts), world.share(seeds)
    scoring = rewards.begin()
    unit = "prompts" if world.size == 1 else "prompts of this rank"
    with counting(purpose, count, unit) as progress:

        def finished(position: int, group: Group) -> None:
            progress.done += 1
            if world.leads:
                scoring.add(position, group)

        groups = episodes.generate(own_prompts, params, own_seeds, count, finished)
    sampled = time.perf_counter()

    def finish() -> RewardReport:
        episodes.check(groups)
        return scoring.finish(groups if world.leads else [])

    report = world.together(finish, break_off=True)
    episodes.release(groups)
    if report.first_error:
        log.warning(
            "%s: %d completions left out, as a reward failed on them; the first error: %s",
            purpose, report.errors, report.first_error,
        )  # fmt: skip
    errors = world.sum(torch.tensor([report.errors], dtype=torch.float64, device=world.device)).item()
    return Scored(groups, int(errors), sampled - started, time.perf_counter() - sampled)


def to_main(world: World, prompts: Sequence[Prompt], groups: Sequence[Group]) -> list[Group]:
    """All ranks' groups on rank 0, none on the others. Prompts, whose columns may be large, do not travel: rank 0 has them."""
    episodes = world.to_main([group.episodes for group in groups])
    together = [Group(prompt, own) for prompt, own in zip(prompts, episodes, strict=world.is_main)]
    for group in together:  # what was one list in a rank is one again
        for sample in group.samples:
            if sample.prompt_ids == group.prompt.token_ids:
                sample.prompt_ids = group.prompt.token_ids
    return together
