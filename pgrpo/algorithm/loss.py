"""Policy-gradient losses on per-sample log-probs, composed of a ratio, an objective, a KL estimate and a way to add up. Every sum
is over the mask and divided by a global count, so that the loss and its gradient do not depend on how a step's samples were cut
into micro-batches and ranks.

B samples of the micro-batch, R tokens of the longest completion.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Ratio = Literal["token", "sequence"]
Objective = Literal["clip", "cispo"]
Aggregate = Literal["token", "sample", "constant"]
KlEstimator = Literal["k1", "k2", "k3"]
Correction = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


class Counts(NamedTuple):
    """Global counts of one update, over all ranks and micro-batches, skipped and masked samples included."""

    tokens: int
    samples: int


class LossOutput(NamedTuple):
    """``loss`` is this micro-batch's share of the global loss (shares add up); the rest are sums over masked tokens, detached."""

    loss: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    kl: Tensor


def policy_loss(
    logprobs_BR: Tensor,
    old_logprobs_BR: Tensor,
    advantages_B: Tensor,
    mask_BR: Tensor,
    counts: Counts,
    *,
    ratio: Ratio = "token",
    objective: Objective = "clip",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    aggregate: Aggregate = "token",
    max_completion_tokens: int = 1,
    ref_logprobs_BR: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KlEstimator = "k3",
    entropy_BR: Tensor | None = None,
    entropy_coef: float = 0.0,
    correction_BR: Tensor | None = None,
) -> LossOutput:
    """``- sum_i w_i [ c_i * J_i - kl_coef * KL_i + entropy_coef * H_i ]`` over masked tokens i.

    With token ratios, clipping, ``aggregate="sample"`` and k3 it is GRPO's (DeepSeekMath, arXiv 2402.03300, equation 3).

    Args:
        logprobs_BR: [B, R] of the current weights; carries a gradient, as ``entropy_BR`` does; nothing else may.
        old_logprobs_BR: [B, R] of the weights that sampled.
        advantages_B: [B], one number a sample.
        mask_BR: [B, R] bool, True on tokens that count. Entries elsewhere may hold anything, inf and nan too.
        counts: tokens and samples of the whole update, over all ranks.
        ratio: see ``importance_ratio``.
        objective: J, see ``surrogate``.
        clip_low: the ratio is clipped below at 1 - clip_low; clip_high: above at 1 + clip_high (apart: DAPO, arXiv 2503.14476,
            equation 10).
        aggregate: w, see ``token_weights``; max_completion_tokens: the fixed length of ``constant``.
        ref_logprobs_BR: [B, R] of the reference model; needed when ``kl_coef`` is not 0.
        kl_coef: weight of the KL estimate; kl_estimator: see ``kl_estimate``.
        entropy_BR: [B, R] entropy H of each token's distribution; needed when ``entropy_coef`` is not 0.
        entropy_coef: weight of the entropy bonus (PPO, arXiv 1707.06347, equation 9).
        correction_BR: [B, R] factor c of each token's objective, from ``rollout_correction``. None is 1.
    """
    # Masked before exp: an overflow there would turn into nan gradients, even under a mask applied later.
    log_ratio_BR = torch.where(mask_BR, logprobs_BR - old_logprobs_BR, 0.0)
    ratio_BR = importance_ratio(log_ratio_BR, mask_BR, ratio)
    advantages_B1 = advantages_B.unsqueeze(-1)
    masked_logprobs_BR = torch.where(mask_BR, logprobs_BR, 0.0)
    objective_BR = surrogate(ratio_BR, masked_logprobs_BR, advantages_B1, clip_low, clip_high, objective)
    if correction_BR is not None:
        objective_BR = objective_BR * correction_BR

    kl_BR = torch.zeros_like(ratio_BR)
    if kl_coef:
        if ref_logprobs_BR is None:
            raise ValueError(f"kl_coef={kl_coef} needs ref_logprobs")
        kl_BR = kl_estimate(torch.where(mask_BR, ref_logprobs_BR - logprobs_BR, 0.0), kl_estimator)
        objective_BR = objective_BR - kl_coef * kl_BR
    if entropy_coef:
        if entropy_BR is None:
            raise ValueError(f"entropy_coef={entropy_coef} needs entropy")
        objective_BR = objective_BR + entropy_coef * torch.where(mask_BR, entropy_BR, 0.0)

    weights_BR = token_weights(mask_BR, counts, aggregate, max_completion_tokens).to(objective_BR.dtype)
    with torch.no_grad():
        # Where the clip takes effect: CISPO's does on either sign of the advantage.
        low_B1 = advantages_B1 != 0 if objective == "cispo" else advantages_B1 < 0
        high_B1 = advantages_B1 != 0 if objective == "cispo" else advantages_B1 > 0
        low_BR = mask_BR & (ratio_BR < 1 - clip_low) & low_B1
        high_BR = mask_BR & (ratio_BR > 1 + clip_high) & high_B1
    return LossOutput(
        loss=-(weights_BR * objective_BR).sum(),
        clipped_low=low_BR.sum(),
        clipped_high=high_BR.sum(),
        kl=kl_BR.detach().sum(),
    )


