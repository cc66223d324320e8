"""Drawing tokens: frequencies, the truncations and log-probs against distributions computed by hand."""

import math

import pytest
import torch

from pgrpo.rollout.base import sample_seeds
from pgrpo.rollout.embedded.sampling import draw, sampling_logprobs, uniforms
from pgrpo.types import SamplingParams

PROBS = [0.35, 0.02, 0.28, 0.0, 0.2, 0.1, 0.05]
"""Of temperature 1; not sorted, one token impossible."""

CASES = [
    SamplingParams(1),
    SamplingParams(1, temperature=0.5),
    SamplingParams(1, temperature=1.7),
    SamplingParams(1, top_k=3),
    SamplingParams(1, top_k=1),
    SamplingParams(1, top_k=100),
    SamplingParams(1, top_p=0.7),
    SamplingParams(1, top_p=0.01),
    SamplingParams(1, temperature=1.3, top_k=5, top_p=0.8),
]


def exact(probs, params):
    """The distribution that is sampled from, in plain Python: temperature, top-k, top-p, each renormalised."""
    probs = [p ** (1 / params.temperature) for p in probs]
    order = sorted(range(len(probs)), key=lambda i: -probs[i])
    if params.top_k:
        order = order[: params.top_k]
    total = sum(probs[i] for i in order)
    kept, before = [], 0.0
    for i in order:
        if before < params.top_p:
            kept.append(i)
        before += probs[i] / total
    total = sum(probs[i] for i in kept)
    return [probs[i] / total if i in kept else 0.0 for i in range(len(probs))]


def logits(probs=PROBS, shift=3.0):
    return torch.tensor([[math.log(p) + shift if p else -math.inf for p in probs]])


def test_the_reference_by_hand():
    assert exact(PROBS, SamplingParams(1, top_k=3)) == pytest.approx([35 / 83, 0, 28 / 83, 0, 20 / 83, 0, 0])
    assert exact(PROBS, SamplingParams(1, top_p=0.7)) == pytest.approx([35 / 83, 0, 28 / 83, 0, 20 / 83, 0, 0])
    assert exact(PROBS, SamplingParams(1, top_p=0.6)) == pytest.approx([35 / 63, 0, 28 / 63, 0, 0, 0, 0])
    # Top-p is taken of what top-k left, renormalised: 35/63 is more than 0.5, 0.35 would not be.
    assert exact(PROBS, SamplingParams(1, top_k=2, top_p=0.5)) == [1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("params", [*CASES, SamplingParams(1, top_k=2, top_p=0.5), SamplingParams(1, top_p=0.6)])
def test_logprobs_are_those_of_the_renormalised_distribution(params):
    got = sampling_logprobs(logits(), params)
    assert got.dtype == torch.float32
    assert got.exp().squeeze(0).tolist() == pytest.approx(exact(PROBS, params), abs=1e-6)


def test_a_token_goes_where_those_before_it_have_top_p_to_the_bit():
    kept = sampling_logprobs(torch.zeros(1, 4), SamplingParams(1, top_p=0.5))
    assert sorted(kept[0].exp().tolist()) == [0, 0, 0.5, 0.5]


@pytest.mark.parametrize("params", CASES)
def test_frequencies(params):
    """Chi-square of 20000 draws; 6 degrees of freedom at most, 22.5 is the 99.9th percentile. The seeds are fixed."""
    count = 20_000
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = draw(logits().expand(count, -1), params, uniform)
    observed = tokens.bincount(minlength=len(PROBS)).tolist()
    wanted = exact(PROBS, params)
    assert [n for n, p in zip(observed, wanted, strict=True) if p == 0] == [0] * wanted.count(0.0)
    assert sum((n - count * p) ** 2 / (count * p) for n, p in zip(observed, wanted, strict=True) if p) < 22.5
    # What the token had before top-k and top-p: the trainer knows no cut.
    log_wanted = [
        math.log(p) if p else math.nan for p in exact(PROBS, SamplingParams(1, temperature=params.temperature))
    ]
    for token, logprob in zip(tokens[:500].tolist(), logprobs[:500].tolist(), strict=True):
        assert logprob == pytest.approx(log_wanted[token], abs=1e-5)


@pytest.mark.parametrize("uniform", [0.0, 2**-24, 0.5, 1 - 2**-24])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(uniform):
    probs = [0.0, 0.5, 0.0, 0.5, 0.0]
    token, logprob = draw(logits(probs), SamplingParams(1), torch.tensor([uniform]))
    assert token.tolist() == [1 if uniform < 0.5 else 3]
    assert logprob.item() == pytest.approx(math.log(0.5))


def test_one_draw_in_a_large_vocabulary_is_the_inverse_of_the_cumulative_distribution():
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(20, 5000, generator=generator) * 3
    uniform = torch.rand(20, generator=generator)
    tokens, _ = draw(rows, SamplingParams(1), uniform)
    cumulative = rows.double().softmax(-1).cumsum(-1)
    for row, (token, u) in enumerate(zip(tokens.tolist(), uniform.tolist(), strict=True)):
        assert cumulative[row, token] > u - 1e-6
        assert token == 0 or cumulative[row, token - 1] <= u + 1e-6
    # A row's own sum, which float32 leaves a little beside 1, is the end of its interval.
    assert draw(rows, SamplingParams(1), torch.full((20,), 1 - 2**-24))[0].max() < 5000


def test_tokens_that_float32_cannot_add_to_one_are_drawn():
    """64 tokens of 2^-26 each behind one that has the rest: float32 counts in steps of 2^-24 there."""
    row = torch.tensor([[math.log(1 - 2**-20), *[-26 * math.log(2)] * 64]])
    uniform = 1 - torch.arange(1, 16) * 2**-24
    cumulative = row.log_softmax(-1)[0].exp().double().cumsum(-1)
    wanted = [int((cumulative > u * cumulative[-1]).nonzero()[0]) for u in uniform.double()]
    assert draw(row.expand(15, -1), SamplingParams(1), uniform)[0].tolist() == wanted


def test_temperature_zero_takes_the_likeliest_and_reports_the_model_s_own_logprob():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 11, generator=generator)
    tokens, logprobs = draw(rows, SamplingParams(1, temperature=0.0), torch.rand(50, generator=generator))
    assert torch.equal(tokens, rows.argmax(-1))
    wanted = rows.double().log_softmax(-1)[torch.arange(50), tokens]
    torch.testing.assert_close(logprobs.double(), wanted, rtol=0, atol=1e-6)


