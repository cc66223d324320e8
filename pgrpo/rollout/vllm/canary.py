"""Does the engine have the new weights? Single log-probs cannot tell: bfloat16 noise between engine and policy, about 0.04, is
larger than what one step changes. Many together can.

For tokens of the last batch, let ``old`` and ``new`` be the policy's log-probs before and after the update, and ``engine`` the
engine's. The slope of (engine - new) on (old - new) is about 0 when the engine has the new weights, and about 1 when it still has
the old ones. The policy's own noise is in ``new`` on both sides, so where the update changed little the slope tends to something
below 0.5, which says nothing: only what is far above, in standard errors, is an alarm.

Noise differs by orders of magnitude between tokens (a sure one has none), so that a plain least-squares slope is that of a few
tokens: each token's pair is scaled to a size of at most 1, and the error is a jackknife over samples, whose tokens share their
context and may be wrong together.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from pgrpo.algorithm.intervals import student_t
from pgrpo.packing.forest import Tree
from pgrpo.types import Sample

SAMPLES, CONTEXT, TOKENS = 64, 32, 64
"""How many samples are scored, behind how much of their prompts, and how many of their tokens: four thousand log-probs see a change
as large as the noise. vLLM holds the full logits of one sample at a time."""
SURE = 5.0
"""An alarm is as unlikely by chance as a number that many standard errors away, if errors are normal."""
LEAST_SAMPLES = 16
"""Fewer samples whose log-probs changed say nothing."""
LARGEST_NOISE = 0.3
"""Mean |engine - new| in nats above which the engine computes something else altogether."""


class CanaryError(RuntimeError):
    """The engine does not sample from the policy's weights."""


class Slope(NamedTuple):
    """The slope of (engine - new) on (old - new), through the origin.

    Attributes:
        slope: about 0 with the new weights, about 1 with the old ones; nan if nothing changed.
        error: its standard error, enlarged as Student's t asks where samples are few; inf where too few changed.
        noise: mean |engine - new|, nats.
    """

    slope: float
    error: float
    noise: float


def regress(old: Sequence[float], new: Sequence[float], engine: Sequence[float], lengths: Sequence[int]) -> Slope:
    """The slope, of log-probs (natural logarithm) of the same tokens, the next ``lengths[i]`` of which are sample i's."""
    x = [a - b for a, b in zip(old, new, strict=True)]
    y = [a - b for a, b in zip(engine, new, strict=True)]
    noise = sum(map(abs, y)) / max(len(y), 1)
    changes = [abs(a) for a in x if a]
    if not changes:
        return Slope(math.nan, math.inf, noise)
    usual = statistics.median(changes)
    sizes = [max(abs(a), usual) for a in x]
    x = [a / size for a, size in zip(x, sizes, strict=True)]
    y = [min(max(b / size, -2.0), 2.0) for b, size in zip(y, sizes, strict=True)]
    sums, at = [], 0  # of a sample's x x and x y
    for length in lengths:
        ours = slice(at, at := at + length)
        sums.append((sum(a * a for a in x[ours]), sum(a * b for a, b in zip(x[ours], y[ours], strict=True))))
    assert at == len(x), "lengths are those of other tokens"
    sums = [pair for pair in sums if pair[0]]
    xx, xy = map(sum, zip(*sums, strict=True))
    if len(sums) < LEAST_SAMPLES:
        return Slope(xy / xx, math.inf, noise)
    without = []
    for i in range(len(sums)):
        others_xx, others_xy = map(sum, zip(*sums[:i], *sums[i + 1 :], strict=True))
        without.append(others_xy / others_xx)
    variance = (len(sums) - 1) / len(sums) * sum((slope - xy / xx) ** 2 for slope in without)
    return Slope(xy / xx, math.sqrt(variance) * student_t(len(sums) - 1, SURE) / SURE, noise)


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


def pick(trees: Sequence[Tree], most_tokens: int = TOKENS) -> list[Tree]:
    """The samples to score, each in a tree of its own: the longest of every tree, then the next that are not the same, until
    there are enough. The first ``most_tokens`` tokens of a sample behind the end of its prompt; any text would do that the
    update changes."""
    ranked = []
    for tree in trees:
        distinct = {tuple(s.token_ids[:most_tokens]): s for s in tree.samples}
        ranked.append(sorted(distinct.values(), key=lambda s: len(s.token_ids), reverse=True))
    picked = []
    for turn in range(max(map(len, ranked), default=0)):
        for tree, samples in zip(trees, ranked, strict=True):
            if turn < len(samples) and len(picked) < SAMPLES:
                ids, prompt_ids = samples[turn].token_ids[:most_tokens], tree.prompt_ids[-CONTEXT:]
                picked.append(Tree(prompt_ids, [Sample(prompt_ids, ids, [True] * len(ids), [0.0] * len(ids))]))
    return picked
