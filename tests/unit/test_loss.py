"""The losses against scalar implementations written from the papers, and their gradients against finite differences."""

import itertools
import math
import random
from typing import Any

import pytest
import torch

from pgrpo.algorithm.loss import (
    Counts,
    kl_estimate,
    log_importance_ratio,
    policy_loss,
    rollout_correction,
    token_weights,
)
from pgrpo.config import LossConfig
from pgrpo.config.presets import PRESETS

AGGREGATES: list[Any] = ["token", "sample", "constant"]
CORRECTIONS = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
LENGTH = 11
COMPOSITIONS = [
    *({"aggregate": a, "clip_low": low, "clip_high": high, "kl_coef": beta}
      for a in AGGREGATES
      for low, high in [(0.2, 0.2), (0.2, 0.28), (0.05, 0.6), (3e-4, 4e-4)]
      for beta in (0.0, 0.04, 1.5)),
    *({"ratio": r, "objective": o, "aggregate": a, "clip_low": 0.1, "clip_high": 0.15}
      for r, o, a in itertools.product(["token", "sequence"], ["clip", "cispo"], AGGREGATES)),
    *({"kl_coef": 0.3, "kl_estimator": k, "aggregate": "sample", "kl_correction": c}
      for k in ("k1", "k2", "k3") for c in (False, True)),
    *({"clip_dual": dual, "clip_high": 0.1, "aggregate": a, "ratio": r}
      for dual, a, r in itertools.product((1.15, 1.5), AGGREGATES, ("token", "sequence"))),
    *({"off_policy_threshold": 0.05, "aggregate": a, "objective": o, "kl_coef": 0.1}
      for a in AGGREGATES for o in ("clip", "cispo")),
    *({"correction": c, "cap": 1.3, "floor": f} for c in CORRECTIONS for f in (0.0, 0.9, 1.0)),
    *({"entropy_coef": 0.3, "aggregate": a} for a in AGGREGATES),
    *({"correction": c, "cap": 1.3, "objective": o} for c in CORRECTIONS for o in ("clip", "cispo")),
    {"ratio": "sequence", "clip_low": 0.05, "clip_high": 0.02, "aggregate": "sample", "kl_coef": 0.1, "kl_estimator": "k1",
         "entropy_coef": 0.01, "correction": "sequence_mask", "cap": 1.5, "clip_dual": 1.1, "off_policy_threshold": 0.2},
    *({k: v for k, v in preset.items() if k not in ("scale_advantages", "mask_overlong")} for preset in PRESETS.values()),
]  # fmt: skip


def clip(x, low, high):
    return min(max(x, low), high)


def paper_loss(
    rows, tokens, samples, aggregate="token", clip_low=0.2, clip_high=0.2, ratio="token", objective="clip", kl_coef=0.0,
    kl_estimator="k3", kl_correction=True, entropy_coef=0.0, correction=None, cap=2.0, floor=None, clip_dual=None,
    off_policy_threshold=None, at=None,
):  # fmt: skip
    """One token at a time, plain Python.

    PPO equation 7; DeepSeekMath equations 3 and 4; DAPO equations 10 to 12; Dr. GRPO section 3.2; GSPO equations 5 and 7;
    MiniMax-M1 equations 4 and 5; TIS and MIS; k1 as a penalty of the reward; dual clip (1912.09729, equation 5); DeepSeek-V3.2
    equations 7 to 9. ``at``: the log-probs at which gradients are
    stopped (``rows`` may be moved away from them).
    """
    logp, old, ref, mask, advantages, entropy, rollout = rows
    at = at or logp
    per_sample = []
    for i in range(len(logp)):
        present = [t for t in range(len(logp[i])) if mask[i][t]]
        terms = []
        for t in present:
            r, fixed_r = math.exp(logp[i][t] - old[i][t]), math.exp(at[i][t] - old[i][t])
            if ratio == "sequence":  # (pi(y) / pi_old(y)) ** (1 / |y|)
                r = math.prod(math.exp(logp[i][s] - old[i][s]) for s in present) ** (1 / len(present))
                fixed_r = math.prod(math.exp(at[i][s] - old[i][s]) for s in present) ** (1 / len(present))
            if objective == "cispo":
                term = clip(fixed_r, 1 - clip_low, 1 + clip_high) * advantages[i][t] * logp[i][t]
            else:
                term = min(r * advantages[i][t], clip(r, 1 - clip_low, 1 + clip_high) * advantages[i][t])
                if clip_dual and advantages[i][t] < 0:
                    term = max(term, clip_dual * advantages[i][t])
            drift = sum(rollout[i][s] - at[i][s] for s in present) / len(present)
            if off_policy_threshold and advantages[i][t] < 0 and drift > off_policy_threshold:
                term = 0
            if correction:
                mine = [t] if correction.startswith("token") else present
                c = math.prod(math.exp(old[i][s]) / math.exp(rollout[i][s]) for s in mine)
                if "truncate" in correction:
                    term *= max(min(c, cap), floor or 0)
                else:
                    term *= c if (1 / cap if floor is None else floor) <= c <= cap else 0
            x, fixed_x = math.exp(ref[i][t]) / math.exp(logp[i][t]), math.exp(ref[i][t]) / math.exp(at[i][t])
            own_r, fixed_own_r = math.exp(logp[i][t] - old[i][t]), math.exp(at[i][t] - old[i][t])
            weight = 1 if not kl_correction else own_r if kl_estimator == "k3" else fixed_own_r
            if kl_estimator == "k1":  # a constant of the reward, times the score
                term -= kl_coef * weight * (-math.log(fixed_x) - math.log(fixed_x) * (logp[i][t] - at[i][t]))
            else:
                term -= kl_coef * weight * {"k2": math.log(x) ** 2 / 2, "k3": x - math.log(x) - 1}[kl_estimator]
            terms.append(term + entropy_coef * entropy[i][t])
        per_sample.append(terms)
    if aggregate == "token":
        return -sum(map(sum, per_sample)) / tokens
    if aggregate == "sample":
        return -sum(sum(terms) / len(terms) for terms in per_sample if terms) / samples
    return -sum(sum(terms) / LENGTH for terms in per_sample) / samples


