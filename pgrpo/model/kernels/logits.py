"""Triton kernels of ``logit_rows.py``, each of which reads a chunk of logits once. Imported on a GPU only."""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
KL_BLOCK = 2048
"""Of two rows at once, with five accumulators a lane."""
WARPS = 8
PER_ROW = "target_ids", "logprobs", "lse", "entropy", "kl", "teacher_lse", "dlogprobs", "dentropy", "dkl"
kernel_of_rows = partial(triton.jit, do_not_specialize_on_alignment=PER_ROW)
"""A kernel with pointers to one number a row, which begin at any row of a batch, or behind any number of rows. Triton would compile
it again in the middle of a run, for each of them that 16 divides or does not."""


def row_statistics(
    logits_CV: Tensor, target_ids_C: Tensor, scale: float, want_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``logit_rows.row_statistics``: the maximum, both sums and the target in one pass."""
    rows, vocabulary = logits_CV.shape
    logprobs, lse, entropy = torch.empty(3, rows, dtype=torch.float32, device=logits_CV.device)
    _statistics_kernel[(rows,)](
        logits_CV, target_ids_C, logprobs, lse, entropy, vocabulary, scale, ENTROPY=want_entropy, BLOCK=BLOCK,
        num_warps=WARPS,
    )  # fmt: skip
    return logprobs, lse, entropy


def kl_statistics(
    logits_CV: Tensor, teacher_logits_CV: Tensor, scale: float, teacher_scale: float
) -> tuple[Tensor, Tensor]:
    """See ``logit_rows.kl_statistics``: both rows are read once."""
    rows, vocabulary = logits_CV.shape
    kl, teacher_lse = torch.empty(2, rows, dtype=torch.float32, device=logits_CV.device)
    _kl_kernel[(rows,)](
        logits_CV, teacher_logits_CV, kl, teacher_lse, vocabulary, scale, teacher_scale, BLOCK=KL_BLOCK, num_warps=WARPS
    )
    return kl, teacher_lse


def to_logit_gradient_(
    logits_CV: Tensor,
    target_ids_C: Tensor,
    lse_C: Tensor,
    dlogprobs_C: Tensor,
    scale: float,
    entropies: tuple[Tensor, Tensor] | None = None,
    kls: tuple[Tensor, float, Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """See ``logit_rows.to_logit_gradient_``."""
    rows, vocabulary = logits_CV.shape
    dlogprobs_C = dlogprobs_C.contiguous()  # an expanded one has stride 0
    entropy_C, dentropy_C = (lse_C, lse_C) if entropies is None else (x.contiguous() for x in entropies)
    teacher_logits_CV, teacher_scale, teacher_lse_C, kl_C, dkl_C = kls or (logits_CV, 1.0, lse_C, lse_C, lse_C)
    _gradient_kernel[(rows, triton.cdiv(vocabulary, BLOCK))](
        logits_CV, target_ids_C, lse_C, dlogprobs_C, entropy_C, dentropy_C, teacher_logits_CV,
        teacher_lse_C, kl_C, dkl_C.contiguous(), vocabulary, scale, teacher_scale,
        ENTROPY=entropies is not None, KL=kls is not None, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return logits_CV


@kernel_of_rows
def _statistics_kernel(
    logits, target_ids, logprobs, lse, entropy, vocabulary, scale, ENTROPY: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    # Every lane has its own maximum and sums; they are merged after the last block. A GPU fuses `logit * scale - top` and rounds
    # once, but the maximum is of rounded products: of a banned logit (-1e30) the difference may be 1e21, whose exp is inf. Hence
    # the minimum.
    top = tl.full((BLOCK,), -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32) * scale
        new_top = tl.maximum(top, x)
        shrink, weight = tl.exp(top - new_top), tl.exp(tl.minimum(x - new_top, 0.0))
        total = total * shrink + weight
        if ENTROPY:
            weighted = weighted * shrink + tl.where(column < vocabulary, x, 0.0) * weight
        top = new_top
    row_top = tl.max(top, 0)
    shrink = tl.exp(top - row_top)
    row_total = tl.sum(total * shrink, 0)
    row_lse = row_top + tl.log(row_total)
    target = tl.load(logits + tl.load(target_ids + row)).to(tl.float32) * scale
    tl.store(lse + row, row_lse)
    tl.store(logprobs + row, target - row_lse)
    if ENTROPY:  # -sum p log p, with log p = x - lse
        tl.store(entropy + row, row_lse - tl.sum(weighted * shrink, 0) / row_total)


@kernel_of_rows
def _kl_kernel(logits, teacher, kl, teacher_lse, vocabulary, scale, teacher_scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    teacher += row * vocabulary
    # Every lane has its own maxima and sums, as in the kernel above.
    top_x = tl.full((BLOCK,), -1e30, tl.float32)
    top_y = tl.full((BLOCK,), -1e30, tl.float32)
    total_x = tl.zeros((BLOCK,), tl.float32)
    total_y = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocabulary
        x = tl.load(logits + column, mask=inside, other=float("-inf")).to(tl.float32) * scale
        y = tl.load(teacher + column, mask=inside, other=float("-inf")).to(tl.float32) * teacher_scale
        new_x, new_y = tl.maximum(top_x, x), tl.maximum(top_y, y)
        shrink, weight = tl.exp(top_x - new_x), tl.exp(tl.minimum(x - new_x, 0.0))
        total_x = total_x * shrink + weight
        weighted = weighted * shrink + tl.where(inside, x - y, 0.0) * weight
        total_y = total_y * tl.exp(top_y - new_y) + tl.exp(tl.minimum(y - new_y, 0.0))
        top_x, top_y = new_x, new_y
    row_x, row_y = tl.max(top_x, 0), tl.max(top_y, 0)
    shrink = tl.exp(top_x - row_x)
    sum_x = tl.sum(total_x * shrink, 0)
    lse_x = row_x + tl.log(sum_x)
    lse_y = row_y + tl.log(tl.sum(total_y * tl.exp(top_y - row_y), 0))
    tl.store(teacher_lse + row, lse_y)
    tl.store(kl + row, tl.sum(weighted * shrink, 0) / sum_x - lse_x + lse_y)  # sum p (x - y) - lse_x + lse_y


@kernel_of_rows
def _gradient_kernel(
    logits, target_ids, lse, dlogprobs, entropy, dentropy, teacher, teacher_lse, kl, dkl, vocabulary, scale, teacher_scale,
    ENTROPY: tl.constexpr, KL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocabulary
    at = logits + row * vocabulary + column
    logp = tl.load(at, mask=inside, other=0.0).to(tl.float32) * scale - tl.load(lse + row)
    p = tl.exp(logp)
    onehot = (column == tl.load(target_ids + row)).to(tl.float32)
    gradient = (onehot - p) * tl.load(dlogprobs + row)
    if ENTROPY:
        gradient -= p * (logp + tl.load(entropy + row)) * tl.load(dentropy + row)
    if KL:
        y = tl.load(teacher + row * vocabulary + column, mask=inside, other=0.0).to(tl.float32) * teacher_scale
        gradient += p * (logp - y + tl.load(teacher_lse + row) - tl.load(kl + row)) * tl.load(dkl + row)
    tl.store(at, (gradient * scale).to(logits.dtype.element_ty), mask=inside)
