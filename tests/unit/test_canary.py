"""The canary tells new weights from old ones through noise that is larger than one update's change."""

import math
import random

import pytest

from pgrpo.rollout.canary import CONTEXT, SAMPLES, TOKENS, CanaryError, Slope, check, pick, regress
from pgrpo.types import Completion, Group, Prompt

NOISE, CHANGE, COUNT = 0.03, 0.03, SAMPLES * TOKENS
LENGTHS = [TOKENS] * SAMPLES


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
    """x = 1, 2 and y = 1, 1, over the larger of |x| and its median 1.5: 2/3, 1 and 2/3, 1/2. The slope is (4/9 + 1/2) / (4/9 + 1),
    or 1/2 and 1 without one of them: error sqrt(1/2 (1/2 - 17/26)^2 + 1/2 (1 - 17/26)^2). In one sample there is no error."""
    slope = regress([1.0, 2.0], [0.0, 0.0], [1.0, 1.0], [1, 1])
    assert slope == pytest.approx(Slope(17 / 26, math.sqrt((4 / 26) ** 2 / 2 + (9 / 26) ** 2 / 2), 1.0))
    assert regress([1.0, 2.0], [0.0, 0.0], [1.0, 1.0], [2]) == pytest.approx(Slope(17 / 26, math.inf, 1.0))


@pytest.mark.parametrize("tokens", [5, TOKENS])
def test_noise_that_differs_between_tokens_is_no_alarm(tokens):
    """Of an update that changed next to nothing: log-normal noise, over three orders of magnitude, in part a sample's own. The
    least-squares slope with its error, which takes all tokens for alike and independent, would be an alarm in a tenth of these."""

    def least_squares(old, new, engine):
        x, y = ([a - b for a, b in zip(side, new, strict=True)] for side in (old, engine))
        xx = sum(a * a for a in x)
        slope = sum(a * b for a, b in zip(x, y, strict=True)) / xx
        residual = sum((b - slope * a) ** 2 for a, b in zip(x, y, strict=True))
        return Slope(slope, math.sqrt(residual / (len(x) - 1) / xx), 0.0)

    rnd, false = random.Random(0), 0
    for _ in range(300 if tokens == 5 else 60):
        old, new, engine = [], [], []
        for _ in range(16):
            own = [rnd.gauss(0, 1) for _ in range(3)]
            for _ in range(tokens):
                scale = 0.01 * rnd.lognormvariate(0, 1.5)
                for side, its_own in zip((old, new, engine), own, strict=True):
                    side.append(scale * (rnd.gauss(0, 1) + its_own))
        check(regress(old, new, engine, [tokens] * 16))
        plain = least_squares(old, new, engine)
        false += plain.slope - 5 * plain.error > 0.5
    assert false > (30 if tokens == 5 else 6)


@pytest.mark.parametrize("seed", range(20))
def test_new_weights_pass_and_old_ones_do_not(seed):
    check(regress(*logprobs(seed, stale=False), LENGTHS))
    stale = regress(*logprobs(seed, stale=True), LENGTHS)
    assert stale.slope > 0.6
    with pytest.raises(CanaryError, match="still samples with the weights of before the last update"):
        check(stale)


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("change", [0.0, 0.003, 0.01])
def test_an_update_that_changed_too_little_is_no_alarm(change, stale):
    """The slope is then below 0.5, with a small error, whatever the engine has: noise of ``new`` is on both sides."""
    for seed in range(30):
        slope = regress(*logprobs(seed, stale and change < 0.01, change), LENGTHS)
        assert slope.error < 0.1 and (change == 0.01 or abs(slope.slope - 0.5) < 0.15)
        check(slope)


def test_nothing_changed():
    new = logprobs(0, stale=True)[1]
    unchanged = regress(new, new, [x + 0.01 for x in new], LENGTHS)
    assert math.isnan(unchanged.slope) and unchanged.error == math.inf and unchanged.noise == pytest.approx(0.01)
    check(unchanged)
    check(regress([], [], [], []))


@pytest.mark.parametrize("noise", [0.31, math.nan])
def test_an_engine_that_computes_something_else(noise):
    with pytest.raises(CanaryError, match="nats from the policy's on average"):
        check(Slope(0.0, 0.01, noise))


def test_what_is_scored():
    def completion(n):
        return Completion(list(range(n)), [-1.0] * n, [False] * n, "stop", "")

    groups = [
        Group(Prompt(i, "", list(range(i + 1))), [completion(3), completion(5 * i), completion(0)]) for i in range(90)
    ]
    picked = pick(groups, 50)
    assert len(picked) == SAMPLES
    for i, group in enumerate(picked):
        (scored,) = group.completions
        assert group.prompt.token_ids == list(range(i + 1))[-CONTEXT:]
        assert scored.token_ids == list(range(min(50, max(3, 5 * i)))) and scored.mask == [True] * len(scored.token_ids)
    assert groups[1].completions[1].mask == [False] * 5, "the run's own samples are left alone"
