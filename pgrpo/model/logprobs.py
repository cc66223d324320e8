"""Log-probs and entropy of chosen tokens from hidden states, in chunks of rows, so that the full logits never exist.

L completion tokens, C of them in a chunk, E hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pgrpo.model.head import Head

LOGITS_PER_CHUNK = {"cpu": 2**25, "cuda": 2**30}
"""Logits in memory at once: 128 MiB of float32 on a CPU, 2 GiB of bfloat16 on a GPU. A GPU needs many rows for an efficient product
with the head, and reads and writes the head's gradient once a chunk."""

HEAD_COPIES = 4
"""Temporaries as large as the logits that autograd keeps of a head with soft-capping, in the logits' precision."""


def chunk_bytes(device_type: str) -> int:
    """The most memory that one chunk takes, temporaries included."""
    return LOGITS_PER_CHUNK[device_type] * {"cpu": 16, "cuda": 2}[device_type]


class TokenLogprobs(NamedTuple):
    """``logprobs`` [L] and ``entropy`` [L] (None unless asked for), float32 (float64 for float64 inputs), in nats."""

    logprobs: Tensor
    entropy: Tensor | None


def token_logprobs(
    hidden_LE: Tensor, weight_VE: Tensor, target_ids_L: Tensor, scale: float = 1.0, *, entropy: bool = False
) -> TokenLogprobs:
    """Log-softmax of ``scale * hidden @ weight.T`` at the target ids.

    The backward recomputes each chunk of logits instead of keeping it, and skips products that nobody needs (a frozen head has no
    gradient). Logits are computed in the inputs' precision; softmax and sums in float32 at least.

    Args:
        hidden_LE: [L, E] hidden states, one row for each token to score.
        weight_VE: [V, E] the language-model head.
        target_ids_L: [L] int64.
        scale: factor of the logits: the model's own logit scaling over the sampling temperature.
        entropy: also return the entropy of each row's distribution. Its gradient shares the backward's pass over the logits and
            is skipped when the loss does not use it.
    """
    logprobs_L, entropy_L = _ChunkedLogprobs.apply(hidden_LE, weight_VE, target_ids_L, scale, entropy)
    return TokenLogprobs(logprobs_L, entropy_L if entropy else None)


def head_logprobs(
    hidden_LE: Tensor, head: Head, target_ids_L: Tensor, scale: float = 1.0, *, entropy: bool = False
) -> TokenLogprobs:
    """``token_logprobs`` of any head: its logits in chunks, differentiated by autograd. Gradients go to ``head.parameters``."""
    logprobs_L, entropy_L = _HeadLogprobs.apply(hidden_LE, target_ids_L, head, scale, entropy, *head.parameters)
    return TokenLogprobs(logprobs_L, entropy_L if entropy else None)


class _HeadLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_LE, target_ids_L, head, scale, want_entropy, *parameters):
        named = dict(zip(head.names, parameters, strict=True))
        chunks = _chunks(hidden_LE, head.weight, HEAD_COPIES)
        parts = []
        for rows in chunks:
            logits_CV = head.logits(hidden_LE[rows], named).clone()  # the head may return what it keeps
            parts.append(row_statistics(logits_CV, target_ids_L[rows], scale, want_entropy))
        empty_L = hidden_LE.new_empty(0, dtype=torch.promote_types(hidden_LE.dtype, torch.float32))
        logprobs_L, lse_L, entropy_L = (torch.cat(x) for x in zip(*parts, (empty_L,) * 3, strict=True))
        ctx.save_for_backward(hidden_LE, target_ids_L, lse_L, entropy_L, *parameters)
        ctx.head, ctx.scale, ctx.chunks = head, scale, chunks
        ctx.set_materialize_grads(False)
        return logprobs_L, entropy_L if want_entropy else None

    @staticmethod
    def backward(ctx, dlogprobs_L, dentropy_L):
        hidden_LE, target_ids_L, lse_L, entropy_L, *parameters = ctx.saved_tensors
        dlogprobs_L = torch.zeros_like(lse_L) if dlogprobs_L is None else dlogprobs_L
        needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[5:]]
        inputs = [hidden_LE, *parameters]
        totals = [
            torch.zeros_like(x, dtype=lse_L.dtype) if need else None for x, need in zip(inputs, needed, strict=True)
        ]
        for rows in ctx.chunks:
            leaves = [x.detach().requires_grad_(n) for x, n in zip((hidden_LE[rows], *parameters), needed, strict=True)]
            with torch.enable_grad():
                logits_CV = ctx.head.logits(leaves[0], dict(zip(ctx.head.names, leaves[1:], strict=True)))
            entropies = None if dentropy_L is None else (entropy_L[rows], dentropy_L[rows])
            dlogits_CV = to_logit_gradient_(
                logits_CV.detach().clone(), target_ids_L[rows], lse_L[rows], dlogprobs_L[rows], ctx.scale, entropies
            )
            trained = [i for i, need in enumerate(needed) if need]
            found = torch.autograd.grad(logits_CV, [leaves[i] for i in trained], dlogits_CV, allow_unused=True)
            for i, gradient in zip(trained, found, strict=True):
                if gradient is not None:
                    (totals[0][rows] if i == 0 else totals[i]).add_(gradient)
        grads = [None if total is None else total.to(x.dtype) for total, x in zip(totals, inputs, strict=True)]
        return grads[0], None, None, None, None, *grads[1:]


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_LE, weight_VE, target_ids_L, scale, want_entropy):
        dtype = torch.promote_types(hidden_LE.dtype, torch.float32)
        logprobs_L = hidden_LE.new_empty(len(hidden_LE), dtype=dtype)
        lse_L = torch.empty_like(logprobs_L)
        entropy_L = torch.empty_like(logprobs_L) if want_entropy else None
        for rows in _chunks(hidden_LE, weight_VE):
            logits_CV = hidden_LE[rows] @ weight_VE.T
            logprobs_L[rows], lse_L[rows], entropy_C = row_statistics(
                logits_CV, target_ids_L[rows], scale, want_entropy
            )
            if entropy_L is not None:
                entropy_L[rows] = entropy_C
            del logits_CV  # free the memory before the next chunk is computed
        ctx.save_for_backward(hidden_LE, weight_VE, target_ids_L, lse_L, entropy_L)
        ctx.scale = scale
        ctx.set_materialize_grads(False)  # a gradient of None means that the loss does not use the entropy
        return logprobs_L, entropy_L

    @staticmethod
    def backward(ctx, dlogprobs_L, dentropy_L):
        hidden_LE, weight_VE, target_ids_L, lse_L, entropy_L = ctx.saved_tensors
        dlogprobs_L = torch.zeros_like(lse_L) if dlogprobs_L is None else dlogprobs_L
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dhidden_LE = torch.empty_like(hidden_LE) if needs_hidden else None
        chunks = _chunks(hidden_LE, weight_VE)
        dweight_VE = None
        if needs_weight and len(chunks) != 1:  # contributions are summed in float32 at least
            dweight_VE = torch.zeros_like(weight_VE, dtype=lse_L.dtype)
        for rows in chunks:
            logits_CV = hidden_LE[rows] @ weight_VE.T
            entropies = None if dentropy_L is None else (entropy_L[rows], dentropy_L[rows])
            dlogits_CV = to_logit_gradient_(
                logits_CV, target_ids_L[rows], lse_L[rows], dlogprobs_L[rows], ctx.scale, entropies
            )
            if dhidden_LE is not None:
                torch.mm(dlogits_CV, weight_VE, out=dhidden_LE[rows])
            if dweight_VE is not None:
                _add_product(dweight_VE, dlogits_CV.T, hidden_LE[rows])
            elif needs_weight:
                dweight_VE = dlogits_CV.T @ hidden_LE
            del logits_CV, dlogits_CV
        return dhidden_LE, None if dweight_VE is None else dweight_VE.to(weight_VE.dtype), None, None, None


