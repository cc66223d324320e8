"""Advantages by hand and against torch."""

from typing import Any

import making
import pytest
import torch

from pgrpo.algorithm.advantages import (
    EPS,
    compare,
    group_advantages,
    has_spread,
    rewards_differ,
    standard_deviation,
    step_advantages,
)
from pgrpo.config import LossConfig


def scaled(scale, baseline: Any = "group_mean"):
    return LossConfig(scale_advantages=scale, advantage_baseline=baseline)


def test_by_hand():
    # Mean 2, deviations -1 0 1, standard deviation with n - 1: 1.
    assert group_advantages([1.0, 2.0, 3.0], LossConfig()) == pytest.approx([-1 / 1.0001, 0, 1 / 1.0001], rel=1e-15)
    assert group_advantages([1.0, 2.0, 3.0], scaled("none")) == [-1, 0, 1]
    # One of four is right: mean 1/4, variance (1/16 * 3 + 9/16) / 3 = 1/4.
    assert group_advantages([0, 0, 1, 0], LossConfig()) == pytest.approx(
        [-0.25 / 0.5001] * 2 + [0.75 / 0.5001, -0.25 / 0.5001]
    )


@pytest.mark.parametrize("seed", range(5))
def test_against_torch(seed):
    rewards = torch.randn(8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 10**seed
    wanted = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    assert EPS == 1e-4
    assert group_advantages(rewards.tolist(), LossConfig()) == pytest.approx(wanted.tolist(), rel=1e-10)
    assert group_advantages(rewards.tolist(), scaled("none")) == pytest.approx(
        (rewards - rewards.mean()).tolist(), rel=1e-10
    )


STEP = [[1.0, 0.0, 0.25, None], [3.0, 3.0, 3.0, 3.0], [None, -1.0, 0.5, 2.0], [None] * 4, [None, 7.0, None, None]]


def paper_advantages(groups, scale, baseline):
    """DeepSeekMath section 4.1.2; Dr. GRPO section 3.2; RLOO: the others' mean, one sample after the other."""

    def deviation(values):
        mean = sum(values) / len(values)
        return (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5

    everything = [r for group in groups for r in group if r is not None]
    result = []
    for group in groups:
        row = []
        for i, r in enumerate(group):
            others = [o for j, o in enumerate(group) if o is not None and j != i]
            if r is None or not others:
                row.append(0.0)
                continue
            centred = r - (
                sum(others) / len(others) if baseline == "leave_one_out" else sum([*others, r]) / (len(others) + 1)
            )
            divisors = {"group": deviation([*others, r]) + EPS, "batch": deviation(everything) + EPS, "none": 1.0}
            row.append(centred / divisors[scale])
        result.append(row)
    return result


@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_step_against_the_papers(scale, baseline):
    got = step_advantages(STEP, scaled(scale, baseline))
    for mine, wanted in zip(got, paper_advantages(STEP, scale, baseline), strict=True):
        assert mine == pytest.approx(wanted, rel=1e-12, abs=1e-12)
    assert got[1] == [0.0] * 4
    assert got[4] == [0.0] * 4


def test_leave_one_out_by_hand():
    # The others' means: 2.5, 2, 1.5.
    assert group_advantages([1.0, 2.0, 3.0], scaled("none", "leave_one_out")) == pytest.approx([-1.5, 0, 1.5])


def test_standard_deviation_of_fewer_than_two_is_zero():
    assert [standard_deviation(v) for v in ([], [3.0], [3.0, 5.0])] == [0, 0, pytest.approx(2**0.5)]


@pytest.mark.faults
@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.1, 1.1, -7.3, 1e300, 5e-324])
@pytest.mark.parametrize("size", [1, 3, 7, 8])
def test_equal_rewards_give_advantages_of_exactly_zero(scale, value, size, baseline):
    assert not has_spread([value] * size)
    assert step_advantages([[value] * size, [0.5] * size], scaled(scale, baseline))[0] == [0.0] * size


