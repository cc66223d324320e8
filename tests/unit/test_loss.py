"""The loss against a scalar implementation written from the papers, and its gradient against finite differences."""

import itertools
import math
import random

import pytest
import torch

from pgrpo.loss import Aggregate, Counts, policy_loss, token_weights

AGGREGATES: list[Aggregate] = ["token", "sample", "constant"]
LENGTH = 11


def paper_loss(logp, old, advantages, mask, tokens, samples, aggregate, low, high, ref=None, beta=0.0):
    """One token at a time, plain Python. DeepSeekMath equations 3 and 4; DAPO equations 10 to 12; Dr. GRPO section 3.1."""
    per_sample = []
    for i in range(len(logp)):
        terms = []
        for t in range(len(logp[i])):
            if not mask[i][t]:
                continue
            r = math.exp(logp[i][t] - old[i][t])
            term = min(r * advantages[i], min(max(r, 1 - low), 1 + high) * advantages[i])
            if ref is not None:
                x = math.exp(ref[i][t]) / math.exp(logp[i][t])
                term -= beta * (x - math.log(x) - 1)
            terms.append(term)
        per_sample.append(terms)
    if aggregate == "token":
        return -sum(map(sum, per_sample)) / tokens
    if aggregate == "sample":
        return -sum(sum(terms) / len(terms) for terms in per_sample if terms) / samples
    return -sum(sum(terms) / LENGTH for terms in per_sample) / samples


def case(seed, samples=4, width=6, spread=0.4):
    rng = random.Random(seed)
    old = [[rng.uniform(-3, -0.1) for _ in range(width)] for _ in range(samples)]
    logp = [[o + rng.gauss(0, spread) for o in row] for row in old]
    ref = [[o + rng.gauss(0, spread) for o in row] for row in old]
    mask = [[rng.random() < 0.7 for _ in range(width)] for _ in range(samples)]
    mask[rng.randrange(samples)] = [False] * width
    advantages = [rng.choice([-1.3, -0.2, 0.0, 0.7, 2.0]) for _ in range(samples)]
    return logp, old, ref, mask, advantages


