"""Dense masked softmax over a packed batch: slow and obvious. This is the specification that every fast path is compared with.

T packed rows, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from pgrpo.attention.layout import PackedLayout


def attention_mask(layout: PackedLayout) -> Tensor:
    """[T, T] bool, True where the row may attend to the column, as the layout defines it."""
    starts = layout.cu_seqlens.tolist()
    prefixes = layout.cu_seqlens_prefix.tolist()
    groups = layout.cu_seqlens_group.tolist()
    total, first_suffix_row = starts[-1], layout.sizes.prefix_rows
    mask_TT = torch.zeros(total, total, dtype=torch.bool)
    for start, end in pairwise(starts):
        mask_TT[start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool).tril()
    for n in range(len(prefixes) - 1):
        rows = slice(first_suffix_row + groups[n], first_suffix_row + groups[n + 1])
        mask_TT[rows, prefixes[n] : prefixes[n + 1]] = True
    return mask_TT


def reference_attention(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layout: PackedLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention output [T, H, D] and log-sum-exp of the scaled scores [H, T], in the precision of the inputs."""
    repeats = q_THD.shape[1] // k_TKD.shape[1]
    k_THD = k_TKD.repeat_interleave(repeats, dim=1)
    v_THD = v_TKD.repeat_interleave(repeats, dim=1)
    scores_HTT = torch.einsum("thd,shd->hts", q_THD, k_THD) * scale
    mask_TT = attention_mask(layout).to(q_THD.device)
    scores_HTT = scores_HTT.masked_fill(~mask_TT, float("-inf"))
    out_THD = torch.einsum("hts,shd->thd", scores_HTT.softmax(-1), v_THD)
    return out_THD, scores_HTT.logsumexp(-1)