def case(seed, samples=4, width=6, spread=0.4):
    """Log-probs now, old, of the reference; mask, advantages, entropy, log-probs of the sampler."""
    rng = random.Random(seed)
    old = [[rng.uniform(-3, -0.1) for _ in range(width)] for _ in range(samples)]
    logp, ref = ([[o + rng.gauss(0, spread) for o in row] for row in old] for _ in range(2))
    mask = [[rng.random() < 0.7 for _ in range(width)] for _ in range(samples)]
    mask[rng.randrange(samples)] = [False] * width
    advantages = [[rng.choice([-1.3, -0.2, 0.0, 0.7, 2.0]) for _ in row] for row in old]  # one a token
    entropy = [[rng.uniform(0, 3) for _ in row] for row in old]
    rollout = [[o + rng.gauss(0, spread / 2) for o in row] for row in old]
    return logp, old, ref, mask, advantages, entropy, rollout


def tensors(rows):
    return [torch.tensor(x, dtype=torch.bool if x is rows[3] else torch.float64) for x in rows]


def correcting(correction, cap, floor=None) -> dict[str, Any]:
    keys = ("rollout_correction", "rollout_correction_cap", "rollout_correction_floor")
    return dict(zip(keys, (correction, cap, floor), strict=True))


def run(values, counts, correction=None, cap=2.0, floor=None, **keys):
    """``policy_loss`` as the trainer calls it."""
    logp, old, ref, mask, advantages, entropy, rollout = values
    config = LossConfig(**correcting(correction or "none", cap, floor), **keys)
    return policy_loss(
        logp, old, advantages, mask, counts, config, LENGTH, rollout_logprobs_BR=rollout, ref_logprobs_BR=ref, entropy_BR=entropy
    )  # fmt: skip


