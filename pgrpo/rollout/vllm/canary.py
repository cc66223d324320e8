"""Tests statistically whether the engine has the new weights. A single log-prob cannot tell: bfloat16 noise between engine and
policy, about 0.04 nats, exceeds what one step changes. Thousands of log-probs together can.

For tokens of the last batch, let ``old`` and ``new`` be the policy's log-probs before and after the update, and ``engine`` the
engine's. The slope of (engine - new) on (old - new) is about 0 if the engine has the new weights and about 1 if it still has the
old ones. The policy's noise is in ``new`` on both sides of the regression, which pulls the slope to a value below 0.5 where the
update changed little. So the alarm is a slope that exceeds 0.5 by several standard errors.

Noise differs by orders of magnitude between tokens (a near-certain token has none), so a few tokens would dominate a plain
least-squares slope: scale each token's pair to at most 1. Errors of a sample's tokens are correlated, since they share their
context: take the standard error from a jackknife over samples.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pgrpo.tracking.intervals import student_t
from pgrpo.types import Group, Sample

SAMPLES, CONTEXT, TOKENS = 64, 32, 64
"""The number of samples to score, and the prompt and completion tokens of each: four thousand log-probs detect a change as large as
the noise. The samples are short because vLLM holds the full logits of one sample at a time."""
SURE = 5.0
"""A false alarm is as unlikely as a normal variable this many standard deviations from its mean."""
LEAST_SAMPLES = 16
"""The fewest samples with changed log-probs that can raise an alarm."""
LARGEST_NOISE = 0.3
"""Mean |engine - new| in nats above which the engine computes a different function."""


class CanaryError(RuntimeError):
    """The engine does not sample from the policy's weights."""


class Slope(NamedTuple):
    """The slope of (engine - new) on (old - new), through the origin.

    Attributes:
        slope: about 0 with the new weights, about 1 with the old ones; nan if no log-prob changed.
        error: standard error, enlarged by Student's t for few samples; inf if too few samples changed.
        noise: mean |engine - new|, nats.
    """

    slope: float
    error: float
    noise: float


def other_experts(ours: Sequence[Tensor | None], theirs: Sequence[np.ndarray]) -> float:
    """The share of the policy's choices of experts that the engine did not make, over rows and layers.

    Args:
        ours: [L, A] a layer, of L rows; None for a layer without experts.
        theirs: L arrays [layers, A].
    """
    engine_LNA = torch.from_numpy(np.stack(theirs).astype(np.int64))
    same = [
        (experts_LA.unsqueeze(-1) == engine_LNA[:, layer].unsqueeze(1)).any(-1).float().mean().item()
        for layer, experts_LA in enumerate(ours)
        if experts_LA is not None
    ]
    return 1 - statistics.fmean(same)


def regress(old: Sequence[float], new: Sequence[float], engine: Sequence[float], lengths: Sequence[int]) -> Slope:
    """The slope for log-probs (nats) of the same tokens; sample i owns the next ``lengths[i]`` of them."""
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
    sums, at = [], 0  # each sample's sum of x * x and of x * y
    for length in lengths:
        ours = slice(at, at := at + length)
        sums.append((sum(a * a for a in x[ours]), sum(a * b for a, b in zip(x[ours], y[ours], strict=True))))
    assert at == len(x), "lengths do not add up to the number of tokens"
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
    """Raises CanaryError if the engine's weights are not the policy's."""
    if slope.slope - SURE * slope.error > 0.5:
        raise CanaryError(
            f"canary: the slope of (engine - new) on (old - new) log-probs is {slope.slope:.2f} +- {slope.error:.2f}, "
            "expected about 0: the engine still samples with the weights from before the last update"
        )
    if not slope.noise <= LARGEST_NOISE:  # nan too
        raise CanaryError(
            f"canary: the engine's log-probs differ from the policy's by {slope.noise:.3g} nats on average (allowed: "
            f"{LARGEST_NOISE}): vLLM computes another function. Check its version with `pgrpo doctor`, or set "
            "rollout.engine=embedded, which samples with the policy itself"
        )


def pick(groups: Sequence[Group], most_tokens: int = TOKENS) -> list[Sample]:
    """Choose the samples to score: the longest of every prompt first, then the next distinct ones, up to ``SAMPLES``. Each is cut
    to its first ``most_tokens`` tokens behind the end of its prompt, without images: any text whose log-probs the update changes
    will do."""
    ranked: list[list[Sample]] = []
    for group in groups:
        by_prompt: dict[tuple[int, ...], dict[tuple[int, ...], Sample]] = {}
        for sample in group.samples:
            by_prompt.setdefault(tuple(sample.prompt_ids), {})[tuple(_texts(sample)[1][:most_tokens])] = sample
        ranked += [sorted(own.values(), key=lambda s: len(s.token_ids), reverse=True) for own in by_prompt.values()]
    picked: list[Sample] = []
    for turn in range(max(map(len, ranked), default=0)):
        for samples in ranked:
            if turn < len(samples) and len(picked) < SAMPLES:
                context, ids = _texts(samples[turn])
                ids = ids[:most_tokens]
                picked.append(Sample(context, ids, [True] * len(ids), [0.0] * len(ids)))
    return picked


def _texts(sample: Sample) -> tuple[list[int], list[int]]:
    """The last tokens of the prompt that are text, and those behind it: an image has too many tokens to score."""
    ids, prompt = sample.prompt_ids + sample.token_ids, len(sample.prompt_ids)
    for image in reversed(sample.images.images if sample.images else ()):
        for start, end in reversed(image.runs):
            del ids[start:end]
            prompt -= max(0, min(end, prompt) - start)
    return ids[:prompt][-CONTEXT:] or sample.prompt_ids[:1], ids[prompt:]