def row_statistics(
    logits_CV: Tensor, target_ids_C: Tensor, scale: float, want_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob of the target, log-sum-exp and entropy of each row of ``scale * logits``: [C] each.

    The entropy is undefined unless wanted. Overwrites ``logits_CV``."""
    if logits_CV.device.type == "cuda":
        from pgrpo.model import logprobs_triton

        return logprobs_triton.row_statistics(logits_CV, target_ids_C, scale, want_entropy)
    logits_CV = _scaled(logits_CV, scale)
    lse_C = logits_CV.logsumexp(-1)
    logprobs_C = logits_CV.gather(-1, target_ids_C.unsqueeze(-1)).squeeze(-1) - lse_C
    entropy_C = lse_C
    if want_entropy:  # -sum p log p, with log p = logits - lse
        logits_CV -= lse_C.unsqueeze(-1)
        entropy_C = -(logits_CV.exp() * logits_CV).sum(-1)
    return logprobs_C, lse_C, entropy_C


def to_logit_gradient_(
    logits_CV: Tensor,
    target_ids_C: Tensor,
    lse_C: Tensor,
    dlogprobs_C: Tensor,
    scale: float,
    entropies: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """``d logprob / d logits = scale * (onehot - p)``, times ``dlogprobs``, in the logits' dtype. Overwrites ``logits_CV``.

    ``entropies`` (the entropy and its gradient, [C] each) adds ``d entropy / d logits = -scale * p * (log p + entropy)``."""
    if logits_CV.device.type == "cuda":
        from pgrpo.model import logprobs_triton

        return logprobs_triton.to_logit_gradient_(logits_CV, target_ids_C, lse_C, dlogprobs_C, scale, entropies)
    logp_CV = _scaled(logits_CV, scale).sub_(lse_C.unsqueeze(-1))
    if entropies is None:
        dlogits_CV = logp_CV.exp_().mul_(-dlogprobs_C.unsqueeze(-1))
    else:
        entropy_C1, dentropy_C1 = (x.unsqueeze(-1) for x in entropies)
        p_CV = logp_CV.exp()
        dlogits_CV = logp_CV.add_(entropy_C1).mul_(dentropy_C1).add_(dlogprobs_C.unsqueeze(-1)).mul_(p_CV).neg_()
    dlogits_CV.scatter_add_(-1, target_ids_C.unsqueeze(-1), dlogprobs_C.unsqueeze(-1).to(dlogits_CV.dtype))
    return dlogits_CV.mul_(scale).to(logits_CV.dtype)


def _scaled(logits_CV: Tensor, scale: float) -> Tensor:
    logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    return logits_CV if scale == 1.0 else logits_CV.mul_(scale)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` in ``total``'s precision."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def _chunks(hidden_LE: Tensor, weight_VE: Tensor, copies: int = 1) -> list[slice]:
    """Slices of about equal length, so that no product has only a few rows."""
    tokens = len(hidden_LE)
    limit = max(1, LOGITS_PER_CHUNK[hidden_LE.device.type] // len(weight_VE) // copies)
    rows = -(-tokens // max(1, -(-tokens // limit)))
    return [slice(start, start + rows) for start in range(0, tokens, max(1, rows))]