@pytest.mark.parametrize("keys", COMPOSITIONS, ids=str)
def test_equals_the_papers(keys):
    for seed in range(20):
        rows = case(seed)
        values = tensors(rows)
        tokens, samples = int(values[3].sum()) + seed, 4 + seed % 3  # counts are the caller's, not this micro-batch's
        got = run(values, Counts(tokens, samples), **keys)
        assert got.loss.item() == pytest.approx(paper_loss(rows, tokens, samples, **keys), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("keys", COMPOSITIONS, ids=str)
def test_gradient_by_finite_differences_of_the_papers(keys):
    for seed in range(3):
        rows = case(seed)
        values = tensors(rows)
        low, high = 1 - keys.get("clip_low", 0.2), 1 + keys.get("clip_high", 0.2)
        log_ratio = torch.where(values[3], values[0] - values[1], 0.0)
        ratios = log_importance_ratio(log_ratio, values[3], LossConfig(ratio=keys.get("ratio", "token"))).exp()
        for kink in (low, high, keys.get("clip_dual") or high):
            assert (ratios - kink).abs().min() > 1e-5, "a ratio lies on the kink"
        values[0].requires_grad_()
        values[5].requires_grad_()
        out = run(values, Counts(17, 4), **keys)
        gradient, d_entropy = torch.autograd.grad(out.loss, [values[0], values[5]], allow_unused=True)
        for i, t in itertools.product(range(4), range(6)):
            ends = []
            for step in (1e-6, -1e-6):
                moved = [list(row) for row in rows[0]]
                moved[i][t] += step
                ends.append(paper_loss((moved, *rows[1:]), 17, 4, at=rows[0], **keys))
            assert gradient[i, t].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-8)
        mask = values[3]
        assert (gradient[~mask] == 0).all()
        if keys.get("entropy_coef"):
            aggregate = keys.get("aggregate", "token")
            assert d_entropy.allclose(
                -keys["entropy_coef"] * token_weights(mask, Counts(17, 4), LossConfig(aggregate=aggregate), LENGTH)
            )


def test_clipping_stops_a_tokens_gradient_and_cispo_does_not():
    old = torch.zeros(1, 3, dtype=torch.float64)
    mask = torch.ones(1, 3, dtype=torch.bool)
    gradients = {}
    for objective in ("clip", "cispo"):
        logp = torch.tensor([[2.0, 1.0, 0.9]], dtype=torch.float64).log().requires_grad_()
        config = LossConfig(objective=objective, clip_high=0.5)
        policy_loss(logp, old, torch.ones(1, 3), mask, Counts(1, 1), config, LENGTH).loss.backward()
        gradients[objective] = logp.grad
    assert gradients["clip"][0].tolist() == pytest.approx([0, -1, -0.9])
    assert gradients["cispo"][0].tolist() == pytest.approx([-1.5, -1, -0.9])