def tensors(logp, old, ref, mask, advantages):
    values = [torch.tensor(x, dtype=torch.float64) for x in (logp, old, ref)]
    return [*values, torch.tensor(mask), torch.tensor(advantages, dtype=torch.float64)]


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (0.05, 0.6), (3e-4, 4e-4)])
@pytest.mark.parametrize("beta", [0.0, 0.04, 1.5])
def test_equals_the_papers(aggregate, low, high, beta):
    for seed in range(20):
        raw = case(seed)
        logp, old, ref, mask, advantages = tensors(*raw)
        tokens, samples = int(mask.sum()) + seed, 4 + seed % 3  # counts are the caller's, not this micro-batch's
        got = policy_loss(
            logp, old, advantages, mask, Counts(tokens, samples), clip_low=low, clip_high=high, aggregate=aggregate,
            max_completion_tokens=LENGTH, ref_logprobs_BR=ref if beta else None, kl_coef=beta,
        )  # fmt: skip
        wanted = paper_loss(
            raw[0], raw[1], raw[4], raw[3], tokens, samples, aggregate, low, high, raw[2] if beta else None, beta
        )
        assert got.loss.item() == pytest.approx(wanted, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_gradient_by_finite_differences(aggregate, beta):
    for seed in range(5):
        logp, old, ref, mask, advantages = tensors(*case(seed))

        def loss(x, old=old, ref=ref, mask=mask, advantages=advantages):
            return policy_loss(
                x, old, advantages, mask, Counts(17, 4), clip_low=0.2, clip_high=0.28, aggregate=aggregate,
                max_completion_tokens=LENGTH, ref_logprobs_BR=ref if beta else None, kl_coef=beta,
            ).loss  # fmt: skip

        ratio = (logp - old).exp()
        assert ((ratio - 0.8).abs() > 1e-4).all(), "a ratio lies on the kink"
        assert ((ratio - 1.28).abs() > 1e-4).all(), "a ratio lies on the kink"
        assert ((ratio < 0.8) & mask).any()
        assert ((ratio > 1.28) & mask).any()
        gradient = torch.autograd.grad(loss(leaf := logp.clone().requires_grad_()), leaf)[0]
        for i, t in itertools.product(range(logp.shape[0]), range(logp.shape[1])):
            step = torch.zeros_like(logp)
            step[i, t] = 1e-5
            slope = (loss(logp + step) - loss(logp - step)).item() / 2e-5
            assert gradient[i, t].item() == pytest.approx(slope, abs=1e-9)
        assert (gradient[~mask] == 0).all()


def test_gradient_on_policy_is_that_of_plain_policy_gradient():
    logp, _, _, mask, advantages = tensors(*case(3))
    leaf = logp.clone().requires_grad_()
    tokens = int(mask.sum())
    policy_loss(leaf, logp, advantages, mask, Counts(tokens, 4)).loss.backward()
    torch.testing.assert_close(leaf.grad, mask * -advantages.unsqueeze(-1) / tokens, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("bad", [1e4, -1e4, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", ["logprobs", "old", "ref"])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_what_lies_under_the_mask_is_never_seen(bad, where, aggregate):
    logp, old, ref, mask, advantages = (x.float() if x.is_floating_point() else x for x in tensors(*case(1)))

    def run(logp, old, ref):
        leaf = logp.clone().requires_grad_()
        out = policy_loss(
            leaf, old, advantages, mask, Counts(9, 4), aggregate=aggregate, max_completion_tokens=LENGTH,
            ref_logprobs_BR=ref, kl_coef=0.1,
        )  # fmt: skip
        out.loss.backward()
        return [*(x.detach() for x in out), leaf.grad]

    inputs = {"logprobs": logp, "old": old, "ref": ref}
    spoiled = inputs | {where: torch.where(mask, inputs[where], bad)}
    for clean, got in zip(run(*inputs.values()), run(*spoiled.values()), strict=True):
        assert got.isfinite().all()
        assert torch.equal(clean, got)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_shares_of_micro_batches_add_up(aggregate):
    logp, old, ref, mask, advantages = tensors(*case(7, samples=9))
    counts = Counts(int(mask.sum()), 9)

    def run(rows, width):
        leaf = logp.clone().requires_grad_()
        out = policy_loss(
            leaf[rows, :width], old[rows, :width], advantages[rows], mask[rows, :width], counts, aggregate=aggregate,
            max_completion_tokens=LENGTH, ref_logprobs_BR=ref[rows, :width], kl_coef=0.1,
        )  # fmt: skip
        return torch.stack([x.detach().double() for x in out]), torch.autograd.grad(out.loss, leaf)[0]

    whole, whole_grad = run(slice(None), 6)
    for cuts in ([0, 4, 9], [0, 1, 2, 8, 9], range(10)):
        parts = [run(slice(a, b), 6) for a, b in itertools.pairwise(cuts)]
        outs, grads = (torch.stack(values).sum(0) for values in zip(*parts, strict=True))
        torch.testing.assert_close(outs, whole, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(grads, whole_grad, rtol=1e-12, atol=1e-14)


def test_clipped_tokens_and_kl_by_hand():
    ratio = torch.tensor([[0.5, 0.5, 1.5, 1.1], [0.5, 1.5, 1.5, 0.9], [0.5, 1.5, 1.0, 1.0]], dtype=torch.float64)
    mask = torch.tensor([[True] * 4, [True, True, False, True], [True] * 4])
    advantages = torch.tensor([-1.0, 1.0, 0.0])
    old = torch.full_like(ratio, -1.0)
    out = policy_loss(
        old + ratio.log(), old, advantages, mask, Counts(11, 3), ref_logprobs_BR=old + ratio.log() + math.log(2.0),
        kl_coef=1.0,
    )  # fmt: skip
    assert out.clipped_low.item() == 2  # low ratios of the negative sample
    assert out.clipped_high.item() == 1  # the masked one is not counted, nor those of the sample without an advantage
    assert out.kl.item() == pytest.approx(11 * (2 - math.log(2) - 1))
    # Negative sample: 0.8 + 0.8 + 1.5 + 1.1, against it 0.5 + 1.2 + 0.9.
    assert out.loss.item() == pytest.approx((0.8 + 0.8 + 1.5 + 1.1 - 0.5 - 1.2 - 0.9) / 11 + (2 - math.log(2) - 1))
    assert not any(x.requires_grad for x in out[1:])


def test_token_weights_by_hand():
    mask = torch.tensor([[True, True, False], [True, False, False], [False] * 3])
    weights = {a: token_weights(mask, Counts(12, 6), a, 5) for a in AGGREGATES}
    assert weights["token"].tolist() == [[1 / 12, 1 / 12, 0], [1 / 12, 0, 0], [0, 0, 0]]
    assert weights["sample"].tolist() == [[1 / 12, 1 / 12, 0], [1 / 6, 0, 0], [0, 0, 0]]
    assert weights["constant"].flatten().tolist() == pytest.approx([1 / 30, 1 / 30, 0, 1 / 30, 0, 0, 0, 0, 0])


@pytest.mark.parametrize("shape", [(0, 0), (3, 0), (3, 2)])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_an_empty_batch_has_no_loss_and_no_gradient(shape, aggregate):
    logp = torch.zeros(shape, requires_grad=True)
    out = policy_loss(
        logp, torch.zeros(shape), torch.ones(shape[0]), torch.zeros(shape, dtype=torch.bool), Counts(0, 0),
        aggregate=aggregate,
    )  # fmt: skip
    out.loss.backward()
    assert [x.item() for x in out] == [0, 0, 0, 0]
    assert logp.grad is not None
    assert logp.grad.abs().sum() == 0


def test_kl_needs_the_reference():
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match=r"kl_coef=0.1 needs ref_logprobs"):
        policy_loss(x, x, torch.ones(1), x == 0, Counts(1, 1), kl_coef=0.1)
