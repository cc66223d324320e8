"""One adapter per flash kernel, all with the same two signatures; an LSE is all that grouped attention asks of a kernel.

Q query rows, S key rows, H query heads, K key/value heads (H is a multiple of K), D head dim, n sequences of one length.
Log-sum-exps are of the scaled scores, natural logarithm, [H, Q]; -inf with output 0 for a row that sees no key.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten


class Segments(NamedTuple):
    """Query and key rows of a variable-length call. ``cu_q`` and ``cu_k`` are [segments + 1] int32 on the tensors' device."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int


def varlen_forward(
    q_QHD: Tensor, k_SKD: Tensor, v_SKD: Tensor, seg: Segments, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of each query segment to its own key segment: output [Q, H, D] and LSE [H, Q]."""
    if q_QHD.device.type == "cpu":
        return _cpu_varlen_forward(q_QHD, k_SKD, v_SKD, seg, causal, scale)
    # A longest query of 1 sends the kernel down a path of its own, which reshapes as if no segment were empty.
    max_q = max(seg.max_q, 2)
    out_QHD, lse_HQ, *_ = aten._flash_attention_forward(
        q_QHD, k_SKD, v_SKD, seg.cu_q, seg.cu_k, max_q, seg.max_k, 0.0, causal, False, scale=scale
    )
    return out_QHD, lse_HQ


def varlen_backward(
    dout_QHD: Tensor,
    q_QHD: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    out_QHD: Tensor,
    lse_HQ: Tensor,
    seg: Segments,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [Q, H, D], dk [S, K, D], dv [S, K, D]. ``out`` and ``lse`` may be those of a softmax over more keys than these."""
    if q_QHD.device.type == "cpu":
        return _cpu_varlen_backward(dout_QHD, q_QHD, k_SKD, v_SKD, out_QHD, lse_HQ, seg, causal, scale)
    # The flash kernels draw no random numbers without dropout; the two rng arguments are only looked at with it.
    unused = torch.empty(0, dtype=torch.uint64, device=q_QHD.device)
    dq, dk, dv = aten._flash_attention_backward(
        dout_QHD.contiguous(), q_QHD, k_SKD, v_SKD, out_QHD.contiguous(), lse_HQ.contiguous(),
        seg.cu_q, seg.cu_k, seg.max_q, seg.max_k, 0.0, causal, unused, unused, scale=scale,
    )  # fmt: skip
    return dq, dk, dv


def dense_forward(q_nQHD: Tensor, k_nSKD: Tensor, v_nSKD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of n equal-length sequences, not causal: output [n, Q, H, D] and LSE [n, H, Q]."""
    if q_nQHD.device.type == "cpu":
        out, lse = _cpu_forward(q_nQHD.transpose(1, 2), k_nSKD.transpose(1, 2), v_nSKD.transpose(1, 2), False, scale)
        return out.transpose(1, 2), lse
    out, lse, *_ = aten._flash_attention_forward(
        q_nQHD, k_nSKD, v_nSKD, None, None, q_nQHD.shape[1], k_nSKD.shape[1], 0.0, False, False, scale=scale
    )
    return out, lse


# PyTorch's CPU flash kernel takes equal-length sequences [n, H, Q, D], dies (SIGFPE) on empty ones, and one call a segment
# is slow; so segments are batched by their lengths, and empty ones are never passed on.


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


Rows = slice | Tensor


@lru_cache(maxsize=64)  # every layer asks the same question, forward and backward
def _equal_length_buckets(cu_q: tuple[int, ...], cu_k: tuple[int, ...]) -> list[tuple[int, int, int, Rows, Rows]]:
    """(n, query length, key length, query rows, key rows) of each pair of lengths that occurs."""
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
    """Rows of segments of one length: a slice (no copy) where they lie side by side, else an index."""
    if starts[-1] - starts[0] == (len(starts) - 1) * length:
        return slice(starts[0], starts[-1] + length)
    return (torch.tensor(starts)[:, None] + torch.arange(length)).flatten()


def _buckets(seg: Segments) -> list[tuple[int, int, int, Rows, Rows]]:
    return _equal_length_buckets(tuple(seg.cu_q.tolist()), tuple(seg.cu_k.tolist()))


def _batched(x_THD: Tensor, rows: Rows, n: int) -> Tensor:
    """The rows as n sequences: [n, H, L, D]."""
    return x_THD[rows].unflatten(0, (n, -1)).transpose(1, 2)


def _flat(x_nHLD: Tensor) -> Tensor:
    """[n, H, L, D] back to [n * L, H, D]."""
    return x_nHLD.transpose(1, 2).flatten(0, 1)


def _cpu_varlen_forward(
    q_QHD: Tensor, k_SKD: Tensor, v_SKD: Tensor, seg: Segments, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    out_QHD = torch.zeros_like(q_QHD, memory_format=torch.contiguous_format)
    lse_dtype = torch.float64 if q_QHD.dtype == torch.float64 else torch.float32
    lse_HQ = torch.full((q_QHD.shape[1], q_QHD.shape[0]), float("-inf"), dtype=lse_dtype)
    for n, _, _, q_rows, k_rows in _buckets(seg):
        out, lse = _cpu_forward(
            _batched(q_QHD, q_rows, n), _batched(k_SKD, k_rows, n), _batched(v_SKD, k_rows, n), causal, scale
        )
        out_QHD[q_rows] = _flat(out)
        lse_HQ[:, q_rows] = lse.transpose(0, 1).flatten(1)
    return out_QHD, lse_HQ


def _cpu_varlen_backward(
    dout_QHD: Tensor,
    q_QHD: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    out_QHD: Tensor,
    lse_HQ: Tensor,
    seg: Segments,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq_QHD, dk_SKD, dv_SKD = torch.zeros_like(q_QHD), torch.zeros_like(k_SKD), torch.zeros_like(v_SKD)
    for n, _, _, q_rows, k_rows in _buckets(seg):
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _batched(dout_QHD, q_rows, n),
            _batched(q_QHD, q_rows, n),
            _batched(k_SKD, k_rows, n),
            _batched(v_SKD, k_rows, n),
            _batched(out_QHD, q_rows, n),
            lse_HQ[:, q_rows].unflatten(1, (n, -1)).transpose(0, 1),
            0.0,
            causal,
            scale=scale,
        )
        dq_QHD[q_rows], dk_SKD[k_rows], dv_SKD[k_rows] = _flat(dq), _flat(dk), _flat(dv)
    return dq_QHD, dk_SKD, dv_SKD