@pytest.mark.parametrize("objective", ["clip", "cispo"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_gradient_on_policy_is_that_of_plain_policy_gradient(ratio, objective):
    logp, _, _, mask, advantages, *_ = tensors(case(3))
    advantages = advantages[:, :1].expand_as(mask)  # one a sample: a sequence ratio mixes those of its tokens
    leaf = logp.clone().requires_grad_()
    tokens = int(mask.sum())
    config = LossConfig(ratio=ratio, objective=objective)
    policy_loss(leaf, logp, advantages, mask, Counts(tokens, 4), config, LENGTH).loss.backward()
    torch.testing.assert_close(leaf.grad, mask * -advantages / tokens, rtol=1e-12, atol=1e-15)


def test_kl_estimates_estimate_the_kl():
    """Averaged over a distribution: k1 and k3 are the KL, and on that average the gradients of k1 and k2 are the KL's."""
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    logp, ref = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    kl = (logp.exp() * (logp - ref)).sum()
    wanted = torch.autograd.grad(kl, logits, retain_graph=True)[0]
    for name in ("k1", "k2", "k3"):
        estimates = kl_estimate(ref - logp, logp, LossConfig(kl_estimator=name, kl_correction=False))
        mean = (logp.exp().detach() * estimates).sum()
        if name != "k2":
            assert mean.item() == pytest.approx(kl.item(), rel=1e-12)
        if name != "k3":  # k3's is the gradient of the other KL
            torch.testing.assert_close(torch.autograd.grad(mean, logits, retain_graph=True)[0], wanted)


def test_a_corrected_kl_has_the_gradient_of_the_kl_after_the_weights_have_moved():
    """Samples of old weights, averaged over their distribution: the derivative of KL(policy || reference) at the new weights."""
    generator = torch.Generator().manual_seed(1)
    logits, old_logits, ref_logits = torch.randn(3, 9, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    logp, old, ref = logits.log_softmax(-1), old_logits.log_softmax(-1), ref_logits.log_softmax(-1)
    wanted = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)[0]
    for name in ("k1", "k2", "k3"):
        mean = (old.exp() * kl_estimate(ref - logp, logp - old, LossConfig(kl_estimator=name))).sum()
        torch.testing.assert_close(torch.autograd.grad(mean, logits, retain_graph=True)[0], wanted)
        mean = (old.exp() * kl_estimate(ref - logp, logp, LossConfig(kl_estimator=name, kl_correction=False))).sum()
        assert (torch.autograd.grad(mean, logits, retain_graph=True)[0] - wanted).abs().max() > 0.05


EVERYTHING = {
    "kl_coef": 0.1, "entropy_coef": 0.1, "correction": "sequence_truncate", "ratio": "sequence", "clip_dual": 1.3,
    "off_policy_threshold": 0.01,
}  # fmt: skip


@pytest.mark.faults
@pytest.mark.parametrize("bad", [1e4, -1e4, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", [0, 1, 2, 4, 5, 6])
@pytest.mark.parametrize(
    "keys", [*({"aggregate": a} | EVERYTHING for a in AGGREGATES), {"objective": "cispo"}], ids=str
)
def test_masked_tokens_never_reach_loss_or_gradients(bad, where, keys):
    values = [x.float() if x.is_floating_point() else x for x in tensors(case(1))]
    spoiled = list(values)
    spoiled[where] = torch.where(values[3], values[where], bad)

    def everything(values):
        leaf = values[0].clone().requires_grad_()
        out = run([leaf, *values[1:]], Counts(9, 4), **keys)
        out.loss.backward()
        return [*(x.detach() for x in out), leaf.grad]

    for clean, got in zip(everything(values), everything(spoiled), strict=True):
        assert got.isfinite().all()
        assert torch.equal(clean, got)


@pytest.mark.parametrize("keys", [*({"aggregate": a, "kl_coef": 0.1} for a in AGGREGATES), EVERYTHING], ids=str)
def test_shares_of_micro_batches_add_up(keys):
    values = tensors(case(7, samples=9))
    counts = Counts(int(values[3].sum()), 9)
    leaf = values[0].clone().requires_grad_()

    def part(rows):
        out = run([x[rows] for x in (leaf, *values[1:])], counts, **keys)
        return torch.stack([x.detach().double() for x in out]), torch.autograd.grad(out.loss, leaf)[0]

    whole, whole_grad = part(slice(None))
    for cuts in ([0, 4, 9], [0, 1, 2, 8, 9], range(10)):
        parts = [part(slice(a, b)) for a, b in itertools.pairwise(cuts)]
        outs, grads = (torch.stack(values).sum(0) for values in zip(*parts, strict=True))
        torch.testing.assert_close(outs, whole, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(grads, whole_grad, rtol=1e-12, atol=1e-14)


def test_clipped_tokens_and_kl_by_hand():
    ratio = torch.tensor([[0.5, 0.5, 1.5, 1.1], [0.5, 1.5, 1.5, 0.9], [0.5, 1.5, 1.0, 1.0]], dtype=torch.float64)
    mask = torch.tensor([[True] * 4, [True, True, False, True], [True] * 4])
    advantages = torch.tensor([-1.0, 1.0, 0.0]).view(3, 1).expand(3, 4)
    old = torch.full_like(ratio, -1.0)
    inputs = (old + ratio.log(), old, advantages, mask, Counts(11, 3))
    config = LossConfig(kl_coef=1.0, kl_correction=False)
    out = policy_loss(*inputs, config, LENGTH, ref_logprobs_BR=old + ratio.log() + math.log(2.0))
    assert out.clipped_low.item() == 2  # low ratios of the negative sample
    assert out.clipped_high.item() == 1  # the masked one is not counted, nor those of the sample without an advantage
    assert out.kl.item() == pytest.approx(11 * (2 - math.log(2) - 1))
    # Negative sample: 0.8 + 0.8 + 1.5 + 1.1, against it 0.5 + 1.2 + 0.9.
    assert out.loss.item() == pytest.approx((0.8 + 0.8 + 1.5 + 1.1 - 0.5 - 1.2 - 0.9) / 11 + (2 - math.log(2) - 1))
    assert not any(x.requires_grad for x in out[1:])
    out = policy_loss(*inputs, LossConfig(objective="cispo"), LENGTH)  # the weight is clipped on either side
    assert (out.clipped_low.item(), out.clipped_high.item()) == (3, 2)
    assert out.clipped_dual == 0
    out = policy_loss(*inputs, LossConfig(clip_high=0.1, clip_dual=1.3), LENGTH)
    assert (out.clipped_low.item(), out.clipped_high.item(), out.clipped_dual.item()) == (2, 1, 1)
    assert out.loss.item() == pytest.approx((0.8 + 0.8 + 1.3 + 1.1 - 0.5 - 1.1 - 0.9) / 11)
    # Geometric means of the three samples: 0.80 (4 tokens), 0.88 (3 tokens), 0.93.
    out = policy_loss(*inputs, LossConfig(ratio="sequence", clip_low=0.15, clip_high=0.15), LENGTH)
    assert (out.clipped_low.item(), out.clipped_high.item()) == (4, 0)


def test_rollout_correction_by_hand():
    ratio = torch.tensor([[2.0, 0.5, 1.5, 9.0], [1.0, 1.2, 0.1, 1.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False], [True, True, False, True]])  # products: 1.5 and 1.2
    old = torch.full_like(ratio, -1.0).requires_grad_()
    expected = [
        ("token_truncate", 1.3, None, [[1.3, 0.5, 1.3], [1, 1.2, 1]], 2),
        ("token_truncate", 1.3, 0.7, [[1.3, 0.7, 1.3], [1, 1.2, 1]], 3),
        ("token_mask", 1.3, None, [[0, 0, 0], [1, 1.2, 1]], 3),
        ("token_mask", 1.3, 0.0, [[0, 0.5, 0], [1, 1.2, 1]], 2),
        ("token_mask", 2.0, None, [[2, 0.5, 1.5], [1, 1.2, 1]], 0),
        ("token_mask", 2.0, 0.7, [[2, 0, 1.5], [1, 1.2, 1]], 1),
        ("sequence_truncate", 1.3, None, [[1.3] * 3, [1.2] * 3], 3),
        ("sequence_mask", 1.3, None, [[0] * 3, [1.2] * 3], 3),
    ]
    for correction, cap, floor, weights, changed in expected:
        got, flags = rollout_correction(
            old, old.detach() - ratio.log(), mask, LossConfig(**correcting(correction, cap, floor))
        )
        assert got[mask].tolist() == pytest.approx([w for row in weights for w in row]), correction
        assert flags.sum().item() == changed
        assert not flags[~mask].any()
        assert not got.requires_grad


def test_a_hopeless_mismatch_is_truncated_or_masked_without_nan():
    zeros, mask = torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool)
    for correction, weight in zip(CORRECTIONS, (2.0, 0.0, 2.0, 0.0), strict=True):
        got, flags = rollout_correction(zeros, zeros - 500, mask, LossConfig(**correcting(correction, 2.0)))
        assert got.tolist() == [[weight] * 4]
        assert flags.all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_a_rollout_logprob_that_is_no_number_leaves_its_token_s_factor_at_1(correction, bad):
    """As if the sampler had said what the trainer says; loss and gradient are finite."""
    clean = tensors(case(5))
    mask, old = clean[3], clean[1]
    i, t = mask.nonzero()[0].tolist()
    outs = []
    for value in (bad, old[i, t].item()):
        values = [x.clone() for x in clean]
        values[6][i, t] = value
        leaf = values[0].requires_grad_()
        factor, flags = rollout_correction(old, values[6], mask, LossConfig(**correcting(correction, 1.3)))
        if correction.startswith("token"):
            assert factor[i, t] == 1 and not flags[i, t]
        out = run([leaf, *values[1:]], Counts(9, 4), correction=correction, cap=1.3)
        out.loss.backward()
        outs.append([*(x.detach() for x in out), leaf.grad, factor, flags])
    assert all(x.isfinite().all() for x in outs[0])
    for got, wanted in zip(*outs, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("objective", ["clip", "cispo"])
def test_a_ratio_that_overflows_is_clipped_without_nan(objective, ratio):
    """exp(90) is inf in float32. A sample each: clipped above, below (exp(-90)), without an advantage, and one in range."""
    logp = torch.tensor([[-1.0], [-91.0], [-1.0], [-1.0]], requires_grad=True)
    old = torch.tensor([[-91.0], [-1.0], [-91.0], [-1.1]])
    mask, advantages = torch.ones(4, 1, dtype=torch.bool), torch.tensor([[2.0], [-2.0], [0.0], [2.0]])
    config = LossConfig(objective=objective, ratio=ratio)
    out = policy_loss(logp, old, advantages, mask, Counts(4, 4), config, LENGTH)
    out.loss.backward()
    assert logp.grad is not None
    if objective == "clip":
        assert out.loss.item() == pytest.approx(-(1.2 * 2 - 0.8 * 2 + 0 + 2 * math.exp(0.1)) / 4)
        assert logp.grad.flatten().tolist() == pytest.approx([0, 0, 0, -2 * math.exp(0.1) / 4])
    else:  # every token has a gradient: the clipped ratio times the advantage
        assert logp.grad.flatten().tolist() == pytest.approx([-1.2 * 2 / 4, 0.8 * 2 / 4, 0, -2 * math.exp(0.1) / 4])


@pytest.mark.parametrize("correction", ["token_mask", "sequence_mask"])
def test_a_ratio_that_overflows_is_dropped_without_nan(correction):
    """The correction masks the first sample, whose ratio exp(149) no clip limits: its advantage is negative."""
    logp = torch.tensor([[-1.0], [-1.0]], requires_grad=True)
    old, sampler = torch.tensor([[-150.0], [-1.1]]), torch.tensor([[-1.0], [-1.1]])
    mask, advantages = torch.ones(2, 1, dtype=torch.bool), torch.tensor([[-1.0], [2.0]])
    config = LossConfig(rollout_correction=correction)
    out = policy_loss(logp, old, advantages, mask, Counts(2, 2), config, LENGTH, rollout_logprobs_BR=sampler)
    out.loss.backward()
    assert logp.grad is not None and out.corrected == 1
    assert out.loss.item() == pytest.approx(-2 * math.exp(0.1) / 2)
    assert logp.grad.flatten().tolist() == pytest.approx([0, -2 * math.exp(0.1) / 2])


def test_off_policy_masking_by_hand():
    """Drifts a token of 0.5, 0.1 and 0.5; the first and second sample have negative advantages. One log-prob is unknown."""
    rollout = torch.tensor([[-1.0, -1.0], [-1.0, math.nan], [-1.0, -1.0]], dtype=torch.float64)
    logp = (rollout.nan_to_num(-1.0) - torch.tensor([[0.5, 0.5], [0.2, 9.0], [0.2, 0.8]])).requires_grad_()
    advantages = torch.tensor([[-1.0], [-1.0], [1.0]]).expand(3, 2)
    mask = torch.ones(3, 2, dtype=torch.bool)
    config = LossConfig(off_policy_threshold=0.4)
    out = policy_loss(logp, logp.detach(), advantages, mask, Counts(6, 3), config, LENGTH, rollout_logprobs_BR=rollout)
    out.loss.backward()
    assert logp.grad is not None and out.off_policy == 2 and out.loss.item() == pytest.approx((2 - 2) / 6)
    assert logp.grad.tolist() == [[0, 0], [pytest.approx(1 / 6)] * 2, [pytest.approx(-1 / 6)] * 2]


def test_token_weights_by_hand():
    mask = torch.tensor([[True, True, False], [True, False, False], [False] * 3])
    weights = {a: token_weights(mask, Counts(12, 6), LossConfig(aggregate=a), 5) for a in AGGREGATES}
    assert weights["token"].tolist() == [[1 / 12, 1 / 12, 0], [1 / 12, 0, 0], [0, 0, 0]]
    assert weights["sample"].tolist() == [[1 / 12, 1 / 12, 0], [1 / 6, 0, 0], [0, 0, 0]]
    assert weights["constant"].flatten().tolist() == pytest.approx([1 / 30, 1 / 30, 0, 1 / 30, 0, 0, 0, 0, 0])


@pytest.mark.parametrize("shape", [(0, 0), (3, 0), (3, 2)])
@pytest.mark.parametrize("keys", [*({"aggregate": a} for a in AGGREGATES), EVERYTHING], ids=str)
def test_an_empty_batch_has_no_loss_and_no_gradient(shape, keys):
    logp, zeros = torch.zeros(shape, requires_grad=True), torch.zeros(shape)
    mask = torch.zeros(shape, dtype=torch.bool)
    out = run((logp, zeros, zeros, mask, torch.ones(shape), zeros, zeros), Counts(0, 0), **keys)
    out.loss.backward()
    assert [x.item() for x in out] == [0] * len(out)
    assert logp.grad is not None
    assert logp.grad.abs().sum() == 0


@pytest.mark.parametrize(
    ("key", "value", "needed"),
    [
        ("kl_coef", 0.1, "ref_logprobs"),
        ("entropy_coef", 0.1, "entropy"),
        ("rollout_correction", "token_mask", "rollout_logprobs"),
        ("off_policy_threshold", 0.5, "rollout_logprobs"),
    ],
)
def test_what_a_term_needs_must_be_there(key, value, needed):
    x = torch.zeros(1, 1)
    keys: dict[str, Any] = {key: value}
    with pytest.raises(ValueError, match=f"{key}={value} needs {needed}"):
        policy_loss(x, x, torch.ones(1), x == 0, Counts(1, 1), LossConfig(**keys), LENGTH)
