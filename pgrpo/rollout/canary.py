"""Does the engine have the new weights? Single log-probs cannot tell: bfloat16 noise between engine and policy, about 0.04, is
larger than what one step changes. Many together can.

For tokens of the last batch, let ``old`` and ``new`` be the policy's log-probs before and after the update, and ``engine`` the
engine's. The least-squares slope of (engine - new) on (old - new) is about 0 when the engine has the new weights, and about 1
when it still has the old ones: it is above 0.5 exactly when ``engine`` is closer to ``old`` than to ``new``. The policy's own noise
is in ``new`` on both sides, so where the update changed little the slope tends to 0.5, which says nothing: only what is far above,
in standard errors, is an alarm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from pgrpo.types import Group

SAMPLES, CONTEXT, TOKENS = 16, 32, 64
"""How many samples are scored, behind how much of their prompts, and how many of their tokens: a thousand log-probs see a change
of a tenth of the noise. Few rows in all, as an engine that scores keeps their full logits."""
SURE = 5.0
"""Standard errors above 0.5 that make a slope an alarm."""
LARGEST_NOISE = 0.3
"""Mean |engine - new| in nats above which the engine computes something else altogether."""


class CanaryError(RuntimeError):
    """The engine does not sample from the policy's weights."""


class Slope(NamedTuple):
    """The regression of (engine - new) on (old - new), through the origin.

    Attributes:
        slope: about 0 with the new weights, about 1 with the old ones; nan if nothing changed.
        error: its standard error; inf if nothing changed.
        noise: mean |engine - new|, nats.
    """

    slope: float
    error: float
    noise: float


def regress(old: Sequence[float], new: Sequence[float], engine: Sequence[float]) -> Slope:
    """The slope, of log-probs of the same tokens (natural logarithm)."""
    x = [a - b for a, b in zip(old, new, strict=True)]
    y = [a - b for a, b in zip(engine, new, strict=True)]
    noise = sum(map(abs, y)) / max(len(y), 1)
    sum_xx = sum(a * a for a in x)
    if sum_xx == 0.0 or len(x) < 2:
        return Slope(math.nan, math.inf, noise)
    slope = sum(a * b for a, b in zip(x, y, strict=True)) / sum_xx
    residual = sum((b - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    return Slope(slope, math.sqrt(residual / (len(x) - 1) / sum_xx), noise)


def check(slope: Slope) -> None:
    """Raises CanaryError if the engine has other weights than the policy."""
    if slope.slope - SURE * slope.error > 0.5:
        raise CanaryError(
            f"canary: the slope of (engine - new) on (old - new) log-probs is {slope.slope:.2f} +- {slope.error:.2f}, about 0 was "
            "expected: the engine still samples with the weights of before the last update"
        )
    if not slope.noise <= LARGEST_NOISE:  # nan too
        raise CanaryError(
            f"canary: the engine's log-probs are {slope.noise:.3g} nats from the policy's on average (allowed: "
            f"{LARGEST_NOISE}): it computes something else. Is vLLM's version one that pgrpo supports? "
            "rollout.engine=embedded samples with the policy itself"
        )


def pick(groups: Sequence[Group], most_tokens: int = TOKENS) -> list[Group]:
    """The samples to score, one a group: the first ``most_tokens`` tokens of a completion behind the end of its prompt. Any text
    would do that the update changes."""
    picked = []
    for group in groups[:SAMPLES]:
        longest = max(group.completions, key=lambda c: len(c.token_ids))
        ids = longest.token_ids[:most_tokens]
        short = replace(
            longest, token_ids=ids, rollout_logprobs=longest.rollout_logprobs[:most_tokens], mask=[True] * len(ids)
        )
        prompt = replace(group.prompt, token_ids=group.prompt.token_ids[-CONTEXT:])
        picked.append(Group(prompt, [short], rewards=[0.0], advantages=[0.0]))
    return picked
