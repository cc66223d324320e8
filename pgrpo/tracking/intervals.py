"""95% confidence intervals of an evaluation, over prompts: samples of one prompt are not independent of each other.

The held-out prompts count as a random draw of all possible prompts (Miller, "Adding Error Bars to Evals", arXiv 2411.00640): more
samples a prompt narrow an interval only by averaging out the sampler's randomness, and never to width 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

Interval = tuple[float, float]
"""Low and high end; NaN for fewer than two prompts."""

Z = NormalDist().inv_cdf(0.975)


def mean_interval(clusters: Sequence[Sequence[float]]) -> Interval:
    """Interval of the mean of all values; ``clusters`` has one list a prompt, of any lengths.

    Miller's clustered standard error for C prompts with n values s in total: the square of each prompt's sum of (s - mean), summed
    over prompts and divided by n^2. The factor C / (C - 1) and Student's t with C - 1 degrees of freedom make it valid for few
    prompts.
    """
    clusters = [cluster for cluster in clusters if cluster]
    count = sum(map(len, clusters))
    if len(clusters) < 2:
        return math.nan, math.nan
    mean = sum(map(sum, clusters)) / count
    squares = sum(sum(value - mean for value in cluster) ** 2 for cluster in clusters)
    error = math.sqrt(squares * len(clusters) / (len(clusters) - 1)) / count
    half = student_t(len(clusters) - 1) * error
    return mean - half, mean + half


def rate_interval(rates: Sequence[float]) -> Interval:
    """Interval of the mean of one rate in [0, 1] a prompt (pass@k). It stays inside [0, 1], and its width is not 0 if all failed or
    all passed.

    Wilson's score interval for the effective sample size: the number of independent prompts with the observed standard error (Dean
    and Pagano, J. Surv. Stat. Methodol. 3 (2015) 484). If every rate is 0 or 1, that is the number of prompts, and this is Wilson's
    interval; with several samples a prompt it is larger.
    """
    prompts = len(rates)
    if prompts < 2:
        return math.nan, math.nan
    rate = sum(rates) / prompts
    variance = sum((r - rate) ** 2 for r in rates) / (prompts - 1) / prompts
    effective = rate * (1 - rate) / variance * (Z / student_t(prompts - 1)) ** 2 if variance else 0.0
    return wilson(rate, max(effective, prompts))


def wilson(rate: float, count: float) -> Interval:
    """Wilson's score interval (JASA 22 (1927) 209) of a success rate in ``count`` independent trials."""
    centre = (rate + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(rate * (1 - rate) / count + Z**2 / (4 * count**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def student_t(freedom: int, z: float = Z) -> float:
    """Quantile of Student's t at the probability of the normal quantile ``z``; 0.975 by default.

    Exact for 1 and 2 degrees of freedom. Otherwise the Cornish-Fisher series (Abramowitz and Stegun, 26.7.5): within 0.2% at the
    default ``z``, and at ``z`` = 5 from 15 degrees of freedom on.
    """
    p = NormalDist().cdf(z)
    if freedom == 1:
        return math.tan((p - 0.5) * math.pi)
    if freedom == 2:
        return (2 * p - 1) / math.sqrt(2 * p * (1 - p))
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))
