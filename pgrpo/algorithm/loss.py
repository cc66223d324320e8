"""Policy-gradient losses on per-sample log-probs, composed of a ratio, an objective, a KL estimate and an aggregation. Every sum is
over the mask and divided by a global count, so the loss and its gradient do not depend on micro-batches and ranks.

B samples of the micro-batch, R tokens of the longest completion.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pgrpo.config import LossConfig


class Counts(NamedTuple):
    """Counts of one update over all ranks and micro-batches, with skipped and masked samples."""

    tokens: int
    samples: int


class LossOutput(NamedTuple):
    """``loss`` is this micro-batch's part of the global loss: parts add up. The others are sums over masked tokens, detached."""

    loss: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    kl: Tensor
    corrected: Tensor
    """Tokens that ``rollout_correction`` truncated or masked."""
    clipped_dual: Tensor
    """Tokens of negative advantage whose ratio is above ``clip_dual``."""
    off_policy: Tensor
    """Tokens that ``off_policy_threshold`` masked."""
    teacher_kl: Tensor
    """KL(policy || teacher) of the tokens: of ``full`` exact, of ``sampled`` an estimate (k1)."""


def policy_loss(
    logprobs_BR: Tensor,
    old_logprobs_BR: Tensor,
    advantages_BR: Tensor,
    mask_BR: Tensor,
    counts: Counts,
    config: LossConfig,
    max_completion_tokens: int,
    *,
    rollout_logprobs_BR: Tensor | None = None,
    ref_logprobs_BR: Tensor | None = None,
    teacher_logprobs_BR: Tensor | None = None,
    teacher_kl_BR: Tensor | None = None,
    entropy_BR: Tensor | None = None,
) -> LossOutput:
    """``- sum_i w_i [ c_i * J_i - kl_coef * KL_i - teacher_coef * D_i + entropy_coef * H_i ]`` over masked tokens i.

    With token ratios, clipping, ``aggregate="sample"`` and k3 without ``kl_correction`` it is GRPO's (DeepSeekMath, arXiv
    2402.03300, equation 3).

    Args:
        logprobs_BR: [B, R] of the current weights. Only this, ``teacher_kl_BR`` and ``entropy_BR`` may carry a gradient.
        old_logprobs_BR: [B, R] of the weights that sampled.
        advantages_BR: [B, R], one number a token.
        mask_BR: [B, R] bool, True on tokens in the loss. All other inputs may have any value elsewhere, inf and nan too.
        counts: tokens and samples of the whole update, over all ranks.
        config: the section ``loss``. The terms of the formula: J is ``surrogate``, KL is ``kl_estimate``, c is
            ``rollout_correction`` (1 without one) and 0 where ``off_policy_threshold`` masks, and w is ``token_weights``.
        max_completion_tokens: the fixed length that ``aggregate="constant"`` divides by.
        rollout_logprobs_BR: [B, R] of the sampler; needed for ``rollout_correction`` and ``off_policy_threshold``.
        ref_logprobs_BR: [B, R] of the reference model; needed when ``kl_coef`` is not 0.
        teacher_logprobs_BR: [B, R] of the teacher; needed with ``teacher_kl="sampled"``, which adds
            ``teacher_coef * (teacher_logprobs - logprobs)``, without a gradient, to the advantages (Lu et al., 2025, "On-policy
            distillation"); D is 0.
        teacher_kl_BR: [B, R] KL(policy || teacher) over the vocabulary, which is D; needed with ``teacher_kl="full"`` (the reverse
            KL of GKD, arXiv 2306.13649, section 3).
        entropy_BR: [B, R] entropy H of each token's distribution; needed when ``entropy_coef`` is not 0 (PPO, arXiv 1707.06347,
            equation 9).

    Raises:
        ValueError: a term's input is missing.
    """
    # Mask before exp: an overflow would give nan gradients even if it were masked afterwards.
    token_log_ratio_BR = torch.where(mask_BR, logprobs_BR - old_logprobs_BR, 0.0)
    log_ratio_BR = log_importance_ratio(token_log_ratio_BR, mask_BR, config)
    advantages_BR = torch.where(mask_BR, advantages_BR, 0.0)
    distance_BR = torch.zeros_like(log_ratio_BR)
    if config.teacher is not None and config.teacher_kl == "sampled":
        teacher_BR = _given(teacher_logprobs_BR, "teacher_kl=sampled", "teacher_logprobs")
        distance_BR = torch.where(mask_BR, logprobs_BR.detach() - teacher_BR, 0.0)
        advantages_BR = advantages_BR - config.teacher_coef * distance_BR
    correction_BR, corrected_BR = torch.ones_like(log_ratio_BR), torch.zeros_like(mask_BR)
    if config.rollout_correction != "none":
        rollout_BR = _given(rollout_logprobs_BR, f"rollout_correction={config.rollout_correction}", "rollout_logprobs")
        correction_BR, corrected_BR = rollout_correction(old_logprobs_BR, rollout_BR, mask_BR, config)
    off_policy_BR = torch.zeros_like(mask_BR)
    if config.off_policy_threshold is not None:
        threshold = f"off_policy_threshold={config.off_policy_threshold}"
        drift_B1 = sequence_drift(logprobs_BR, _given(rollout_logprobs_BR, threshold, "rollout_logprobs"), mask_BR)
        off_policy_BR = (advantages_BR < 0) & (drift_B1 > config.off_policy_threshold)
        correction_BR = torch.where(off_policy_BR, 0.0, correction_BR)
    # Without an advantage the surrogate takes no exp of a ratio, which may overflow where the correction drops the token.
    kept_BR = torch.where(correction_BR == 0, 0.0, advantages_BR)
    objective_BR = surrogate(log_ratio_BR, torch.where(mask_BR, logprobs_BR, 0.0), kept_BR, config) * correction_BR

    kl_BR = torch.zeros_like(log_ratio_BR)
    if config.kl_coef:
        ref_BR = _given(ref_logprobs_BR, f"kl_coef={config.kl_coef}", "ref_logprobs")
        d_BR = torch.where(mask_BR, ref_BR - logprobs_BR, 0.0)
        kl_BR = kl_estimate(d_BR, token_log_ratio_BR, config)
        objective_BR = objective_BR - config.kl_coef * kl_BR
    if config.teacher is not None and config.teacher_kl == "full":
        distance_BR = torch.where(mask_BR, _given(teacher_kl_BR, "teacher_kl=full", "teacher_kl"), 0.0)
        objective_BR = objective_BR - config.teacher_coef * distance_BR
    if config.entropy_coef:
        entropy_BR = _given(entropy_BR, f"entropy_coef={config.entropy_coef}", "entropy")
        objective_BR = objective_BR + config.entropy_coef * torch.where(mask_BR, entropy_BR, 0.0)

    weights_BR = token_weights(mask_BR, counts, config, max_completion_tokens).to(objective_BR.dtype)
    with torch.no_grad():
        ratio_BR = log_ratio_BR.exp()
        # Clipping has an effect on one sign of the advantage; in CISPO on both.
        may_clip_low_BR = advantages_BR != 0 if config.objective == "cispo" else advantages_BR < 0
        may_clip_high_BR = advantages_BR != 0 if config.objective == "cispo" else advantages_BR > 0
        low_BR = mask_BR & (ratio_BR < 1 - config.clip_low) & may_clip_low_BR
        high_BR = mask_BR & (ratio_BR > 1 + config.clip_high) & may_clip_high_BR
        dual_BR = (advantages_BR < 0) & (ratio_BR > (config.clip_dual or math.inf))
    return LossOutput(
        loss=-(weights_BR * objective_BR).sum(),
        clipped_low=low_BR.sum(),
        clipped_high=high_BR.sum(),
        kl=kl_BR.detach().sum(),
        corrected=corrected_BR.sum(),
        clipped_dual=dual_BR.sum(),
        off_policy=off_policy_BR.sum(),
        teacher_kl=distance_BR.detach().sum(),
    )


