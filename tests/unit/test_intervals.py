"""Confidence intervals against the formulas of their papers, written out, and against how often they hold in simulations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from pgrpo.tracking.intervals import mean_interval, rate_interval, student_t, wilson
from pgrpo.training.evaluation import pass_at_k


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 20, 127, 1000])
def test_student_t_has_this_much_of_the_density_within(freedom):
    """Integrated with t = sqrt(n) tan(x), where the density is cos(x)^(n - 1)."""
    end = math.atan(student_t(freedom) / math.sqrt(freedom))
    inside, whole = (np.linspace(0, top, 200_001) for top in (end, math.pi / 2 - 1e-12))
    share = np.trapezoid(np.cos(inside) ** (freedom - 1), inside) / np.trapezoid(np.cos(whole) ** (freedom - 1), whole)
    assert share == pytest.approx(0.95, abs=2e-4)


@pytest.mark.parametrize("freedom", [1, 2, 15, 20, 63])
def test_student_t_has_the_tail_of_a_normal_number_above_five(freedom):
    """The canary's alarm: 2.866516e-7, one in 3.5 million (the same integral, of what lies above)."""
    start = math.atan(student_t(freedom, 5.0) / math.sqrt(freedom))
    tail, half = (np.linspace(low, math.pi / 2, 200_001) for low in (start, 0.0))
    share = np.trapezoid(np.cos(tail) ** (freedom - 1), tail) / np.trapezoid(np.cos(half) ** (freedom - 1), half) / 2
    assert share == pytest.approx(2.866516e-7, rel=0.02)


def test_wilson_solves_its_equation():
    """The ends p of Wilson's interval are where (rate - p)^2 = z^2 p (1 - p) / n."""
    for rate, count in ((0.0, 20), (0.3, 10), (0.5, 128), (0.97, 256), (1.0, 5)):
        for end in wilson(rate, count):
            assert (rate - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / count, abs=1e-7)
    assert wilson(0.0, 20) == (0.0, pytest.approx(0.16113, abs=1e-5))  # the textbook value


def test_one_sample_a_prompt_gives_wilsons_interval():
    for right in range(9):
        assert rate_interval([1.0] * right + [0.0] * (8 - right)) == pytest.approx(wilson(right / 8, 8))


def test_the_clustered_error_is_millers_double_sum():
    rng = np.random.default_rng(0)
    clusters = [list(rng.normal(c, 1, size)) for c, size in enumerate((1, 4, 2, 4, 3))]
    flat = np.concatenate(clusters)
    total = sum((a - flat.mean()) * (b - flat.mean()) for cluster in clusters for a in cluster for b in cluster)
    error = math.sqrt(total / len(flat) ** 2 * 5 / 4)
    low, high = mean_interval(clusters)
    assert (low + high) / 2 == pytest.approx(flat.mean(), abs=1e-12)
    assert (high - low) / 2 == pytest.approx(2.776445 * error, rel=1e-3)
    assert mean_interval([[], *clusters, []]) == (low, high)  # prompts without a value take no part


def test_too_few_prompts_have_no_interval():
    for interval in (mean_interval([[1.0, 0.0]]), mean_interval([[], []]), rate_interval([0.5])):
        assert all(map(math.isnan, interval))


def holds(interval: Callable[[np.ndarray], Sequence[float]], draw: Callable[[], np.ndarray], truth: float) -> float:
    """How often an interval of a drawn data set has the truth in it, in 2,000 data sets (standard error 0.005 at 0.95)."""
    ends = [interval(draw()) for _ in range(2000)]
    return sum(low <= truth <= high for low, high in ends) / len(ends)


@pytest.mark.parametrize(("prompts", "samples", "least"), [(12, 4, 0.915), (50, 8, 0.935)])
@pytest.mark.parametrize("shape", [(0.4, 0.6), (2.0, 5.0)])
@pytest.mark.parametrize("k", [1, 4])
def test_intervals_of_pass_at_k_hold_95_times_in_100(prompts, samples, least, shape, k):
    """A prompt's chance is drawn from a Beta distribution; the true pass@k is the mean of 1 - (1 - chance)^k over it. With few
    prompts the coverage jumps around 0.95, as Wilson's does: summed over the binomial of 12, it is 0.932 at a rate of 0.626."""
    rng = np.random.default_rng(1)
    a, b = shape
    miss = math.prod((b + i) / (a + b + i) for i in range(k))  # the k-th moment of 1 - chance

    def draw() -> np.ndarray:
        return rng.binomial(samples, rng.beta(a, b, prompts))

    held = holds(lambda right: rate_interval([pass_at_k(int(c), samples, k) for c in right]), draw, 1 - miss)
    assert least <= held <= 0.985


@pytest.mark.parametrize("prompts", [6, 40])
def test_intervals_of_rewards_hold_and_those_over_samples_do_not(prompts):
    rng = np.random.default_rng(2)

    def draw() -> np.ndarray:
        return rng.normal(rng.normal(0.3, 1.0, (prompts, 1)), 0.5, (prompts, 8))

    assert 0.935 <= holds(lambda values: mean_interval(values.tolist()), draw, 0.3) <= 0.965
    naive = holds(lambda values: mean_interval(values.reshape(-1, 1).tolist()), draw, 0.3)
    assert naive < 0.6  # as if 8 samples of one prompt were 8 prompts