def test_a_sample_without_a_reward_takes_no_part():
    assert group_advantages([1.0, None, 2.0, 3.0, None], LossConfig()) == pytest.approx(
        [-1 / 1.0001, 0, 0, 1 / 1.0001, 0]
    )
    assert group_advantages([None, None], LossConfig()) == [0.0, 0.0]
    assert group_advantages([None, 4.0], LossConfig()) == [0.0, 0.0]
    assert group_advantages([2.0, None, 2.0], LossConfig()) == [0.0, 0.0, 0.0]
    assert [has_spread(r) for r in ([], [None], [None, 1.0], [1.0, None, 2.0])] == [False, False, False, True]


def test_nearly_equal_rewards_are_not_blown_up():
    first, second = group_advantages([1.0, 1.0 + 1e-9], LossConfig())
    assert -1e-5 < first < 0 < second < 1e-5


GDPO_PARTS = [  # group -> episode -> (right, short, unused); None: does not apply
    [(1.0, 0.0, 5.0), (0.0, 3.0, 1.0), (1.0, 1.0, 2.0)],
    [(0.0, 1.0, 7.0), (0.0, 1.0, 8.0), (0.0, 1.0, 9.0)],  # no spread in what counts
    [(None, 2.0, 0.0), (1.0, 7.0, 1.0), (0.0, None, 0.0)],
    [(0.5, 1.0, 0.0), (None, None, 1.0), (1.0, 0.0, 0.0)],  # the second's reward failed
]
GDPO_WEIGHTS = {"right": 1.0, "short": -0.5, "unused": 0.0}


def gdpo_groups():
    failed, names = (3, 1), tuple(GDPO_WEIGHTS)

    def scored(n, i, values):
        terms = [w * v for w, v in zip(GDPO_WEIGHTS.values(), values, strict=True) if v is not None]
        total = None if (n, i) == failed else sum(terms)
        return making.episode([1], total, parts=dict(zip(names, values, strict=True)))

    return [making.group([5], *(scored(n, i, v) for i, v in enumerate(rows))) for n, rows in enumerate(GDPO_PARTS)]


@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_rewards_that_are_normalized_before_they_are_summed(scale, baseline):
    """GDPO's equations, one number at a time."""
    config = LossConfig(combine_rewards="normalize_then_sum", scale_advantages=scale, advantage_baseline=baseline)
    groups = gdpo_groups()
    sums = [[0.0] * 3 for _ in groups]
    for k, weight in enumerate([1.0, -0.5]):
        table = [[v[k] if e.reward is not None else None for v, e in zip(rows, g.episodes, strict=True)]
                 for rows, g in zip(GDPO_PARTS, groups, strict=True)]  # fmt: skip
        for n, row in enumerate(paper_advantages(table, scale, baseline)):
            sums[n] = [total + weight * value for total, value in zip(sums[n], row, strict=True)]
    counted = [v for row, g in zip(sums, groups, strict=True) for v, e in zip(row, g.episodes, strict=True)
               if e.reward is not None]  # fmt: skip
    mean = sum(counted) / len(counted)
    deviation = (sum((v - mean) ** 2 for v in counted) / (len(counted) - 1)) ** 0.5
    got = compare(groups, config, GDPO_WEIGHTS)
    for mine, row in zip(got, sums, strict=True):
        assert mine == pytest.approx([(v - mean) / (deviation + EPS) if v else 0.0 for v in row], abs=1e-12)
    assert got[1] == [0.0] * 3 and got[3][1] == 0.0
    assert [rewards_differ(g, config, GDPO_WEIGHTS) for g in groups] == [True, False, True, True]


def test_rewards_whose_sum_is_equal_have_an_advantage_only_if_normalized_first():
    rows = [(1.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 0.0)]
    one = making.group([5], *(making.episode([1], sum(r), parts={"a": r[0], "b": r[1]}) for r in [*rows, (0.0, 1.0)]))
    two = making.group(
        [6], *(making.episode([1], sum(r), parts={"a": r[0], "b": 10 * r[1]}) for r in [*rows, (0.0, 0.0)])
    )
    weights = {"a": 1.0, "b": 1.0}
    for config, differ in ((LossConfig(), False), (LossConfig(combine_rewards="normalize_then_sum"), True)):
        assert rewards_differ(one, config, weights) == differ
        assert any(a != 0 for a in compare([one, two], config, weights | {"b": 0.5})[0]) == differ