def _given(values_BR: Tensor | None, term: str, name: str) -> Tensor:
    if values_BR is None:
        raise ValueError(f"{term} needs {name}")
    return values_BR


def log_importance_ratio(log_ratio_BR: Tensor, mask_BR: Tensor, config: LossConfig) -> Tensor:
    """[B, R] logarithm of the ratio r that is clipped; ``log_ratio_BR`` is ``logprobs - old_logprobs``, 0 off the mask.

    ``token``: each token's own ratio (GRPO). ``sequence``: the geometric mean over the sample's tokens, for each of them (GSPO,
    arXiv 2507.18071, equation 7).
    """
    if config.ratio == "token":
        return log_ratio_BR
    tokens_B1 = mask_BR.sum(-1, keepdim=True).clamp(min=1)
    return (log_ratio_BR.sum(-1, keepdim=True) / tokens_B1).expand_as(log_ratio_BR)


def surrogate(log_ratio_BR: Tensor, logprobs_BR: Tensor, advantages_BR: Tensor, config: LossConfig) -> Tensor:
    """[B, R] objective J, which is maximised.

    ``clip``: ``min(r A, clip(r) A)`` (PPO, arXiv 1707.06347, equation 7). A token whose ratio is clipped has no gradient.
    The bounds are 1 - clip_low and 1 + clip_high (separate bounds: DAPO, arXiv 2503.14476, equation 10). With ``clip_dual`` a
    negative advantage has an upper bound too, ``max(min(r A, clip(r) A), clip_dual A)`` (dual clip: arXiv 1912.09729, equation 5).
    ``cispo``: ``stop_gradient(clip(r)) A logprob`` (MiniMax-M1, arXiv 2506.13585, equations 4 and 5). Every token has a gradient.
    """
    low, high = 1 - config.clip_low, 1 + config.clip_high
    ratio_BR = log_ratio_BR.detach().exp()
    if config.objective == "cispo":
        return ratio_BR.clamp(low, high) * advantages_BR * logprobs_BR
    floor_BR = torch.full_like(ratio_BR, low).masked_fill(advantages_BR > 0, 0.0)
    ceiling_BR = torch.full_like(ratio_BR, high).masked_fill(advantages_BR < 0, config.clip_dual or math.inf)
    clipped_BR = ratio_BR.clamp(floor_BR, ceiling_BR)
    is_clipped_BR = (ratio_BR < floor_BR) | (ratio_BR > ceiling_BR) | (advantages_BR == 0)
    # A ratio above exp(88) is inf in float32, and the backward of exp gives 0 * inf = nan. So clipped tokens do not go through exp.
    free_BR = torch.where(is_clipped_BR, 0.0, log_ratio_BR).exp()
    return torch.where(is_clipped_BR, clipped_BR, free_BR) * advantages_BR


