"""Merges attention over two sets of keys by their log-sum-exps; copies keys, and adds up the gradients of the copies.

On a GPU each is one pass over memory (``kernels/triton_merge.py``). The code here is the specification, and runs on a CPU.

Q query rows, H query heads, T packed rows, C copied rows, K key/value heads, D head dim
(of keys and of values, which may differ).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pgrpo.attention.kernels.on_gpu import on_gpu

KERNELS = "pgrpo.attention.kernels.triton_merge"


@on_gpu(KERNELS)
def merge_(out_QHD: Tensor, lse_HQ: Tensor, out_p_QHD: Tensor, lse_p_HQ: Tensor) -> None:
    """Merge attention over a second set of keys into ``out`` and ``lse``, in place. The weights have the LSE's precision."""
    lse_p_HQ = lse_p_HQ.masked_fill(lse_p_HQ == float("inf"), float("-inf"))  # rows without keys (FlashAttention-2)
    merged_HQ = torch.logaddexp(lse_HQ, lse_p_HQ)
    weight = torch.exp(lse_HQ - merged_HQ).T.unsqueeze(-1)
    weight_p = torch.exp(lse_p_HQ - merged_HQ).T.unsqueeze(-1)
    out_QHD.copy_(out_QHD * weight + out_p_QHD * weight_p)
    lse_HQ.copy_(merged_HQ)


def add_sinks_(out_QHD: Tensor, lse_HQ: Tensor, sinks_H: Tensor) -> None:
    """Merge a key of score ``sinks`` and value 0 into ``out`` and ``lse``, in place."""
    merged_HQ = torch.logaddexp(lse_HQ, sinks_H.to(lse_HQ).unsqueeze(-1))
    out_QHD.mul_(torch.exp(lse_HQ - merged_HQ).T.unsqueeze(-1))
    lse_HQ.copy_(merged_HQ)


def sink_gradient(dout_QHD: Tensor, out_QHD: Tensor, lse_HQ: Tensor, sinks_H: Tensor) -> Tensor:
    """[H]: the gradient of the sinks' scores, from the merged output and LSE. P of a sink is ``exp(sink - lse)``, its value 0."""
    delta_HQ = (dout_QHD.to(lse_HQ.dtype) * out_QHD).sum(-1).T
    return -((sinks_H.to(lse_HQ).unsqueeze(-1) - lse_HQ).exp() * delta_HQ).sum(1).to(sinks_H.dtype)


@on_gpu(KERNELS)
def copy_rows(k_TKD: Tensor, v_TKD: Tensor, source_C: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``source_C`` (int64) of keys and values: [C, K, D] each."""
    return k_TKD.index_select(0, source_C), v_TKD.index_select(0, source_C)


@on_gpu(KERNELS)
def sum_copies(
    dk_CKD: Tensor, dv_CKD: Tensor, source_C: Tensor, order_C: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """The backward of ``copy_rows``: all copies of each row added up, [T, K, D] each, in float32 at least, in a fixed order.

    Args:
        dk_CKD: [C, K, D]; dv_CKD alike.
        source_C: [C] int64, the row of which each copy was made.
        order_C: [C] int32, the copies sorted by their source.
        offsets: [T + 1] int32, where each row's copies begin in ``order_C``.
    """

    def summed(x_CKD: Tensor) -> Tensor:
        dtype = torch.promote_types(x_CKD.dtype, torch.float32)
        total_TKD = torch.zeros(len(offsets) - 1, *x_CKD.shape[1:], dtype=dtype, device=x_CKD.device)
        return total_TKD.index_add_(0, source_C, x_CKD.to(dtype)).to(x_CKD.dtype)

    return summed(dk_CKD), summed(dv_CKD)
