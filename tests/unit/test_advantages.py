"""Advantages by hand and against torch."""

import pytest
import torch

from pgrpo.algorithm.advantages import EPS, group_advantages, has_spread, standard_deviation, step_advantages


def test_by_hand():
    # Mean 2, deviations -1 0 1, standard deviation with n - 1: 1.
    assert group_advantages([1.0, 2.0, 3.0]) == pytest.approx([-1 / 1.0001, 0, 1 / 1.0001], rel=1e-15)
    assert group_advantages([1.0, 2.0, 3.0], "none") == [-1, 0, 1]
    # One of four is right: mean 1/4, variance (1/16 * 3 + 9/16) / 3 = 1/4.
    assert group_advantages([0, 0, 1, 0]) == pytest.approx([-0.25 / 0.5001] * 2 + [0.75 / 0.5001, -0.25 / 0.5001])


@pytest.mark.parametrize("seed", range(5))
def test_against_torch(seed):
    rewards = torch.randn(8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 10**seed
    wanted = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    assert EPS == 1e-4
    assert group_advantages(rewards.tolist()) == pytest.approx(wanted.tolist(), rel=1e-10)
    assert group_advantages(rewards.tolist(), "none") == pytest.approx((rewards - rewards.mean()).tolist(), rel=1e-10)


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
    got = step_advantages(STEP, scale, baseline)
    for mine, wanted in zip(got, paper_advantages(STEP, scale, baseline), strict=True):
        assert mine == pytest.approx(wanted, rel=1e-12, abs=1e-12)
    assert got[1] == [0.0] * 4
    assert got[4] == [0.0] * 4


def test_leave_one_out_by_hand():
    # The others' means: 2.5, 2, 1.5.
    assert group_advantages([1.0, 2.0, 3.0], "none", "leave_one_out") == pytest.approx([-1.5, 0, 1.5])


def test_standard_deviation_of_fewer_than_two_is_zero():
    assert [standard_deviation(v) for v in ([], [3.0], [3.0, 5.0])] == [0, 0, pytest.approx(2**0.5)]


@pytest.mark.faults
@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.1, 1.1, -7.3, 1e300, 5e-324])
@pytest.mark.parametrize("size", [1, 3, 7, 8])
def test_equal_rewards_give_advantages_of_exactly_zero(scale, value, size, baseline):
    assert not has_spread([value] * size)
    assert step_advantages([[value] * size, [0.5] * size], scale, baseline)[0] == [0.0] * size


def test_a_sample_without_a_reward_takes_no_part():
    assert group_advantages([1.0, None, 2.0, 3.0, None]) == pytest.approx([-1 / 1.0001, 0, 0, 1 / 1.0001, 0])
    assert group_advantages([None, None]) == [0.0, 0.0]
    assert group_advantages([None, 4.0]) == [0.0, 0.0]
    assert group_advantages([2.0, None, 2.0]) == [0.0, 0.0, 0.0]
    assert [has_spread(r) for r in ([], [None], [None, 1.0], [1.0, None, 2.0])] == [False, False, False, True]


def test_nearly_equal_rewards_are_not_blown_up():
    first, second = group_advantages([1.0, 1.0 + 1e-9])
    assert -1e-5 < first < 0 < second < 1e-5
