"""Triton versions of ``merge.py``. Imported on a GPU only; PyTorch's CUDA builds include Triton."""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Triton compiles a kernel again for integers that 16 divides or that are 1, and for pointers that 16 does not divide. What differs
# from batch to batch is left out of that.

PAIRS_PER_BLOCK = 32
ROWS_PER_BLOCK = 4


def merge_(out_QHD: Tensor, lse_HQ: Tensor, out_p_QHD: Tensor, lse_p_HQ: Tensor) -> None:
    """See ``merge.merge_``: reads both outputs once, writes one."""
    rows, heads, dim = out_QHD.shape
    if rows == 0:
        return
    grid = (triton.cdiv(rows * heads, PAIRS_PER_BLOCK),)
    _merge_kernel[grid](
        out_QHD, lse_HQ, out_p_QHD, lse_p_HQ, rows * heads, heads,
        out_QHD.stride(0), out_QHD.stride(1), out_p_QHD.stride(0), out_p_QHD.stride(1),
        lse_HQ.stride(0), lse_HQ.stride(1), lse_p_HQ.stride(0), lse_p_HQ.stride(1),
        dim, PAIRS=PAIRS_PER_BLOCK, BLOCK=triton.next_power_of_2(dim),
    )  # fmt: skip


def copy_rows(k_TKD: Tensor, v_TKD: Tensor, source_C: Tensor) -> tuple[Tensor, Tensor]:
    """See ``merge.copy_rows``."""
    k_TKD, v_TKD = k_TKD.contiguous(), v_TKD.contiguous()
    k_width, v_width, copies = k_TKD[0].numel(), v_TKD[0].numel(), len(source_C)
    k_CKD, v_CKD = (x.new_empty(copies, *x.shape[1:]) for x in (k_TKD, v_TKD))
    _copy_rows_kernel[(triton.cdiv(copies, ROWS_PER_BLOCK),)](
        k_TKD, v_TKD, k_CKD, v_CKD, source_C, copies, k_width, v_width,
        ROWS=ROWS_PER_BLOCK, BLOCK=triton.next_power_of_2(max(k_width, v_width)),
    )  # fmt: skip
    return k_CKD, v_CKD


def sum_copies(
    dk_CKD: Tensor, dv_CKD: Tensor, _source_C: Tensor, order_C: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """See ``merge.sum_copies``. Needs no ``source_C``: a program adds up the copies of one row."""
    rows, k_width, v_width = len(offsets) - 1, dk_CKD[0].numel(), dv_CKD[0].numel()
    dk_TKD, dv_TKD = (x.new_empty(rows, *x.shape[1:]) for x in (dk_CKD, dv_CKD))
    _sum_copies_kernel[(rows,)](
        dk_CKD.contiguous(), dv_CKD.contiguous(), dk_TKD, dv_TKD, order_C, offsets, k_width, v_width,
        BLOCK=triton.next_power_of_2(max(k_width, v_width)),
    )  # fmt: skip
    return dk_TKD, dv_TKD


@triton.jit(do_not_specialize=["pairs", "lse_head", "lse_p_head"], do_not_specialize_on_alignment=["lse"])
def _merge_kernel(
    out, lse, out_p, lse_p, pairs, heads,
    out_row, out_head, out_p_row, out_p_head, lse_head, lse_row, lse_p_head, lse_p_row,
    dim, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    valid = pair < pairs
    row, head = pair // heads, pair % heads
    lse_at, lse_p_at = lse + head * lse_head + row * lse_row, lse_p + head * lse_p_head + row * lse_p_row
    a = tl.load(lse_at, mask=valid, other=0.0)
    b = tl.load(lse_p_at, mask=valid, other=0.0)
    b = tl.where(b == float("inf"), float("-inf"), b)  # a row without keys (FlashAttention-2)
    top = tl.maximum(a, b)
    merged = top + tl.log(tl.exp(a - top) + tl.exp(b - top))
    column = tl.arange(0, BLOCK)
    inside = valid[:, None] & (column < dim)[None, :]
    out_at = out + (row * out_row + head * out_head)[:, None] + column[None, :]
    out_p_at = out_p + (row * out_p_row + head * out_p_head)[:, None] + column[None, :]
    x = tl.load(out_at, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(out_p_at, mask=inside, other=0.0).to(tl.float32)
    result = x * tl.exp(a - merged)[:, None] + y * tl.exp(b - merged)[:, None]
    tl.store(out_at, result.to(out.dtype.element_ty), mask=inside)
    tl.store(lse_at, merged, mask=valid)


@triton.jit(do_not_specialize=["copies"])
def _copy_rows_kernel(k, v, k_out, v_out, source, copies, k_width, v_width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    copy = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = (copy < copies)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    row = tl.load(source + copy, mask=copy < copies, other=0)[:, None]
    k_inside, v_inside = valid & (column < k_width), valid & (column < v_width)
    k_row = tl.load(k + row * k_width + column, mask=k_inside)
    tl.store(k_out + copy[:, None] * k_width + column, k_row, mask=k_inside)
    v_row = tl.load(v + row * v_width + column, mask=v_inside)
    tl.store(v_out + copy[:, None] * v_width + column, v_row, mask=v_inside)


@triton.jit
def _sum_copies_kernel(dk, dv, dk_out, dv_out, order, offsets, k_width, v_width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    k_inside, v_inside = column < k_width, column < v_width
    dk_sum = tl.zeros((BLOCK,), tl.float32)
    dv_sum = tl.zeros((BLOCK,), tl.float32)
    for i in range(tl.load(offsets + row), tl.load(offsets + row + 1)):
        at = tl.load(order + i).to(tl.int64)
        dk_sum += tl.load(dk + at * k_width + column, mask=k_inside, other=0.0).to(tl.float32)
        dv_sum += tl.load(dv + at * v_width + column, mask=v_inside, other=0.0).to(tl.float32)
    tl.store(dk_out + row * k_width + column, dk_sum.to(dk_out.dtype.element_ty), mask=k_inside)
    tl.store(dv_out + row * v_width + column, dv_sum.to(dv_out.dtype.element_ty), mask=v_inside)
