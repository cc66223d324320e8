"""Log-probs and entropy of chosen tokens from hidden states, and the KL to a teacher, in chunks of rows, so that the full logits
never exist.

L completion tokens, C of them in a chunk, E hidden size, V vocabulary.
"""

from __future__ import annotations

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


def chunk_bytes(device_type: str) -> int:
    """The most memory that one chunk takes, temporaries included."""
    return LOGITS_PER_CHUNK[device_type] * {"cpu": 16, "cuda": 2}[device_type]


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
        temperature: its logits are divided by it.
    """

    hidden_LE: Tensor
    head: Head
    temperature: float

    @property
    def scale(self) -> float:
        """Factor of ``logits``."""
        return (self.head.scale or 1.0) / self.temperature

    def logits(self, rows: slice, vocabulary: int) -> Tensor:
        """[C, V] logits of the first ``vocabulary`` ids: a teacher may have more, which no token has."""
        if self.head.scale is None:
            return self.head.logits(self.hidden_LE[rows])[:, :vocabulary].clone()
        return self.hidden_LE[rows] @ self.head.weight[:vocabulary].T


def token_logprobs(
    hidden_LE: Tensor,
    weight_VE: Tensor,
    target_ids_L: Tensor,
    scale: float = 1.0,
    *,
    entropy: bool = False,
    teacher: TeacherRows | None = None,
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
        teacher: also return KL(policy || teacher) of each row over the whole vocabulary. Its gradient shares that pass too.
    """
    return TokenLogprobs(*_ChunkedLogprobs.apply(hidden_LE, weight_VE, target_ids_L, scale, entropy, teacher))


def head_logprobs(
    hidden_LE: Tensor,
    head: Head,
    target_ids_L: Tensor,
    scale: float = 1.0,
    *,
    entropy: bool = False,
    teacher: TeacherRows | None = None,
) -> TokenLogprobs:
    """``token_logprobs`` of any head: its logits in chunks, differentiated by autograd. Gradients go to ``head.parameters``."""
    return TokenLogprobs(*_HeadLogprobs.apply(hidden_LE, target_ids_L, head, scale, entropy, teacher, *head.parameters))


