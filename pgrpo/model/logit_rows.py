"""What is computed of rows of logits: log-probs, entropy, the KL to a teacher, and their gradient. On a GPU by the kernels of
``kernels/logits.py``.

C rows, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pgrpo.attention.kernels.on_gpu import on_gpu

KERNELS = "pgrpo.model.kernels.logits"


class KlGradient(NamedTuple):
    """For the gradient of the KL of some rows: the teacher's logits [C, V] and their factor, its log-sum-exp, the KL and the KL's
    gradient [C]."""

    teacher_logits_CV: Tensor
    teacher_scale: float
    teacher_lse_C: Tensor
    kl_C: Tensor
    dkl_C: Tensor


@on_gpu(KERNELS)
def kl_statistics(
    logits_CV: Tensor, teacher_logits_CV: Tensor, scale: float, teacher_scale: float
) -> tuple[Tensor, Tensor]:
    """``sum_v p (log p - log q)`` of each row, p the softmax of ``scale * logits`` and q the teacher's, and the teacher's
    log-sum-exp: [C] each."""
    logp_CV = (_scaled(logits_CV, scale) if scale == 1.0 else _scaled(logits_CV.clone(), scale)).log_softmax(-1)
    logq_CV = _scaled(teacher_logits_CV, teacher_scale)
    teacher_lse_C = logq_CV.logsumexp(-1)
    difference_CV = logp_CV - logq_CV
    return (logp_CV.exp_() * difference_CV).sum(-1) + teacher_lse_C, teacher_lse_C


@on_gpu(KERNELS)
def row_statistics(
    logits_CV: Tensor, target_ids_C: Tensor, scale: float, want_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob of the target, log-sum-exp and entropy of each row of ``scale * logits``: [C] each.

    The entropy is undefined unless wanted. Overwrites ``logits_CV``."""
    logits_CV = _scaled(logits_CV, scale)
    lse_C = logits_CV.logsumexp(-1)
    logprobs_C = logits_CV.gather(-1, target_ids_C.unsqueeze(-1)).squeeze(-1) - lse_C
    entropy_C = lse_C
    if want_entropy:  # -sum p log p, with log p = logits - lse
        logits_CV -= lse_C.unsqueeze(-1)
        entropy_C = -(logits_CV.exp() * logits_CV).sum(-1)
    return logprobs_C, lse_C, entropy_C


@on_gpu(KERNELS)
def to_logit_gradient_(
    logits_CV: Tensor,
    target_ids_C: Tensor,
    lse_C: Tensor,
    dlogprobs_C: Tensor,
    scale: float,
    entropies: tuple[Tensor, Tensor] | None = None,
    kls: KlGradient | None = None,
) -> Tensor:
    """``d logprob / d logits = scale * (onehot - p)``, times ``dlogprobs``, in the logits' dtype. Overwrites ``logits_CV``.

    ``entropies`` (the entropy and its gradient, [C] each) adds ``d entropy / d logits = -scale * p * (log p + entropy)``, ``kls``
    adds ``d kl / d logits = scale * p * (log p - log q - kl)``."""
    logp_CV = _scaled(logits_CV, scale).sub_(lse_C.unsqueeze(-1))
    if entropies is None and kls is None:
        dlogits_CV = logp_CV.exp_().mul_(-dlogprobs_C.unsqueeze(-1))
    else:
        p_CV, factor_CV = logp_CV.exp(), -dlogprobs_C.unsqueeze(-1)
        if entropies is not None:
            entropy_C1, dentropy_C1 = (x.unsqueeze(-1) for x in entropies)
            factor_CV = factor_CV - (logp_CV + entropy_C1).mul_(dentropy_C1)
        if kls is not None:
            logq_CV = _scaled(kls.teacher_logits_CV, kls.teacher_scale).sub_(kls.teacher_lse_C.unsqueeze(-1))
            excess_CV = logp_CV.sub_(logq_CV).sub_(kls.kl_C.unsqueeze(-1))
            factor_CV = factor_CV + excess_CV.mul_(kls.dkl_C.unsqueeze(-1))
        dlogits_CV = p_CV.mul_(factor_CV)
    dlogits_CV.scatter_add_(-1, target_ids_C.unsqueeze(-1), dlogprobs_C.unsqueeze(-1).to(dlogits_CV.dtype))
    return dlogits_CV.mul_(scale).to(logits_CV.dtype)


def _scaled(logits_CV: Tensor, scale: float) -> Tensor:
    logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    return logits_CV if scale == 1.0 else logits_CV.mul_(scale)
