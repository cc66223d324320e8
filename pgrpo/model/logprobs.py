"""Log-probs and entropy of chosen tokens from hidden states, and the KL to a teacher, in chunks of rows, so that the full logits
never exist.

L completion tokens, C of them in a chunk, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pgrpo.model.head import Head
from pgrpo.model.logit_rows import KlGradient, kl_statistics, row_statistics, to_logit_gradient_

LOGITS_PER_CHUNK = {"cpu": 2**25, "cuda": 2**30}
"""Logits in memory at once: 128 MiB of float32 on a CPU, 2 GiB of bfloat16 on a GPU. A GPU needs many rows for an efficient product
with the head, and reads and writes the head's gradient once a chunk."""

HEAD_COPIES = 4
"""Temporaries as large as the logits that autograd keeps of a head with soft-capping, in the logits' precision."""

TEACHER_COPIES = 2
"""A teacher's logits are in memory beside the policy's: chunks of half as many rows take as much memory."""


class TokenLogprobs(NamedTuple):
    """``logprobs`` [L], ``entropy`` [L] and ``kl`` [L] to the teacher (None unless asked for), float32 (float64 for float64
    inputs), in nats."""

    logprobs: Tensor
    entropy: Tensor | None
    kl: Tensor | None


class TeacherRows(NamedTuple):
    """What a teacher's distributions of the same L rows are computed from, without a gradient.

    Attributes:
        hidden_LE: [L, E'] its hidden states.
        head: of the teacher. Its weights must be gathered until the backward is done.
        scale: factor of ``logits``: the model's own logit scaling over its temperature.
    """

    hidden_LE: Tensor
    head: Head
    scale: float

    def logits(self, rows: slice, vocabulary: int) -> Tensor:
        """[C, V] logits of the first ``vocabulary`` ids: a teacher may have more, which no token has."""
        if self.head.scale is None:
            return self.head.logits(self.hidden_LE[rows])[:, :vocabulary].clone()
        return self.head.ban(self.hidden_LE[rows] @ self.head.weight[:vocabulary].T)


