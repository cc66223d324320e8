"""Grouped attention: keys and values of every node of the forest are stored once and read by all of its descendants.

For prompts with completions these are two flash passes on slices of the packed rows, without a copy of any K or V, merged by their
log-sum-exps:

1. causal self-attention of every node, prompts and completions alike;
2. all completion rows of a group against the group's prompt, not causal.

Deeper forests have a pass like 2 for each pair of depths. With out, lse of what is merged so far and out_p, lse_p of one more pass,
a softmax over both sets of keys is ``lse* = logaddexp(lse, lse_p)``, ``out* = exp(lse - lse*) out + exp(lse_p - lse*) out_p``.

The backward is exact with the same passes. A flash backward computes ``P = exp(s - lse)`` and ``delta = rowsum(dout * out)``
(FlashAttention-2, arXiv 2307.08691, algorithm 2); given the merged ``lse*`` and ``out*``, each pass's P is its own part of the
joint softmax, so that each returns its own share of dq, dk and dv.

Where ancestors are short (``choose.py``), or a sliding window hides most of their rows, pass 1 has copies of their keys instead.

An attention sink (gpt-oss) is a score of each head that every row adds to its softmax, with no value: one more term of the
log-sum-exp.

T packed rows; H query heads, K key/value heads, D head dim of keys, Dv that of values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pgrpo.attention.kernels.flash import varlen_backward, varlen_forward
from pgrpo.attention.kernels.segments import Scores
from pgrpo.attention.layout import Call, PackedLayout, unpack_calls
from pgrpo.attention.merge import add_sinks_, copy_rows, merge_, sink_gradient, sum_copies


def grouped_attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    layout: PackedLayout,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Attention over a packed batch, differentiable in q, k, v and sinks.

    Args:
        q_THD: [T, H, D] queries.
        k_TKD: [T, K, D] keys; H must be a multiple of K. Of a kept first node (``layout.front``) there are keys and values, in
            front of the others, but no queries.
        v_TKD: [T, K, Dv] values.
        layout: who attends to whom.
        scale: factor of the scores, usually D ** -0.5.
        window: a row sees this many keys of its sample, its own included; None is all before it.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        sinks_H: [H] scores of the sinks.

    Returns:
        [T, H, Dv], equal to ``reference_attention(...)[0]`` up to rounding.
    """
    passes = layout.passes(window)
    copies = passes.copies
    out_THD, _ = _grouped_attention(
        q_THD, k_TKD, v_TKD, sinks_H,
        passes.table, passes.cu_seqlens, copies.source, copies.order, copies.offsets,
        scale, softcap or 0.0, layout.kernel,
    )  # fmt: skip
    return out_THD


# One custom op for each direction, of tensors and numbers only: torch.compile and selective recomputation see one node each.


@torch.library.custom_op("pgrpo::grouped_attention", mutates_args=())
def _grouped_attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None,
    table: Tensor, cu_seqlens: Tensor, source: Tensor, order: Tensor, offsets: Tensor,
    scale: float, softcap: float, kernel: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    first, *others = unpack_calls(table)
    keys = _keys_of(first, k, v, source)
    out_THD, lse_HT = varlen_forward(q, *keys, first.on(cu_seqlens), _scores(first, scale, softcap), kernel)
    for call in others:
        rows, front = slice(call.q_start, call.q_end), slice(call.k_start, call.k_end)
        out_p, lse_p = varlen_forward(
            q[rows], k[front], v[front], call.on(cu_seqlens), _scores(call, scale, softcap), kernel
        )
        merge_(out_THD[rows], lse_HT[:, rows], out_p, lse_p)
    if sinks is not None:
        add_sinks_(out_THD, lse_HT, sinks)
    return out_THD.contiguous(), lse_HT


@torch.library.custom_op("pgrpo::grouped_attention_backward", mutates_args=())
def _grouped_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, out: Tensor, lse: Tensor,
    table: Tensor, cu_seqlens: Tensor, source: Tensor, order: Tensor, offsets: Tensor,
    scale: float, softcap: float, kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    first, *others = unpack_calls(table)
    keys = _keys_of(first, k, v, source)
    dq, dk, dv = varlen_backward(dout, q, *keys, out, lse, first.on(cu_seqlens), _scores(first, scale, softcap), kernel)
    if first.copied:
        dk, dv = sum_copies(dk, dv, source, order, offsets)
    elif first.k_start:
        dk, dv = (torch.cat([x.new_zeros(first.k_start, *x.shape[1:]), x]) for x in (dk, dv))
    for call in others:
        rows, front = slice(call.q_start, call.q_end), slice(call.k_start, call.k_end)
        dq_p, dk_p, dv_p = varlen_backward(
            dout[rows], q[rows], k[front], v[front], out[rows], lse[:, rows],
            call.on(cu_seqlens), _scores(call, scale, softcap), kernel,
        )  # fmt: skip
        dq[rows] += dq_p
        dk[front] += dk_p
        dv[front] += dv_p
    dsinks = dout.new_empty(0) if sinks is None else sink_gradient(dout, out, lse, sinks)
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), dsinks


def _keys_of(first: Call, k: Tensor, v: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    return copy_rows(k, v, source) if first.copied else (k[first.k_start : first.k_end], v[first.k_start : first.k_end])


def _scores(call: Call, scale: float, softcap: float) -> Scores:
    return Scores(scale, bool(call.causal), call.window, softcap)


@_grouped_attention.register_fake
def _(q, k, v, sinks, *geometry):
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty((q.shape[1], q.shape[0]), dtype=lse_dtype)


@_grouped_attention_backward.register_fake
def _(dout, q, k, v, sinks, *others):
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv, dout.new_empty(0) if sinks is None else torch.empty_like(sinks)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.softcap, ctx.kernel = inputs
    ctx.save_for_backward(*tensors[:4], *output, *tensors[4:])


def _backward(ctx, dout: Tensor, dlse: Tensor):
    tensors = ctx.saved_tensors  # once: with recomputation, reading them recomputes them
    dq, dk, dv, dsinks = _grouped_attention_backward(dout, *tensors, ctx.scale, ctx.softcap, ctx.kernel)
    return dq, dk, dv, None if tensors[3] is None else dsinks, *[None] * 8


_grouped_attention.register_autograd(_backward, setup_context=_setup_context)