def test_rows_are_drawn_apart():
    rows = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    uniform = torch.linspace(0.05, 0.95, 6)
    params = SamplingParams(1, temperature=0.8, top_k=5, top_p=0.9)
    together = draw(rows, params, uniform)
    alone = [draw(rows[i : i + 1], params, uniform[i : i + 1]) for i in range(6)]
    assert together[0].tolist() == [token.item() for token, _ in alone]
    torch.testing.assert_close(together[1], torch.cat([logprob for _, logprob in alone]))


def test_low_precision_logits_are_drawn_in_float32():
    rows = torch.randn(3, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
    torch.testing.assert_close(sampling_logprobs(rows, SamplingParams(1)), rows.float().log_softmax(-1))


def test_uniforms_depend_on_their_own_seed_alone():
    together = uniforms([3, 2**62 + 5, 3, 7], 10)
    assert together.dtype == torch.float32
    assert torch.equal(together[0], together[2])
    assert torch.equal(uniforms([7], 10)[0], together[3])
    assert torch.equal(uniforms([2**62 + 5], 10)[0], together[1])
    assert not torch.equal(together[0], together[1])
    assert torch.equal(uniforms([7], 4)[0], together[3, :4])  # a higher limit goes on, it does not change what was
    state = torch.get_rng_state()
    uniforms([1, 2], 5)
    assert torch.equal(torch.get_rng_state(), state)


def test_uniforms_are_uniform():
    values = uniforms(sample_seeds(0, "train", 1, group_size=200), 50).flatten()
    assert ((values >= 0) & (values < 1)).all()
    assert values.double().mean().item() == pytest.approx(0.5, abs=4 / math.sqrt(12 * 10_000))
    chi = sum((n - 1000) ** 2 / 1000 for n in (values * 10).long().bincount(minlength=10).tolist())
    assert chi < 27.9  # 99.9th percentile, 9 degrees of freedom


def test_sample_seeds():
    seeds = sample_seeds(42, 3, 17, group_size=8)
    assert len(set(seeds)) == 8
    assert all(0 <= s < 2**63 for s in seeds)
    assert sample_seeds(42, 3, 17, group_size=4) == seeds[:4]
    others = [sample_seeds(*path, group_size=8) for path in [(43, 3, 17), (42, 4, 17), (42, 3, 18), (42, 31, 7)]]
    assert len({s for other in [seeds, *others] for s in other}) == 40
