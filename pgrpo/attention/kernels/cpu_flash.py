"""PyTorch's CPU flash kernel behind the variable-length interface of ``flash.py``; also for float64.

The kernel takes sequences of equal length [n, H, Q, D] and dies (SIGFPE) on empty ones; one call a segment would be slow. So
segments are batched by their lengths, and empty ones are skipped. It has no windows and no soft-capping: those calls compute
their scores as one matrix, [n, H, Q, S] at a time.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from pgrpo.attention.kernels.segments import Scores, Segments
from pgrpo.attention.merge import merge_

aten = torch.ops.aten
Rows = slice | Tensor


def forward(q: Tensor, k: Tensor, v: Tensor, seg: Segments, scores: Scores) -> tuple[Tensor, Tensor]:
    """``flash.varlen_forward`` on the CPU."""
    out_QHD = q.new_zeros(*q.shape[:2], v.shape[-1])
    lse_HQ = torch.full((q.shape[1], q.shape[0]), float("-inf"), dtype=lse_dtype(q))
    for n, q_rows, k_rows in _buckets(seg):
        out, lse = dense_forward(_batched(q, q_rows, n), _batched(k, k_rows, n), _batched(v, k_rows, n), scores)
        out_QHD[q_rows], lse_HQ[:, q_rows] = _flat(out), lse.transpose(0, 1).flatten(1)
    return out_QHD, lse_HQ


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seg: Segments, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """``flash.varlen_backward`` on the CPU."""
    dq_QHD, dk_SKD, dv_SKD = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for n, q_rows, k_rows in _buckets(seg):
        queries, keys, values = _batched(q, q_rows, n), _batched(k, k_rows, n), _batched(v, k_rows, n)
        merged = _batched(out, q_rows, n), lse[:, q_rows].unflatten(1, (n, -1)).transpose(0, 1)
        dq, dk, dv = _dense_backward(_batched(dout, q_rows, n), queries, keys, values, *merged, scores)
        dq_QHD[q_rows], dk_SKD[k_rows], dv_SKD[k_rows] = _flat(dq), _flat(dk), _flat(dv)
    return dq_QHD, dk_SKD, dv_SKD


def lse_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def dense_forward(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """q [n, H, Q, D], k [n, K, S, D] and v [n, K, S, Dv] -> output [n, H, Q, Dv] and LSE [n, H, Q]."""
    if scores.window or scores.softcap:
        return _by_matrix(q, k, v, scores)
    earlier = (
        k.shape[2] - q.shape[2] if scores.causal else 0
    )  # keys before the first query: every query attends to them
    out, lse = _flash(q, k[:, :, earlier:], v[:, :, earlier:], scores)
    if earlier:
        out_e, lse_e = _flash(q, k[:, :, :earlier], v[:, :, :earlier], scores._replace(causal=False))
        out_rows, lse_rows = _flat(out), lse.transpose(0, 1).flatten(1)
        merge_(out_rows, lse_rows, _flat(out_e), lse_e.transpose(0, 1).flatten(1))
        out = _batched(out_rows, slice(None), len(q))
        lse = lse_rows.unflatten(1, (len(q), -1)).transpose(0, 1)
    return out, lse


def _dense_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    if scores.window or scores.softcap:
        return _by_matrix_backward(dout, q, k, v, out, lse, scores)
    earlier = k.shape[2] - q.shape[2] if scores.causal else 0
    dq, dk, dv = _flash_backward(dout, q, k[:, :, earlier:], v[:, :, earlier:], out, lse, scores)
    if earlier:
        before = k[:, :, :earlier], v[:, :, :earlier]
        dq_e, dk_e, dv_e = _flash_backward(dout, q, *before, out, lse, scores._replace(causal=False))
        dq, dk, dv = dq + dq_e, torch.cat([dk_e, dk], 2), torch.cat([dv_e, dv], 2)
    return dq, dk, dv


def _flash(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """The kernel itself. It wants values as wide as keys: columns of zeros change nothing."""
    width = v.shape[-1]
    q, k, v = (_wide(x, max(q.shape[-1], width)) for x in (q, k, v))
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, scores.causal, scale=scores.scale)
    return out[..., :width], lse


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    widths = q.shape[-1], k.shape[-1], v.shape[-1]
    dout, q, k, v, out = (_wide(x, max(widths)) for x in (dout, q, k, v, out))
    gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, scores.causal, scale=scores.scale
    )
    dq, dk, dv = (x[..., :width] for x, width in zip(gradients, widths, strict=True))
    return dq, dk, dv


def _wide(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1]))


def _by_matrix(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    s_nHQS, _ = _score_matrix(q, k, scores)
    lse_nHQ = s_nHQS.logsumexp(-1)
    return ((s_nHQS - lse_nHQ.unsqueeze(-1)).exp() @ _for_heads(v, q).to(lse_nHQ)).to(q), lse_nHQ


def _by_matrix_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    s_nHQS, slope_nHQS = _score_matrix(q, k, scores)
    p_nHQS = (s_nHQS - lse.unsqueeze(-1)).exp()
    dout, out, queries = dout.to(lse), out.to(lse), q.to(lse)
    dp_nHQS = dout @ _for_heads(v, q).to(lse).transpose(-1, -2)
    ds_nHQS = p_nHQS * (dp_nHQS - (dout * out).sum(-1, keepdim=True)) * slope_nHQS
    dq = ds_nHQS @ _for_heads(k, q).to(lse)
    dk, dv = ds_nHQS.transpose(-1, -2) @ queries, p_nHQS.transpose(-1, -2) @ dout
    dk, dv = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (dk, dv))  # query heads of one key head
    return dq.to(q), dk.to(k), dv.to(v)


def _score_matrix(q: Tensor, k: Tensor, scores: Scores) -> tuple[Tensor, Tensor | float]:
    """Masked scores [n, H, Q, S], and their derivative by the products of queries and keys."""
    s_nHQS = (q.to(lse_dtype(q)) @ _for_heads(k, q).to(lse_dtype(q)).transpose(-1, -2)) * scores.scale
    slope: Tensor | float = scores.scale
    if scores.softcap:
        capped = torch.tanh(s_nHQS / scores.softcap)
        s_nHQS, slope = scores.softcap * capped, scores.scale * (1 - capped * capped)
    if scores.causal:
        distance_QS = torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None] - torch.arange(k.shape[2])
        hidden_QS = (distance_QS < 0) | (distance_QS >= (scores.window or k.shape[2]))
        s_nHQS = s_nHQS.masked_fill(hidden_QS, float("-inf"))
    return s_nHQS, slope


def _for_heads(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _buckets(seg: Segments) -> list[tuple[int, Rows, Rows]]:
    return _equal_length_buckets(tuple(seg.cu_q.tolist()), tuple(seg.cu_k.tolist()))


@lru_cache(maxsize=256)  # every layer calls this with the same lengths, in forward and backward
def _equal_length_buckets(cu_q: tuple[int, ...], cu_k: tuple[int, ...]) -> list[tuple[int, Rows, Rows]]:
    """(n, query rows, key rows) of the n segments of each pair of lengths that occurs."""
    members: dict[tuple[int, int], list[int]] = {}
    for i in range(len(cu_q) - 1):
        lengths = cu_q[i + 1] - cu_q[i], cu_k[i + 1] - cu_k[i]
        if all(lengths):
            members.setdefault(lengths, []).append(i)
    return [
        (len(ids), _rows([cu_q[i] for i in ids], q_len), _rows([cu_k[i] for i in ids], k_len))
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
