"""Advantages of an episode's turns (``loss.turn_advantages``)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from pgrpo.algorithm.advantages import step_advantages
from pgrpo.config import LossConfig
from pgrpo.types import Episode, Group


def give_returns(groups: Sequence[Group], config: LossConfig) -> None:
    """Give each sampled token the advantage of its turn: the discounted return, compared with those of the same turn in
    the group's other episodes. A turn that no other episode reached has an advantage of 0.

    Args:
        groups: scored. Episodes without a reward get advantages of 0.
        config: the section ``loss``.
    """
    returns = [[returns_to_go(episode, config.turn_discount) for episode in group.episodes] for group in groups]
    turns = max((len(own) for group in returns for own in group), default=0)
    by_turn = [
        step_advantages([[own[t] if t < len(own) else None for own in group] for group in returns], config)
        for t in range(turns)
    ]
    for g, group in enumerate(groups):
        for e, episode in enumerate(group.episodes):
            for sample in episode.samples:
                sample.advantages = [by_turn[t][g][e] if 0 <= t < turns else 0.0 for t in sample.turns]


def returns_to_go(episode: Episode, discount: float) -> list[float]:
    """Of each turn, its value and all later ones, each worth ``discount`` times the one before it. What the reward has beyond the
    environment's values of turns is the last turn's. Empty without a reward."""
    if episode.reward is None or not (turns := int(episode.counts["turns"])):
        return []
    given = episode.turn_rewards
    values = [*given[:turns], *[0.0] * (turns - len(given))]
    values[-1] += episode.reward - sum(given[:turns])
    return [*accumulate(reversed(values), lambda later, value: value + discount * later)][::-1]
