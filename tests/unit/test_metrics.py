"""Metrics of groups by hand; pass@k against enumeration of all draws."""

import itertools
import math

import pytest
from making import episode, group

from pgrpo.algorithm.metrics import group_metrics
from pgrpo.training.evaluation import pass_at_k


def make_group(rewards, lengths, reasons, **parts):
    each = [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]
    rows = zip(rewards, lengths, reasons, each, strict=True)
    return group([0], *(episode([0] * n, reward, finish_reason=reason, parts=part) for reward, n, reason, part in rows))


def test_pass_at_k_is_the_chance_over_all_draws_without_replacement():
    for samples in range(1, 8):
        for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
            draws = list(itertools.combinations(range(samples), k))
            hits = sum(any(i < correct for i in draw) for draw in draws)
            assert pass_at_k(correct, samples, k) == pytest.approx(hits / len(draws), abs=1e-14)
            closed_form = 1 - math.comb(samples - correct, k) / math.comb(samples, k)
            assert pass_at_k(correct, samples, k) == pytest.approx(closed_form, abs=1e-14)


def test_pass_at_k_of_many_samples_does_not_overflow():
    assert pass_at_k(1, 10_000, 5_000) == pytest.approx(0.5, abs=1e-9)
    assert pass_at_k(0, 10_000, 10_000) == 0.0
    assert pass_at_k(1, 10_000, 10_000) == 1.0


def test_group_metrics_by_hand():
    groups = [
        make_group([1.0, 3.0, None], [2, 4, 9], ["stop", "length", "length"], f=[1.0, None, None], g=[0.0, 3.0, None]),
        make_group([5.0, 5.0], [0, 5], ["stop", "stop"], f=[2.0, 6.0], g=[3.0, -1.0]),
        make_group([None, None], [1, 1], ["stop", "stop"], f=[None, None], g=[None, None]),
    ]
    assert group_metrics(groups) == pytest.approx({
        "reward": 14 / 4,  # over samples, not over groups
        "reward_std": (math.sqrt(2) + 0) / 2,
        "frac_reward_zero_std": 2 / 3,
        "completions/mean_length": 22 / 7,
        "completions/min_length": 0,
        "completions/max_length": 9,
        "completions/clipped_ratio": 2 / 7,
        "rewards/f/mean": 3.0,
        "rewards/g/mean": 5 / 4,
    })  # fmt: skip


def test_a_mean_of_nothing_is_nan_not_zero():
    metrics = group_metrics([make_group([None], [1], ["stop"], f=[None])])
    assert math.isnan(metrics["reward"])
    assert math.isnan(metrics["rewards/f/mean"])
