"""The canary tells new weights from old ones through noise that is larger than one update's change."""

import math
import random

import pytest

from pgrpo.rollout.canary import CONTEXT, SAMPLES, TOKENS, CanaryError, Slope, check, pick, regress
from pgrpo.types import Completion, Group, Prompt

NOISE, CHANGE, COUNT = 0.03, 0.03, SAMPLES * TOKENS


def logprobs(seed, stale, change=CHANGE):
    """old, new, engine: noisy readings of what the old and the new weights give, the policy's noise half the same in both."""
    rnd = random.Random(seed)
    new = [-rnd.expovariate(1.0) for _ in range(COUNT)]
    old = [x + rnd.gauss(0, change) for x in new]
    engine = [x + rnd.gauss(0, NOISE) for x in (old if stale else new)]
    for i in range(COUNT):
        shared = rnd.gauss(0, NOISE / math.sqrt(2))
        old[i] += shared + rnd.gauss(0, NOISE / math.sqrt(2))
        new[i] += shared + rnd.gauss(0, NOISE / math.sqrt(2))
    return old, new, engine


def test_a_slope_by_hand():
    """x = 1, 2 and y = 1, 1: slope (1 + 2) / 5, residuals 0.4 and -0.2, error sqrt(0.2 / 1 / 5), noise 1."""
    slope = regress([1.0, 2.0], [0.0, 0.0], [1.0, 1.0])
    assert slope == pytest.approx(Slope(0.6, 0.2, 1.0))


@pytest.mark.parametrize("seed", range(20))
def test_new_weights_pass_and_old_ones_do_not(seed):
    check(regress(*logprobs(seed, stale=False)))
    stale = regress(*logprobs(seed, stale=True))
    assert stale.slope > 0.6
    with pytest.raises(CanaryError, match="still samples with the weights of before the last update"):
        check(stale)


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("change", [0.0, 0.003, 0.01])
def test_an_update_that_changed_too_little_is_no_alarm(change, stale):
    """The slope is then near 0.5, with a small error, whatever the engine has: noise of ``new`` is on both sides."""
    for seed in range(30):
        slope = regress(*logprobs(seed, stale and change < 0.01, change))
        assert slope.error < 0.1 and (change == 0.01 or abs(slope.slope - 0.5) < 0.15)
        check(slope)


def test_nothing_changed():
    new = logprobs(0, stale=True)[1]
    unchanged = regress(new, new, [x + 0.01 for x in new])
    assert math.isnan(unchanged.slope) and unchanged.error == math.inf and unchanged.noise == pytest.approx(0.01)
    check(unchanged)
    check(regress([], [], []))


@pytest.mark.parametrize("noise", [0.31, math.nan])
def test_an_engine_that_computes_something_else(noise):
    with pytest.raises(CanaryError, match="nats from the policy's on average"):
        check(Slope(0.0, 0.01, noise))


def test_what_is_scored():
    def completion(n):
        return Completion(list(range(n)), [-1.0] * n, [False] * n, "stop", "")

    groups = [
        Group(Prompt(i, "", list(range(i + 1))), [completion(3), completion(5 * i), completion(0)]) for i in range(40)
    ]
    picked = pick(groups, 50)
    assert len(picked) == SAMPLES
    for i, group in enumerate(picked):
        (scored,) = group.completions
        assert group.prompt.token_ids == list(range(i + 1))[-CONTEXT:]
        assert scored.token_ids == list(range(min(50, max(3, 5 * i)))) and scored.mask == [True] * len(scored.token_ids)
    assert groups[1].completions[1].mask == [False] * 5, "the run's own samples are left alone"
