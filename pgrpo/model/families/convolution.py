"""Short convolutions over a packed forest: each row is computed from the last rows of its path, wherever these lie. Of a kept first
node these are its last inputs, which come from the pass that computed it.

T packed rows, N nodes of one depth, B rows of a decoding batch, D channels of a convolution, W its width, C rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from pgrpo.attention.hook import current
from pgrpo.attention.layout import PackedLayout


def convolve(
    layout: Any,
    layer: int,
    functions: Any,
    x_1DT: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **_: Any,
) -> Tensor:
    """[1, D, T]: transformers' ``causal_conv1d_fn``, whose taps follow each row's path. ``layer``: its number, for
    the states of a rollout."""
    act = ACT2FN[activation] if activation is not None else lambda x: x
    if isinstance(layout, PackedLayout):
        reach, kept = weight.shape[1] - 1, 0
        if current.keep is not None:  # a copy, which does not hold the inputs of all rows
            current.keep[-1].append(x_1DT[..., max(0, x_1DT.shape[2] - reach) :].clone())
        if current.front is not None:
            x_1DT, kept = torch.cat([current.front[0], x_1DT], -1), current.front[0].shape[2]
        return act(_forest_convolution(layout, functions[0], x_1DT, weight, bias)[..., kept:])
    name = (layer, "convolution")
    if name not in layout.states:
        ends = np.array([node.end - 1 for node in layout.prompts.nodes])
        taps_NW = _taps(layout.prompts, weight.shape[1] - 1)[:, ends].T
        layout.states[name] = layout.for_rows(_gather(x_1DT, taps_NW).transpose(0, 1))
        return act(_forest_convolution(layout.prompts, functions[0], x_1DT, weight, bias))
    seen_BDW = torch.cat([layout.states[name], x_1DT[0].T.unsqueeze(-1)], -1)
    layout.states[name] = seen_BDW[..., 1:]
    return act(_weighted(seen_BDW, weight, bias).T.unsqueeze(0))


def _forest_convolution(
    layout: PackedLayout, function: Callable[..., Tensor], x_1DT: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """One convolution over all rows, right except in the first rows of a node, which are computed again from their own taps."""
    out_1DT = function(x_1DT, weight, bias)
    name = "taps", weight.shape[1]  # the same in all layers of a batch
    if name not in layout.kept:
        layout.kept[name] = _first_rows(layout, weight.shape[1])
    rows_C, taps_CW = layout.kept[name]
    if not len(rows_C):
        return out_1DT
    again_CD = _weighted(_gather(x_1DT, taps_CW).transpose(0, 1), weight, bias)
    return out_1DT.index_copy(2, torch.from_numpy(rows_C).to(x_1DT.device), again_CD.T.unsqueeze(0).to(out_1DT.dtype))


def _gather(x_1DT: Tensor, rows_CW: np.ndarray) -> Tensor:
    """[D, C, W] of the given rows; 0 for a row of -1."""
    rows = torch.from_numpy(rows_CW).to(x_1DT.device)
    found_DCW = x_1DT[0].index_select(1, rows.clamp(min=0).flatten()).unflatten(1, rows.shape)
    return found_DCW * (rows >= 0)


def _weighted(seen_CDW: Tensor, weight_DW: Tensor, bias_D: Tensor | None) -> Tensor:
    dtype = torch.promote_types(seen_CDW.dtype, torch.float32)
    out_CD = (seen_CDW.to(dtype) * weight_DW.to(dtype)).sum(-1)
    return (out_CD if bias_D is None else out_CD + bias_D.to(dtype)).to(seen_CDW.dtype)


def _taps(layout: PackedLayout, width: int) -> np.ndarray:
    """[width, T] int64: rows of the last ``width`` tokens of each row's path, the row itself last; -1 before the path's start."""
    total = sum(node.length for node in layout.nodes)
    before = np.arange(-1, total)  # the row before each row of its path; of row -1 row -1
    last: list[int] = []  # of each node's path
    for node in layout.nodes:
        above = last[node.parent] if node.parent >= 0 else -1
        if node.length:
            before[node.start] = above
        last.append(node.end - 1 if node.length else above)
    taps = [np.arange(total)]
    before = np.append(before[:total], -1)
    for _ in range(width - 1):
        taps.insert(0, before[taps[0]])
    return np.stack(taps)[-width:] if width else np.zeros((0, total), dtype=np.int64)


def _first_rows(layout: PackedLayout, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose taps are not the rows in front of them: [C], and their taps [C, W]. Of a kept first node only the last rows that
    taps may be are there."""
    taps_WT = _taps(layout, width)
    adjacent_WT = np.maximum(np.arange(1 - width, 1)[:, None] + np.arange(taps_WT.shape[1]), -1)
    rows_C = np.flatnonzero((taps_WT != adjacent_WT).any(0))
    missing = max(0, layout.front - (width - 1))
    return rows_C - missing, np.maximum(taps_WT[:, rows_C].T - missing, -1)