def kl_estimate(d_BR: Tensor, log_ratio_BR: Tensor, config: LossConfig) -> Tensor:
    """[B, R] one-sample estimates of KL(policy || reference), with ``d = ref_logprobs - logprobs``.

    ``k1``: ``-d``. ``k2``: ``d^2 / 2``. ``k3``: ``exp(d) - d - 1`` (DeepSeekMath, arXiv 2402.03300, equation 4; the names are
    Schulman's, joschu.net/blog/kl-approx.html).

    The gradient of k1 itself has expectation 0 for any reference (arXiv 2510.01555). This k1 has the gradient of a k1 that is
    subtracted from the reward, ``stop_gradient(k1) * d logprob``, which is also the gradient of k2. That of k3 is another one,
    whose expectation is the gradient of KL(reference || policy).

    With ``kl_correction`` each estimate is weighted by the token's ratio r (``log_ratio_BR`` is its logarithm), and all have the
    gradient ``r * k1 * d logprob``: that of KL(policy || reference), also after the weights have moved from those that sampled
    (DeepSeek-V3.2, arXiv 2512.02556, equation 7). For k3 that is the derivative of ``r * k3``, through both factors.
    """
    if config.kl_estimator == "k1":
        k1_BR = -d_BR.detach()
        kl_BR = k1_BR - k1_BR * (d_BR - d_BR.detach())
    else:
        kl_BR = d_BR.square() / 2 if config.kl_estimator == "k2" else d_BR.exp() - d_BR - 1
    if not config.kl_correction:
        return kl_BR
    return kl_BR * (log_ratio_BR if config.kl_estimator == "k3" else log_ratio_BR.detach()).exp()