def importance_ratio(log_ratio_BR: Tensor, mask_BR: Tensor, ratio: Ratio) -> Tensor:
    """[B, R] of ``exp(logprobs - old_logprobs)``; ``log_ratio_BR`` is 0 off the mask.

    ``token``: each token's own (GRPO). ``sequence``: the geometric mean over the sample's tokens, on each of them (GSPO,
    arXiv 2507.18071, equation 7).
    """
    if ratio == "sequence":
        tokens_B1 = mask_BR.sum(-1, keepdim=True).clamp(min=1)
        log_ratio_BR = (log_ratio_BR.sum(-1, keepdim=True) / tokens_B1).expand_as(log_ratio_BR)
    return log_ratio_BR.exp()


def surrogate(
    ratio_BR: Tensor,
    logprobs_BR: Tensor,
    advantages_B1: Tensor,
    clip_low: float,
    clip_high: float,
    objective: Objective,
) -> Tensor:
    """[B, R] of what is maximised.

    ``clip``: ``min(r A, clip(r) A)`` (PPO, arXiv 1707.06347, equation 7). A token whose ratio is clipped has no gradient.
    ``cispo``: ``stop_gradient(clip(r)) A logprob`` (MiniMax-M1, arXiv 2506.13585, equations 4 and 5). Every token has one.
    """
    clipped_BR = ratio_BR.clamp(1 - clip_low, 1 + clip_high)
    if objective == "cispo":
        return clipped_BR.detach() * advantages_B1 * logprobs_BR
    return torch.minimum(ratio_BR * advantages_B1, clipped_BR * advantages_B1)


def kl_estimate(d_BR: Tensor, estimator: KlEstimator) -> Tensor:
    """[B, R] of one-sample estimates of KL(policy || reference), with ``d = ref_logprobs - logprobs``.

    ``k1``: ``-d``. ``k2``: ``d^2 / 2``. ``k3``: ``exp(d) - d - 1`` (DeepSeekMath, arXiv 2402.03300, equation 4; the names are
    Schulman's, joschu.net/blog/kl-approx.html).

    The gradient of k1 as it stands is noise: its expectation is 0, whatever the reference (arXiv 2510.01555). Ours is that of
    k1 subtracted from the reward, ``stop_gradient(k1) * d logprob``; k2 has the same gradient.
    """
    if estimator == "k1":
        k1_BR = -d_BR.detach()
        return k1_BR - k1_BR * (d_BR - d_BR.detach())
    return d_BR.square() / 2 if estimator == "k2" else d_BR.exp() - d_BR - 1


def rollout_correction(
    old_logprobs_BR: Tensor, rollout_logprobs_BR: Tensor, mask_BR: Tensor, correction: Correction, cap: float
) -> tuple[Tensor, Tensor]:
    """Importance weights between the trainer's and the sampler's numerics, for tokens that the sampler drew.

    ``r = exp(old_logprobs - rollout_logprobs)``: of a token, or ``sequence``: the product over its sample's tokens, on each of
    them. That product is what TRL (``sequence_*`` of ``vllm_importance_sampling_mode``) and verl (``rollout_is: sequence``) mean,
    and the unbiased one; verl calls the geometric mean ``geometric``.

    ``truncate``: ``min(r, cap)``, truncated importance sampling (TIS: Yao et al., 2025, "Your efficient RL framework secretly
    brings you off-policy RL training"; the estimator is Ionides', 2008). ``mask``: ``r`` where ``1/cap <= r <= cap``, else 0,
    masked importance sampling (MIS: Liu et al., 2025, "When speed kills stability"; IcePop is its two-sided token form).

    Returns:
        [B, R] weight of each token's objective, without a gradient, and [B, R] bool, the tokens that were truncated or masked.
    """
    log_ratio_BR = torch.where(mask_BR, old_logprobs_BR - rollout_logprobs_BR, 0.0).detach()
    if correction in ("sequence_truncate", "sequence_mask"):
        log_ratio_BR = log_ratio_BR.sum(-1, keepdim=True).expand_as(log_ratio_BR)
    ratio_BR = log_ratio_BR.exp()
    if correction in ("token_truncate", "sequence_truncate"):
        return ratio_BR.clamp(max=cap), mask_BR & (ratio_BR > cap)
    outside_BR = (ratio_BR > cap) | (ratio_BR < 1 / cap)
    return torch.where(outside_BR, 0.0, ratio_BR), mask_BR & outside_BR


def token_weights(mask_BR: Tensor, counts: Counts, aggregate: Aggregate, max_completion_tokens: int) -> Tensor:
    """[B, R] float64 weight of each token in the loss; 0 off the mask. A sample without tokens weighs nothing, but is counted.

    ``token``: all tokens of the update weigh the same (DAPO, arXiv 2503.14476, equation 12). ``sample``: mean over a sample's
    tokens, then over samples (GRPO, arXiv 2402.03300, equation 3). ``constant``: sum over tokens over a fixed length, then mean
    over samples (Dr. GRPO, arXiv 2503.20783, section 3.2).
    """
    mask = mask_BR.double()
    if aggregate == "token":
        return mask / max(counts.tokens, 1)
    if aggregate == "sample":
        return mask / mask.sum(-1, keepdim=True).clamp(min=1) / max(counts.samples, 1)
    return mask / max_completion_tokens / max(counts.samples, 1)
