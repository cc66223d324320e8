"""The canary tells new weights from old ones through noise that is larger than one update's change."""

import math
import random

import pytest
from making import episode, group

from pgrpo.rollout.vllm.canary import CONTEXT, SAMPLES, TOKENS, CanaryError, Slope, check, pick, regress

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
    """Eight samples with x = 1, y = 1 and eight with x = 2, y = 1, over the larger of |x| and its median 1.5: 2/3, 2/3 and 1,
    1/2. The slope is (4/9 + 1/2) / (4/9 + 1); leave-one-out slopes give the jackknife's variance, enlarged by Student's t."""
    x = [1.0] * 8 + [2.0] * 8
    slope = regress(x, [0.0] * 16, [1.0] * 16, [1] * 16)
    whole = (4 / 9 + 1 / 2) / (4 / 9 + 1)
    without = [(7 * 4 / 9 + 8 / 2) / (7 * 4 / 9 + 8), (8 * 4 / 9 + 7 / 2) / (8 * 4 / 9 + 7)]
    variance = 15 / 16 * sum(8 * (w - whole) ** 2 for w in without)
    assert slope.slope == pytest.approx(whole) and slope.noise == 1.0
    # Student's t with 15 degrees of freedom has the normal tail above 5 (2.87e-7) above 8.2.
    assert slope.error == pytest.approx(math.sqrt(variance) * 8.2 / 5, rel=0.01)


def test_what_says_nothing_has_no_error():
    x, y = [0.5] * 15, [0.5] * 15
    assert regress(x, [0.0] * 15, y, [1] * 15).error == math.inf, "too few samples"
    assert regress([*x, 0.0], [0.0] * 16, [*y, 1.0], [1] * 16).error == math.inf, "one did not change"
    assert regress([*x, 0.5], [0.0] * 16, [*y, 0.5], [1] * 15 + [0, 1]).error == 0.0, "one is empty"
    # All change in one sample: its leave-one-out slope is that of the others, not the rounding of a difference.
    few = regress([1.0] * 100 + [1e-9] * 15, [0.0] * 115, [0.1] * 115, [100] + [1] * 15)
    assert few.slope == pytest.approx(0.1) and few.error > 0.1


def test_one_token_does_not_make_a_slope():
    """Neither an engine's outlier nor a change that is a thousand times the usual one moves it far."""
    x = [0.01] * 64
    assert regress(x, [0.0] * 64, [100.0] + [0.0] * 63, [1] * 64).slope == pytest.approx(2 / 64)
    assert regress([10.0, *x], [0.0] * 65, [10.0] + [0.0] * 64, [1] * 65).slope == pytest.approx(1 / 65)


@pytest.mark.parametrize("samples", [16, 64])
@pytest.mark.parametrize("tokens", [1, 5, TOKENS])
def test_noise_that_differs_between_tokens_is_no_alarm(samples, tokens):
    """Of an update that changed next to nothing: log-normal noise, over three orders of magnitude, in part a sample's own. The
    least-squares slope with its error, which takes all tokens for alike and independent, would be an alarm in a tenth of these."""

    def least_squares(old, new, engine):
        x, y = ([a - b for a, b in zip(side, new, strict=True)] for side in (old, engine))
        xx = sum(a * a for a in x)
        slope = sum(a * b for a, b in zip(x, y, strict=True)) / xx
        residual = sum((b - slope * a) ** 2 for a, b in zip(x, y, strict=True))
        return Slope(slope, math.sqrt(residual / (len(x) - 1) / xx), 0.0)

    rnd, false = random.Random(0), 0
    trials = min(300, 20_000 // (samples * tokens))
    for _ in range(trials):
        old, new, engine = [], [], []
        for _ in range(samples):
            own = [rnd.gauss(0, 1) for _ in range(3)]
            for _ in range(tokens):
                scale = 0.01 * rnd.lognormvariate(0, 1.5)
                for side, its_own in zip((old, new, engine), own, strict=True):
                    side.append(scale * (rnd.gauss(0, 1) + its_own))
        check(regress(old, new, engine, [tokens] * samples))
        plain = least_squares(old, new, engine)
        false += plain.slope - 5 * plain.error > 0.5
    assert false > 0.02 * trials


@pytest.mark.parametrize("seed", range(20))
def test_new_weights_pass_and_old_ones_do_not(seed):
    check(regress(*logprobs(seed, stale=False), LENGTHS))
    stale = regress(*logprobs(seed, stale=True), LENGTHS)
    assert stale.slope > 0.6
    with pytest.raises(CanaryError, match="still samples with the weights from before the last update"):
        check(stale)


@pytest.mark.parametrize(("change", "stale"), [(0.0, False), (0.0, True), (0.003, False), (0.003, True), (0.01, False)])
def test_an_update_that_changed_too_little_is_no_alarm(change, stale):
    """The slope is then below 0.5, with a small error, whatever the engine has: noise of ``new`` is on both sides."""
    for seed in range(30):
        slope = regress(*logprobs(seed, stale, change), LENGTHS)
        assert slope.error < 0.1 and slope.slope < 0.5 and (change == 0.01 or slope.slope > 0.35)
        check(slope)


def test_nothing_changed():
    new = logprobs(0, stale=True)[1]
    unchanged = regress(new, new, [x + 0.01 for x in new], LENGTHS)
    assert math.isnan(unchanged.slope) and unchanged.error == math.inf and unchanged.noise == pytest.approx(0.01)
    check(unchanged)
    check(regress([], [], [], []))


@pytest.mark.parametrize("noise", [0.31, math.nan])
def test_an_engine_that_computes_something_else(noise):
    with pytest.raises(CanaryError, match="nats on average"):
        check(Slope(0.0, 0.01, noise))


def completion(n, first=0):
    return episode(list(range(first, first + n)), mask=[False] * n, logprobs=[-1.0] * n)


def test_what_is_scored():
    groups = [group(list(range(i + 1)), completion(3), completion(5 * i), completion(0)) for i in range(90)]
    picked = pick(groups, 50)
    assert len(picked) == SAMPLES
    for i, scored in enumerate(picked):
        assert scored.prompt_ids == list(range(i + 1))[-CONTEXT:]
        assert scored.token_ids == list(range(min(50, max(3, 5 * i)))) and scored.mask == [True] * len(scored.token_ids)
    assert groups[1].samples[1].mask == [False] * 5, "the run's own samples are left alone"


def test_few_groups_are_scored_more_than_once_but_no_text_twice():
    groups = [group([i], completion(4), completion(5), completion(4), completion(4, first=1)) for i in range(3)]
    got = [(s.prompt_ids[0], len(s.token_ids), s.token_ids[0]) for s in pick(groups)]
    assert got == [(0, 5, 0), (1, 5, 0), (2, 5, 0), (0, 4, 0), (1, 4, 0), (2, 4, 0), (0, 4, 1), (1, 4, 1), (2, 4, 1)]
    alike = group([0], completion(7), completion(6))  # in what is scored of them
    assert [len(s.token_ids) for s in pick([alike], 5)] == [5]
