"""Triton versions of ``merge.py``. Imported on a GPU only; PyTorch's CUDA builds bring Triton along."""

# pyright: reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

PAIRS_PER_BLOCK = 32


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


def sum_copies(x_CKD: Tensor, order_C: Tensor, offsets: Tensor) -> Tensor:
    """See ``merge.sum_copies``."""
    rows, width = len(offsets) - 1, x_CKD.shape[1] * x_CKD.shape[2]
    out = x_CKD.new_empty(rows, *x_CKD.shape[1:])
    if rows:
        _sum_copies_kernel[(rows,)](
            x_CKD.contiguous(), out, order_C, offsets, width, BLOCK=triton.next_power_of_2(width)
        )
    return out


@triton.jit
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


@triton.jit
def _sum_copies_kernel(x, out, order, offsets, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(tl.load(offsets + row), tl.load(offsets + row + 1)):
        copy = tl.load(order + i).to(tl.int64)
        total += tl.load(x + copy * width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, total.to(out.dtype.element_ty), mask=inside)
