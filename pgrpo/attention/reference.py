"""Dense masked softmax over a packed batch: slow and obvious. This is the specification that every fast path is compared with.

T packed rows, H query heads, K key/value heads, D head dim of keys, Dv that of values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pgrpo.attention.layout import PackedLayout


def attention_mask(layout: PackedLayout, window: int | None = None) -> Tensor:
    """[T, T] bool, True where the row may attend to the column, as the layout defines it."""
    nodes = layout.nodes
    total = sum(node.length for node in nodes)
    mask_TT = torch.zeros(total, total, dtype=torch.bool)
    position_T = torch.cat([node.offset + torch.arange(node.length) for node in nodes] or [torch.zeros(0)])
    for node in nodes:
        rows = slice(node.start, node.end)
        mask_TT[rows, rows] = torch.ones(node.length, node.length, dtype=torch.bool).tril()
        parent = node.parent
        while parent >= 0:
            mask_TT[rows, nodes[parent].start : nodes[parent].end] = True
            parent = nodes[parent].parent
    if window is not None:
        mask_TT &= position_T[:, None] - position_T < window
    return mask_TT


def reference_attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    layout: PackedLayout,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention output [T, H, Dv] and log-sum-exp of the scores [H, T], in the precision of the inputs. Arguments as those of
    ``grouped_attention``."""
    repeats = q_THD.shape[1] // k_TKD.shape[1]
    k_THD, v_THD = (x_TKD.repeat_interleave(repeats, dim=1) for x_TKD in (k_TKD, v_TKD))
    scores_HTT = torch.einsum("thd,shd->hts", q_THD, k_THD) * scale
    if softcap:
        scores_HTT = softcap * torch.tanh(scores_HTT / softcap)
    mask_TT = attention_mask(layout, window).to(q_THD.device)
    scores_HTT = scores_HTT.masked_fill(~mask_TT, float("-inf"))
    if sinks_H is not None:  # one more column, whose value is 0
        column_HT1 = sinks_H.to(scores_HTT)[:, None, None].expand(-1, scores_HTT.shape[1], 1)
        scores_HTT = torch.cat([scores_HTT, column_HT1], -1)
    weights_HTT = scores_HTT.softmax(-1)[..., : len(mask_TT)]
    return torch.einsum("hts,shd->thd", weights_HTT, v_THD), scores_HTT.logsumexp(-1)