def rollout_correction(
    old_logprobs_BR: Tensor, rollout_logprobs_BR: Tensor, mask_BR: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor]:
    """Importance weights that correct for numerical differences between the sampler and the trainer.

    ``r = exp(old_logprobs - rollout_logprobs)`` of a token, or with ``sequence`` the product over the sample's tokens, for each of
    them. The product is unbiased, and is also ``sequence`` in TRL (``vllm_importance_sampling_mode``) and verl (``rollout_is``);
    verl's name for the geometric mean is ``geometric``.

    ``truncate``: ``max(floor, min(r, cap))``, truncated importance sampling (TIS: Yao et al., 2025, "Your efficient RL framework
    secretly brings you off-policy RL training"; the estimator is Ionides', 2008). ``mask``: ``r`` where ``floor <= r <= cap``,
    else 0, masked importance sampling (MIS: Liu et al., 2025, "When speed kills stability"; IcePop is its two-sided token form).
    Without ``rollout_correction_floor`` the floor is 0 for ``truncate``, and 1/cap for ``mask``.

    If a token's rollout log-prob is not finite, its ``r`` is 1, also in the product.

    Returns:
        [B, R] weight of each token's objective, detached, and [B, R] bool, True on tokens that were truncated or masked.
    """
    correction, cap = config.rollout_correction, config.rollout_correction_cap
    known_BR = mask_BR & rollout_logprobs_BR.isfinite()
    log_ratio_BR = torch.where(known_BR, old_logprobs_BR - rollout_logprobs_BR, 0.0).detach()
    if correction in ("sequence_truncate", "sequence_mask"):
        log_ratio_BR = log_ratio_BR.sum(-1, keepdim=True).expand_as(log_ratio_BR)
    ratio_BR = log_ratio_BR.exp()
    truncates, floor = correction in ("token_truncate", "sequence_truncate"), config.rollout_correction_floor
    if floor is None:
        floor = 0.0 if truncates else 1 / cap
    outside_BR = (ratio_BR > cap) | (ratio_BR < floor)
    return ratio_BR.clamp(floor, cap) if truncates else torch.where(outside_BR, 0.0, ratio_BR), mask_BR & outside_BR


def sequence_drift(logprobs_BR: Tensor, rollout_logprobs_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """[B, 1] mean of ``rollout_logprobs - logprobs`` over each sample's tokens, detached: an estimate of KL(sampler || policy) a
    token. A sample of negative advantage is left out of the objective where this is above ``off_policy_threshold`` (DeepSeek-V3.2,
    arXiv 2512.02556, equation 9). A log-prob of the sampler that is not finite adds 0.
    """
    known_BR = mask_BR & rollout_logprobs_BR.isfinite()
    drift_BR = torch.where(known_BR, rollout_logprobs_BR - logprobs_BR.detach(), 0.0)
    return drift_BR.sum(-1, keepdim=True) / mask_BR.sum(-1, keepdim=True).clamp(min=1)


def token_weights(mask_BR: Tensor, counts: Counts, config: LossConfig, max_completion_tokens: int) -> Tensor:
    """[B, R] float64 weight of each token in the loss, 0 outside the mask. ``counts.samples`` includes samples without tokens.

    ``token``: mean over all tokens of the update (DAPO, arXiv 2503.14476, equation 12). ``sample``: mean over a sample's tokens,
    then over samples (GRPO, arXiv 2402.03300, equation 3). ``constant``: sum over a sample's tokens divided by
    ``max_completion_tokens``, then mean over samples (Dr. GRPO, arXiv 2503.20783, section 3.2).
    """
    mask = mask_BR.double()
    if config.aggregate == "token":
        return mask / max(counts.tokens, 1)
    if config.aggregate == "sample":
        return mask / mask.sum(-1, keepdim=True).clamp(min=1) / max(counts.samples, 1)
    return mask / max_completion_tokens / max(counts.samples, 1)
