"""Log-probs and entropy of chosen tokens straight from hidden states, a chunk of rows at a time: full logits never exist.

L completion tokens, E hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LOGITS_PER_CHUNK = 2**25
"""Logits held at once (128 MiB in float32)."""


class TokenLogprobs(NamedTuple):
    """``logprobs`` [L] and ``entropy`` [L] (None unless asked for), float32 (float64 for float64 inputs), in nats."""

    logprobs: Tensor
    entropy: Tensor | None


def token_logprobs(
    hidden_LE: Tensor, weight_VE: Tensor, target_ids_L: Tensor, scale: float = 1.0, *, entropy: bool = False
) -> TokenLogprobs:
    """Log-softmax of ``scale * hidden @ weight.T`` at the target ids.

    The backward computes each chunk of logits again instead of keeping it. Softmax runs in float32 at least.

    Args:
        hidden_LE: [L, E] hidden states, one row for each token to score.
        weight_VE: [V, E] the language-model head.
        target_ids_L: [L] int64.
        scale: factor of the logits: the model's own logit scaling over the sampling temperature.
        entropy: also return the entropy of each row's distribution; it carries no gradient.
    """
    logprobs_L, entropy_L = _ChunkedLogprobs.apply(hidden_LE, weight_VE, target_ids_L, scale, entropy)
    return TokenLogprobs(logprobs_L, entropy_L if entropy else None)


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_LE, weight_VE, target_ids_L, scale, want_entropy):
        dtype = torch.promote_types(hidden_LE.dtype, torch.float32)
        logprobs_L = hidden_LE.new_empty(len(hidden_LE), dtype=dtype)
        lse_L = torch.empty_like(logprobs_L)
        entropy_L = torch.empty_like(logprobs_L) if want_entropy else None
        for rows in _chunks(hidden_LE, weight_VE):
            logits_CV = _scaled_logits(hidden_LE[rows], weight_VE, scale, dtype)
            lse_L[rows] = lse_C = logits_CV.logsumexp(-1)
            target_C = target_ids_L[rows].unsqueeze(-1)
            logprobs_L[rows] = logits_CV.gather(-1, target_C).squeeze(-1) - lse_C
            if entropy_L is not None:  # -sum p log p, with log p = logits - lse
                logits_CV -= lse_C.unsqueeze(-1)
                entropy_L[rows] = -(logits_CV.exp() * logits_CV).sum(-1)
            del logits_CV  # before the next chunk's are made
        ctx.save_for_backward(hidden_LE, weight_VE, target_ids_L, lse_L)
        ctx.scale = scale
        if entropy_L is not None:
            ctx.mark_non_differentiable(entropy_L)
        return logprobs_L, entropy_L

    @staticmethod
    def backward(ctx, dlogprobs_L, _):
        hidden_LE, weight_VE, target_ids_L, lse_L = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dhidden_LE = torch.empty_like(hidden_LE) if needs_hidden else None
        # Many small contributions: summed in float32 whatever the weight's own precision is.
        dweight_VE = torch.zeros_like(weight_VE, dtype=lse_L.dtype) if needs_weight else None
        for rows in _chunks(hidden_LE, weight_VE):
            logits_CV = _scaled_logits(hidden_LE[rows], weight_VE, ctx.scale, lse_L.dtype)
            # d logprob / d logits = onehot - p
            dlogits_CV = logits_CV.sub_(lse_L[rows].unsqueeze(-1)).exp_().neg_()
            target_C = target_ids_L[rows].unsqueeze(-1)
            dlogits_CV.scatter_add_(-1, target_C, torch.ones_like(target_C, dtype=dlogits_CV.dtype))
            dlogits_CV *= (dlogprobs_L[rows] * ctx.scale).unsqueeze(-1)
            dlogits_CV = dlogits_CV.to(hidden_LE.dtype)
            if dhidden_LE is not None:
                dhidden_LE[rows] = dlogits_CV @ weight_VE
            if dweight_VE is not None:
                dweight_VE += dlogits_CV.T @ hidden_LE[rows]
            del logits_CV, dlogits_CV
        return dhidden_LE, None if dweight_VE is None else dweight_VE.to(weight_VE.dtype), None, None, None


def _scaled_logits(hidden_CE: Tensor, weight_VE: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    logits_CV = (hidden_CE @ weight_VE.T).to(dtype)
    return logits_CV if scale == 1.0 else logits_CV.mul_(scale)


def _chunks(hidden_LE: Tensor, weight_VE: Tensor) -> list[slice]:
    rows = max(1, LOGITS_PER_CHUNK // len(weight_VE))
    return [slice(start, start + rows) for start in range(0, len(hidden_LE), rows)]
