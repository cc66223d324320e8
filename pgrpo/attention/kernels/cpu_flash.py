"""PyTorch's CPU flash kernel behind the variable-length interface of ``flash.py``; also for float64.

The kernel takes sequences of equal length [n, H, Q, D] and dies (SIGFPE) on empty ones; one call a segment would be slow. So
segments are batched by their lengths, and empty ones are skipped.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from pgrpo.attention.kernels.segments import Segments
from pgrpo.attention.merge import merge_

aten = torch.ops.aten
Rows = slice | Tensor


def forward(q: Tensor, k: Tensor, v: Tensor, seg: Segments, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """``flash.varlen_forward`` on the CPU."""
    out_QHD = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse_HQ = torch.full((q.shape[1], q.shape[0]), float("-inf"), dtype=lse_dtype)
    for n, q_len, k_len, q_rows, k_rows in _buckets(seg):
        queries, keys, values = _batched(q, q_rows, n), _batched(k, k_rows, n), _batched(v, k_rows, n)
        earlier = k_len - q_len if causal else 0  # keys before the first query's position: every query attends to them
        out, lse = dense_forward(queries, keys[:, :, earlier:], values[:, :, earlier:], causal, scale)
        out_rows, lse_rows = _flat(out), lse.transpose(0, 1).flatten(1)
        if earlier:
            out_e, lse_e = dense_forward(queries, keys[:, :, :earlier], values[:, :, :earlier], False, scale)
            merge_(out_rows, lse_rows, _flat(out_e), lse_e.transpose(0, 1).flatten(1))
        out_QHD[q_rows], lse_HQ[:, q_rows] = out_rows, lse_rows
    return out_QHD, lse_HQ


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seg: Segments, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``flash.varlen_backward`` on the CPU."""
    dq_QHD, dk_SKD, dv_SKD = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for n, q_len, k_len, q_rows, k_rows in _buckets(seg):
        queries, keys, values = _batched(q, q_rows, n), _batched(k, k_rows, n), _batched(v, k_rows, n)
        rows = _batched(dout, q_rows, n), queries
        merged = _batched(out, q_rows, n), lse[:, q_rows].unflatten(1, (n, -1)).transpose(0, 1)
        earlier = k_len - q_len if causal else 0
        dq, dk, dv = _dense_backward(*rows, keys[:, :, earlier:], values[:, :, earlier:], *merged, causal, scale)
        if earlier:
            dq_e, dk_e, dv_e = _dense_backward(
                *rows, keys[:, :, :earlier], values[:, :, :earlier], *merged, False, scale
            )
            dq, dk, dv = dq + dq_e, torch.cat([dk_e, dk], 2), torch.cat([dv_e, dv], 2)
        dq_QHD[q_rows], dk_SKD[k_rows], dv_SKD[k_rows] = _flat(dq), _flat(dk), _flat(dv)
    return dq_QHD, dk_SKD, dv_SKD


def dense_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """q [n, H, Q, D], k and v [n, K, S, D] -> output [n, H, Q, D] and LSE [n, H, Q]."""
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _dense_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse, 0.0, causal, scale=scale)


def _buckets(seg: Segments) -> list[tuple[int, int, int, Rows, Rows]]:
    return _equal_length_buckets(tuple(seg.cu_q.tolist()), tuple(seg.cu_k.tolist()))


@lru_cache(maxsize=64)  # every layer calls this with the same lengths, in forward and backward
def _equal_length_buckets(cu_q: tuple[int, ...], cu_k: tuple[int, ...]) -> list[tuple[int, int, int, Rows, Rows]]:
    """(n, query length, key length, query rows, key rows) for each pair of lengths that occurs."""
    members: dict[tuple[int, int], list[int]] = {}
    for i in range(len(cu_q) - 1):
        lengths = cu_q[i + 1] - cu_q[i], cu_k[i + 1] - cu_k[i]
        if all(lengths):
            members.setdefault(lengths, []).append(i)
    return [
        (len(ids), q_len, k_len, _rows([cu_q[i] for i in ids], q_len), _rows([cu_k[i] for i in ids], k_len))
        for (q_len, k_len), ids in members.items()
    ]


def _rows(starts: list[int], length: int) -> Rows:
    """Rows of segments of one length: a slice (no copy) where they are adjacent, else an index."""
    if starts[-1] - starts[0] == (len(starts) - 1) * length:
        return slice(starts[0], starts[-1] + length)
    return (torch.tensor(starts)[:, None] + torch.arange(length)).flatten()


def _batched(x_THD: Tensor, rows: Rows, n: int) -> Tensor:
    """The rows as n sequences: [n, H, L, D]."""
    return x_THD[rows].unflatten(0, (n, -1)).transpose(1, 2)


def _flat(x_nHLD: Tensor) -> Tensor:
    """[n, H, L, D] back to [n * L, H, D]."""
    return x_nHLD.transpose(1, 2).flatten(0, 1)