class _HeadLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_LE, target_ids_L, head, scale, want_entropy, teacher, *parameters):
        named = dict(zip(head.names, parameters, strict=True))
        chunks = _chunks(hidden_LE, head.weight, HEAD_COPIES + (TEACHER_COPIES if teacher else 0))
        parts = []
        for rows in chunks:
            logits_CV = head.logits(hidden_LE[rows], named).clone()  # the head may return what it keeps
            kls = _kl_statistics(logits_CV, teacher, rows, scale)
            parts.append((*row_statistics(logits_CV, target_ids_L[rows], scale, want_entropy), *kls))
        empty_L = hidden_LE.new_empty(0, dtype=torch.promote_types(hidden_LE.dtype, torch.float32))
        logprobs_L, lse_L, entropy_L, *kls = (torch.cat(x) for x in zip(*parts, (empty_L,) * 5, strict=True))
        ctx.save_for_backward(hidden_LE, target_ids_L, lse_L, entropy_L, *kls, *parameters)
        ctx.head, ctx.scale, ctx.chunks, ctx.teacher = head, scale, chunks, teacher
        ctx.set_materialize_grads(False)
        return logprobs_L, entropy_L if want_entropy else None, kls[0] if teacher else None

    @staticmethod
    def backward(ctx, dlogprobs_L, dentropy_L, dkl_L):
        hidden_LE, target_ids_L, lse_L, entropy_L, kl_L, teacher_lse_L, *parameters = ctx.saved_tensors
        dlogprobs_L = torch.zeros_like(lse_L) if dlogprobs_L is None else dlogprobs_L
        needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[6:]]
        inputs = [hidden_LE, *parameters]
        trained = [i for i, need in enumerate(needed) if need]
        totals = {i: torch.zeros_like(inputs[i], dtype=lse_L.dtype) for i in trained}
        for rows in ctx.chunks:
            leaves = [x.detach().requires_grad_(n) for x, n in zip((hidden_LE[rows], *parameters), needed, strict=True)]
            with torch.enable_grad():
                logits_CV = ctx.head.logits(leaves[0], dict(zip(ctx.head.names, leaves[1:], strict=True)))
            entropies = None if dentropy_L is None else (entropy_L[rows], dentropy_L[rows])
            kls = _kl_gradient(logits_CV, ctx.teacher, rows, teacher_lse_L, kl_L, dkl_L)
            dlogits_CV = to_logit_gradient_(
                logits_CV.detach().clone(),
                target_ids_L[rows],
                lse_L[rows],
                dlogprobs_L[rows],
                ctx.scale,
                entropies,
                kls,
            )
            found = torch.autograd.grad(logits_CV, [leaves[i] for i in trained], dlogits_CV, allow_unused=True)
            for i, gradient in zip(trained, found, strict=True):
                if gradient is not None:
                    (totals[i] if i else totals[i][rows]).add_(gradient)
        grads = [totals[i].to(x.dtype) if i in totals else None for i, x in enumerate(inputs)]
        return grads[0], None, None, None, None, None, *grads[1:]


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_LE, weight_VE, target_ids_L, scale, want_entropy, teacher):
        dtype = torch.promote_types(hidden_LE.dtype, torch.float32)
        logprobs_L = hidden_LE.new_empty(len(hidden_LE), dtype=dtype)
        lse_L = torch.empty_like(logprobs_L)
        entropy_L = torch.empty_like(logprobs_L) if want_entropy else None
        kl_L, teacher_lse_L = torch.empty_like(logprobs_L), torch.empty_like(logprobs_L)
        chunks = _chunks(hidden_LE, weight_VE, TEACHER_COPIES if teacher else 1)
        for rows in chunks:
            logits_CV = hidden_LE[rows] @ weight_VE.T
            if teacher:
                kl_L[rows], teacher_lse_L[rows] = _kl_statistics(logits_CV, teacher, rows, scale)
            logprobs_L[rows], lse_L[rows], entropy_C = row_statistics(
                logits_CV, target_ids_L[rows], scale, want_entropy
            )
            if entropy_L is not None:
                entropy_L[rows] = entropy_C
            del logits_CV  # free the memory before the next chunk is computed
        ctx.save_for_backward(hidden_LE, weight_VE, target_ids_L, lse_L, entropy_L, kl_L, teacher_lse_L)
        ctx.scale, ctx.chunks, ctx.teacher = scale, chunks, teacher
        ctx.set_materialize_grads(False)  # a gradient of None means that the loss does not use the entropy or the KL
        return logprobs_L, entropy_L, kl_L if teacher else None

    @staticmethod
    def backward(ctx, dlogprobs_L, dentropy_L, dkl_L):
        hidden_LE, weight_VE, target_ids_L, lse_L, entropy_L, kl_L, teacher_lse_L = ctx.saved_tensors
        dlogprobs_L = torch.zeros_like(lse_L) if dlogprobs_L is None else dlogprobs_L
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dhidden_LE = torch.empty_like(hidden_LE) if needs_hidden else None
        dweight_VE = None
        if needs_weight and len(ctx.chunks) != 1:  # contributions are summed in float32 at least
            dweight_VE = torch.zeros_like(weight_VE, dtype=lse_L.dtype)
        for rows in ctx.chunks:
            logits_CV = hidden_LE[rows] @ weight_VE.T
            entropies = None if dentropy_L is None else (entropy_L[rows], dentropy_L[rows])
            kls = _kl_gradient(logits_CV, ctx.teacher, rows, teacher_lse_L, kl_L, dkl_L)
            dlogits_CV = to_logit_gradient_(
                logits_CV, target_ids_L[rows], lse_L[rows], dlogprobs_L[rows], ctx.scale, entropies, kls
            )
            if dhidden_LE is not None:
                torch.mm(dlogits_CV, weight_VE, out=dhidden_LE[rows])
            if dweight_VE is not None:
                _add_product(dweight_VE, dlogits_CV.T, hidden_LE[rows])
            elif needs_weight:
                dweight_VE = dlogits_CV.T @ hidden_LE
            del logits_CV, dlogits_CV, kls
        return dhidden_LE, None if dweight_VE is None else dweight_VE.to(weight_VE.dtype), None, None, None, None


def _kl_gradient(
    logits_CV: Tensor,
    teacher: TeacherRows | None,
    rows: slice,
    teacher_lse_L: Tensor,
    kl_L: Tensor,
    dkl_L: Tensor | None,
) -> KlGradient | None:
    if teacher is None or dkl_L is None:
        return None
    teacher_logits_CV = teacher.logits(rows, logits_CV.shape[1])
    return KlGradient(teacher_logits_CV, teacher.scale, teacher_lse_L[rows], kl_L[rows], dkl_L[rows])


def _kl_statistics(logits_CV: Tensor, teacher: TeacherRows | None, rows: slice, scale: float) -> tuple[Tensor, Tensor]:
    """``kl_statistics`` with the teacher's logits of these rows; empty without a teacher."""
    if teacher is None:
        empty_C = logits_CV.new_empty(0, dtype=torch.promote_types(logits_CV.dtype, torch.float32))
        return empty_C, empty_C
    return kl_statistics(logits_CV, teacher.logits(rows, logits_CV.shape[1]), scale, teacher.scale)


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