def token_logprobs(
    hidden_LE: Tensor,
    head: Tensor | Head,
    target_ids_L: Tensor,
    scale: float = 1.0,
    *,
    entropy: bool = False,
    teacher: TeacherRows | None = None,
    ban: Callable[[Tensor], Tensor] = lambda logits_CV: logits_CV,
) -> TokenLogprobs:
    """Log-softmax of ``scale * logits`` at the target ids.

    The backward recomputes each chunk of logits instead of keeping it, and skips products that nobody needs (a frozen head has no
    gradient). Logits are computed in the inputs' precision; softmax and sums in float32 at least.

    Args:
        hidden_LE: [L, E] hidden states, one row for each token to score.
        head: [V, E], whose logits are ``hidden @ head.T``; or a head that computes anything else, which autograd differentiates,
            and ``head.parameters`` get gradients.
        target_ids_L: [L] int64.
        scale: factor of the logits: the model's own logit scaling over the sampling temperature.
        entropy: also return the entropy of each row's distribution. Its gradient shares the backward's pass over the logits and
            is skipped when the loss does not use it.
        teacher: also return KL(policy || teacher) of each row over the whole vocabulary. Its gradient shares that pass too.
        ban: takes the logits of ids that are never sampled (``Head.ban``).
    """
    own, parameters = (None, [head]) if isinstance(head, Tensor) else (head, head.parameters)
    asked = own, scale, entropy, teacher, ban
    return TokenLogprobs(*_ChunkedLogprobs.apply(hidden_LE, target_ids_L, *asked, *parameters))


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_LE, target_ids_L, head, scale, want_entropy, teacher, ban, *parameters):
        dtype = torch.promote_types(hidden_LE.dtype, torch.float32)
        found_L = (hidden_LE.new_empty(len(hidden_LE), dtype=dtype) for _ in range(5))
        logprobs_L, lse_L, entropy_L, kl_L, teacher_lse_L = found_L
        copies = (HEAD_COPIES if head else 0) + (TEACHER_COPIES if teacher else 0)
        chunks = _chunks(hidden_LE, head.weight if head else parameters[0], copies or 1)
        for rows in chunks:
            logits_CV = _logits(hidden_LE[rows], head, parameters, ban)
            if teacher:
                statistics = kl_statistics(logits_CV, teacher.logits(rows, logits_CV.shape[1]), scale, teacher.scale)
                kl_L[rows], teacher_lse_L[rows] = statistics
            statistics = row_statistics(logits_CV, target_ids_L[rows], scale, want_entropy)
            logprobs_L[rows], lse_L[rows], entropy_L[rows] = statistics
            del logits_CV  # free the memory before the next chunk is computed
        ctx.save_for_backward(hidden_LE, target_ids_L, lse_L, entropy_L, kl_L, teacher_lse_L, *parameters)
        ctx.head, ctx.scale, ctx.chunks, ctx.teacher, ctx.ban = head, scale, chunks, teacher, ban
        ctx.set_materialize_grads(False)  # a gradient of None means that the loss does not use the entropy or the KL
        return logprobs_L, entropy_L if want_entropy else None, kl_L if teacher else None

    @staticmethod
    def backward(ctx, dlogprobs_L, dentropy_L, dkl_L):
        hidden_LE, target_ids_L, lse_L, entropy_L, kl_L, teacher_lse_L, *parameters = ctx.saved_tensors
        dlogprobs_L = torch.zeros_like(lse_L) if dlogprobs_L is None else dlogprobs_L
        needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[7:])
        dhidden_LE = torch.zeros_like(hidden_LE) if needed[0] else None
        trained = [i for i, need in enumerate(needed) if need]
        # Contributions of chunks are summed in float32 at least; that of a matrix's only chunk is its gradient.
        is_only = ctx.head is None and len(ctx.chunks) == 1
        totals = [
            torch.zeros_like(x, dtype=lse_L.dtype) if need and not is_only else None
            for x, need in zip(parameters, needed[1:], strict=True)
        ]
        for rows in ctx.chunks:
            leaves = [x.detach().requires_grad_(n) for x, n in zip((hidden_LE[rows], *parameters), needed, strict=True)]
            with torch.enable_grad():
                graph_CV = _logits(leaves[0], ctx.head, leaves[1:], ctx.ban)
            entropies = None if dentropy_L is None else (entropy_L[rows], dentropy_L[rows])
            kls = None
            if dkl_L is not None:
                of_rows = teacher_lse_L[rows], kl_L[rows], dkl_L[rows]
                kls = KlGradient(ctx.teacher.logits(rows, graph_CV.shape[1]), ctx.teacher.scale, *of_rows)
            dlogits_CV = to_logit_gradient_(
                graph_CV.detach(), target_ids_L[rows], lse_L[rows], dlogprobs_L[rows], ctx.scale, entropies, kls
            )
            if ctx.head is None:
                if dhidden_LE is not None:
                    torch.mm(dlogits_CV, parameters[0], out=dhidden_LE[rows])
                if needed[1]:
                    totals[0] = _plus_product(totals[0], dlogits_CV.T, hidden_LE[rows])
            else:
                found = torch.autograd.grad(graph_CV, [leaves[i] for i in trained], dlogits_CV, materialize_grads=True)
                for i, gradient in zip(trained, found, strict=True):
                    (totals[i - 1] if i else dhidden_LE[rows]).add_(gradient)  # pyright: ignore
            del graph_CV, dlogits_CV, kls
        grads = (None if x is None else x.to(p.dtype) for x, p in zip(totals, parameters, strict=True))
        return dhidden_LE, *[None] * 6, *grads


def _logits(
    hidden_CE: Tensor, head: Head | None, parameters: Sequence[Tensor], ban: Callable[[Tensor], Tensor]
) -> Tensor:
    """[C, V] logits that may be overwritten."""
    if head is None:
        return ban(hidden_CE @ parameters[0].T)
    return head.logits(hidden_CE, dict(zip(head.names, parameters, strict=True))).clone()  # it may return what it keeps


def _plus_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """``total + a @ b`` in ``total``'s precision, in-place."""
    if total is None:
        return a @ b
    if a.dtype == total.dtype:
        return total.addmm_(a, b)
    if a.device.type == "cuda":
        return torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    return total.add_(a @ b)


def _chunks(hidden_LE: Tensor, weight_VE: Tensor, copies: int = 1) -> list[slice]:
    """Slices of about equal length, so that no product has only a few rows."""
    tokens = len(hidden_LE)
    limit = max(1, LOGITS_PER_CHUNK[hidden_LE.device.type] // len(weight_VE) // copies)
    rows = -(-tokens // max(1, -(-tokens // limit)))
    return [slice(start, start + rows) for start in range(0, tokens, max(1, rows))]
