"""The GRPO loss on per-sample log-probs. Every sum is over the mask and divided by a global count, so that the loss and its
gradient do not depend on how a step's samples were cut into micro-batches and ranks.

B samples of the micro-batch, R tokens of the longest completion.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Aggregate = Literal["token", "sample", "constant"]


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


def grpo_loss(
    logprobs_BR: Tensor,
    old_logprobs_BR: Tensor,
    advantages_B: Tensor,
    mask_BR: Tensor,
    counts: Counts,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    aggregate: Aggregate = "token",
    max_completion_tokens: int = 1,
    ref_logprobs_BR: Tensor | None = None,
    kl_coef: float = 0.0,
) -> LossOutput:
    """Clipped policy-gradient objective, negated (GRPO: DeepSeekMath, arXiv 2402.03300, equation 3).

    ``- sum_i w_i [ min(r_i A, clip(r_i, 1 - clip_low, 1 + clip_high) A) - kl_coef * k3_i ]`` over masked tokens i, with
    ``r = exp(logprobs - old_logprobs)`` and a weight ``w`` set by ``aggregate``.

    Args:
        logprobs_BR: [B, R] of the current weights; the only input that carries a gradient.
        old_logprobs_BR: [B, R] of the weights that sampled.
        advantages_B: [B], one number a sample.
        mask_BR: [B, R] bool, True on tokens that count. Entries elsewhere may hold anything, inf and nan too.
        counts: masked tokens and samples of the whole update, over all ranks.
        clip_low: lower clip range; clip_high: upper (apart: DAPO, arXiv 2503.14476, equation 10).
        aggregate: ``token``: all tokens of the update weigh the same (DAPO, equation 12). ``sample``: mean over a sample's
            tokens, then over samples (GRPO). ``constant``: sum over tokens over a fixed length, then mean over samples
            (Dr. GRPO, arXiv 2503.20783).
        max_completion_tokens: the fixed length of ``constant``.
        ref_logprobs_BR: [B, R] of the reference model; needed when ``kl_coef`` is not 0.
        kl_coef: weight of the k3 estimate of KL(policy || reference), ``exp(d) - d - 1`` with ``d = ref - logprobs``
            (DeepSeekMath, equation 4).
    """
    # Masked before exp: an overflow there would turn into nan gradients, even under a mask applied later.
    log_ratio_BR = torch.where(mask_BR, logprobs_BR - old_logprobs_BR, 0.0)
    ratio_BR = log_ratio_BR.exp()
    advantages_B1 = advantages_B.unsqueeze(-1)
    unclipped_BR = ratio_BR * advantages_B1
    clipped_BR = ratio_BR.clamp(1 - clip_low, 1 + clip_high) * advantages_B1
    objective_BR = torch.minimum(unclipped_BR, clipped_BR)

    kl_BR = torch.zeros_like(ratio_BR)
    if kl_coef:
        if ref_logprobs_BR is None:
            raise ValueError(f"kl_coef={kl_coef} needs ref_logprobs")
        d_BR = torch.where(mask_BR, ref_logprobs_BR - logprobs_BR, 0.0)
        kl_BR = d_BR.exp() - d_BR - 1
        objective_BR = objective_BR - kl_coef * kl_BR

    weights_BR = token_weights(mask_BR, counts, aggregate, max_completion_tokens).to(objective_BR.dtype)
    with torch.no_grad():
        low_BR = mask_BR & (ratio_BR < 1 - clip_low) & (advantages_B1 < 0)
        high_BR = mask_BR & (ratio_BR > 1 + clip_high) & (advantages_B1 > 0)
    return LossOutput(
        loss=-(weights_BR * objective_BR).sum(),
        clipped_low=low_BR.sum(),
        clipped_high=high_BR.sum(),
        kl=kl_BR.detach().sum(),
    )


def token_weights(mask_BR: Tensor, counts: Counts, aggregate: Aggregate, max_completion_tokens: int) -> Tensor:
    """[B, R] float64 weight of each token in the loss; 0 off the mask. A sample without tokens weighs nothing, but is counted."""
    mask = mask_BR.double()
    if aggregate == "token":
        return mask / max(counts.tokens, 1)
    if aggregate == "sample":
        return mask / mask.sum(-1, keepdim=True).clamp(min=1) / max(counts.samples, 1)
    return mask / max_completion_tokens / max(counts.samples, 1)
