"""Grouped attention: each prompt's keys and values are stored once and read by all of its completions.

Two flash passes on slices of the packed rows, without a copy of any K or V, merged by their log-sum-exps:

1. causal self-attention over every segment, prefixes and suffixes alike;
2. all suffix rows of a group against the group's prefix, not causal.

With out, lse of pass 1 and out_p, lse_p of pass 2, a softmax over both sets of keys is
``lse* = logaddexp(lse, lse_p)``, ``out* = exp(lse - lse*) out + exp(lse_p - lse*) out_p``.

The backward is exact with the same two passes. A flash backward computes ``P = exp(s - lse)`` and
``delta = rowsum(dout * out)`` (FlashAttention-2, arXiv 2307.08691, algorithm 2); given the merged ``lse*`` and ``out*``, each
pass's P is its own part of the joint softmax, so that each returns its own share of dq, dk and dv.

Where prompts are short (``choose.py``), one pass over copied keys is faster than two passes and a merge.

T packed rows, Np of them prefix rows; H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pgrpo.attention.kernels.flash import varlen_backward, varlen_forward
from pgrpo.attention.kernels.segments import Segments
from pgrpo.attention.layout import PackedLayout, Sizes
from pgrpo.attention.merge import copy_rows, merge_, sum_copies


def grouped_attention(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layout: PackedLayout, scale: float) -> Tensor:
    """Attention over a packed batch, differentiable in q, k and v.

    Args:
        q_THD: [T, H, D] queries, prefix rows first.
        k_TKD: [T, K, D] keys; H must be a multiple of K.
        v_TKD: [T, K, D] values.
        layout: who attends to whom.
        scale: factor of the scores, usually D ** -0.5.

    Returns:
        [T, H, D], equal to ``reference_attention(...)[0]`` up to rounding.
    """
    copies = layout.copies
    out_THD, _ = _grouped_attention(
        q_THD, k_TKD, v_TKD,
        layout.cu_seqlens, layout.cu_seqlens_prefix, layout.cu_seqlens_group,
        copies.source, copies.order, copies.offsets, copies.cu_seqlens,
        layout.size_tensor, scale, layout.kernel,
    )  # fmt: skip
    return out_THD


# One custom op for each direction, of tensors and numbers only: torch.compile and selective recomputation see one node each.


@torch.library.custom_op("pgrpo::grouped_attention", mutates_args=())
def _grouped_attention(
    q: Tensor, k: Tensor, v: Tensor,
    cu_seqlens: Tensor, cu_prefix: Tensor, cu_group: Tensor,
    source: Tensor, order: Tensor, offsets: Tensor, cu_copied: Tensor,
    size_tensor: Tensor, scale: float, kernel: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sizes = Sizes.from_tensor(size_tensor)
    if sizes.longest_copy:
        keys = Segments(cu_seqlens, cu_copied, sizes.longest_segment, sizes.longest_copy)
        return varlen_forward(q, *copy_rows(k, v, source), keys, True, scale, kernel)
    within = Segments(cu_seqlens, cu_seqlens, sizes.longest_segment, sizes.longest_segment)
    out_THD, lse_HT = varlen_forward(q, k, v, within, True, scale, kernel)
    if 0 < (np := sizes.prefix_rows) < len(q):
        across = Segments(cu_group, cu_prefix, sizes.most_group_rows, sizes.longest_prefix)
        out_p, lse_p = varlen_forward(q[np:], k[:np], v[:np], across, False, scale, kernel)
        merge_(out_THD[np:], lse_HT[:, np:], out_p, lse_p)
    return out_THD, lse_HT


@torch.library.custom_op("pgrpo::grouped_attention_backward", mutates_args=())
def _grouped_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens: Tensor, cu_prefix: Tensor, cu_group: Tensor,
    source: Tensor, order: Tensor, offsets: Tensor, cu_copied: Tensor,
    size_tensor: Tensor, scale: float, kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    sizes = Sizes.from_tensor(size_tensor)
    if sizes.longest_copy:
        keys = Segments(cu_seqlens, cu_copied, sizes.longest_segment, sizes.longest_copy)
        dq, dk_C, dv_C = varlen_backward(dout, q, *copy_rows(k, v, source), out, lse, keys, True, scale, kernel)
        return dq.contiguous(), *sum_copies(dk_C, dv_C, source, order, offsets)
    within = Segments(cu_seqlens, cu_seqlens, sizes.longest_segment, sizes.longest_segment)
    dq, dk, dv = varlen_backward(dout, q, k, v, out, lse, within, True, scale, kernel)
    if 0 < (np := sizes.prefix_rows) < len(q):
        across = Segments(cu_group, cu_prefix, sizes.most_group_rows, sizes.longest_prefix)
        dq_p, dk_p, dv_p = varlen_backward(
            dout[np:], q[np:], k[:np], v[:np], out[np:], lse[:, np:], across, False, scale, kernel
        )
        dq[np:] += dq_p
        dk[:np] += dk_p
        dv[:np] += dv_p
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_grouped_attention.register_fake
def _(q, k, v, *geometry):
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty((q.shape[1], q.shape[0]), dtype=lse_dtype)


@_grouped_attention_backward.register_fake
def _(dout, q, k, v, out, lse, *geometry):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, *geometry, ctx.scale, ctx.kernel = inputs
    ctx.save_for_backward(q, k, v, *output, *geometry)


def _backward(ctx, dout: Tensor, dlse: Tensor):
    dq, dk, dv = _grouped_attention_backward(dout, *ctx.saved_tensors, ctx.scale, ctx.kernel)
    return dq, dk, dv, *[None] * 10


_grouped_attention.register_autograd(_backward, setup_context=_setup_context)
