"""Joining attention over two sets of keys by their log-sum-exps, and adding up the gradients of copied keys.

One memory pass each on a GPU (Triton); the plain versions beside them are the spec, and what a CPU runs.

Q query rows, H query heads, T packed rows, C copied rows, K key/value heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge_(out_QHD: Tensor, lse_HQ: Tensor, out_p_QHD: Tensor, lse_p_HQ: Tensor) -> None:
    """Merge attention over a second set of keys into ``out`` and ``lse``, in place. Weights are taken in the LSE's precision."""
    if out_QHD.device.type == "cuda":
        from pgrpo.attention import triton_kernels

        triton_kernels.merge_(out_QHD, lse_HQ, out_p_QHD, lse_p_HQ)
    else:
        merge_plain_(out_QHD, lse_HQ, out_p_QHD, lse_p_HQ)


def merge_plain_(out_QHD: Tensor, lse_HQ: Tensor, out_p_QHD: Tensor, lse_p_HQ: Tensor) -> None:
    """``merge_`` as PyTorch operations."""
    merged_HQ = torch.logaddexp(lse_HQ, lse_p_HQ)
    weight = torch.exp(lse_HQ - merged_HQ).T.unsqueeze(-1)
    weight_p = torch.exp(lse_p_HQ - merged_HQ).T.unsqueeze(-1)
    out_QHD.copy_(out_QHD * weight + out_p_QHD * weight_p)
    lse_HQ.copy_(merged_HQ)


def sum_copies(x_CKD: Tensor, source_C: Tensor, order_C: Tensor, offsets: Tensor) -> Tensor:
    """Add up all copies of each row: [T, K, D], summed in float32 at least and in a fixed order.

    Args:
        x_CKD: [C, K, D] values of the copies.
        source_C: [C] int64, the row that each copy was made of.
        order_C: [C] int32, the copies sorted by their source.
        offsets: [T + 1] int32, where each row's copies begin in ``order_C``.
    """
    if x_CKD.device.type == "cuda":
        from pgrpo.attention import triton_kernels

        return triton_kernels.sum_copies(x_CKD, order_C, offsets)
    return sum_copies_plain(x_CKD, source_C, len(offsets) - 1)


def sum_copies_plain(x_CKD: Tensor, source_C: Tensor, rows: int) -> Tensor:
    """``sum_copies`` as PyTorch operations."""
    total = torch.zeros(
        rows, *x_CKD.shape[1:], dtype=torch.promote_types(x_CKD.dtype, torch.float32), device=x_CKD.device
    )
    return total.index_add_(0, source_C, x_CKD.to(total.dtype)).to(x_CKD.dtype)
