"""Short convolutions over a packed forest: each row is computed from the last rows of its path, wherever these lie. Of a kept first
node these are its last inputs, which come from the pass that computed it.

T packed rows, N nodes of one depth, B rows of a decoding batch, D channels of a convolution, W its width, C rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from pgrpo.attention.hook import current
from pgrpo.attention.layout import PackedLayout


class Functions(NamedTuple):
    """transformers' function for all rows, in PyTorch, and that for one row in decoding; what compiles, None for uncompiled."""

    chunk: Callable[..., Any]
    step: Callable[..., Any] | None
    compile: Callable[[Callable[..., Any]], Callable[..., Any]] | None


def convolve(
    layout: Any,
    layer: int,
    functions: Functions,
    x_1DT: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **_: Any,
) -> Tensor:
    """[1, D, T]: transformers' ``causal_conv1d_fn``, whose taps follow each row's path. ``layer``: its number, for
    the states of a rollout."""
    if isinstance(layout, PackedLayout):
        reach, kept = weight.shape[1] - 1, 0
        if current.keep is not None:  # a copy, which does not hold the inputs of all rows
            current.keep[-1].append(x_1DT[..., max(0, x_1DT.shape[2] - reach) :].clone())
        if current.front is not None:
            # Along rows of [T, D], as models' rows lie in memory: to other strides compiled code is other code.
            front_1TD = current.front[0].transpose(1, 2)
            x_1DT, kept = torch.cat([front_1TD, x_1DT.transpose(1, 2)], 1).transpose(1, 2), front_1TD.shape[1]
        return _forest_convolution(layout, functions, x_1DT, weight, bias, activation)[..., kept:]
    name = (layer, "convolution")
    if name not in layout.states:
        ends = np.array([node.end - 1 for node in layout.prompts.nodes])
        taps_NW = torch.from_numpy(_taps(layout.prompts, weight.shape[1] - 1)[:, ends].T).to(x_1DT.device)
        layout.states[name] = layout.for_rows(_gather(x_1DT, taps_NW).transpose(0, 1))
        return _forest_convolution(layout.prompts, functions, x_1DT, weight, bias, activation)
    seen_BDW = torch.cat([layout.states[name], x_1DT[0].T.unsqueeze(-1)], -1)
    layout.states[name] = seen_BDW[..., 1:]
    return _activated(_weighted(seen_BDW, weight, bias).T.unsqueeze(0), activation)


def _activated(x: Tensor, activation: str | None) -> Tensor:
    return x if activation is None else ACT2FN[activation](x)


def _forest_convolution(
    layout: PackedLayout,
    functions: Functions,
    x_1DT: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
) -> Tensor:
    name = "taps", weight.shape[1]  # the same in all layers of a batch
    if name not in layout.kept:
        rows_C, taps_CW = _first_rows(layout, weight.shape[1])
        layout.kept[name] = torch.from_numpy(rows_C).to(x_1DT.device), torch.from_numpy(taps_CW).to(x_1DT.device)
    if functions.compile is None:
        return _one_convolution(functions.chunk, x_1DT, weight, bias, activation, *layout.kept[name])
    return functions.compile(_one_convolution)(None, x_1DT, weight, bias, activation, *layout.kept[name])


def _one_convolution(
    function: Callable[..., Tensor] | None,
    x_1DT: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None,
    activation: str | None,
    rows_C: Tensor,
    taps_CW: Tensor,
) -> Tensor:
    """One convolution over all rows, right except in the first rows of a node, which are computed again from their own taps.
    Without transformers' ``function`` it is a sum of shifted rows: compiled code makes one kernel of it, without transposing."""
    out_1DT = _shifted(x_1DT, weight_DW, bias_D) if function is None else function(x_1DT, weight_DW, bias_D)
    again_CD = _weighted(_gather(x_1DT, taps_CW).transpose(0, 1), weight_DW, bias_D)
    out_1DT = out_1DT.index_copy(2, rows_C, again_CD.T.unsqueeze(0).to(out_1DT.dtype))
    return _activated(out_1DT, activation)


def _shifted(x_1DT: Tensor, weight_DW: Tensor, bias_D: Tensor | None) -> Tensor:
    dtype, (width, total) = torch.promote_types(x_1DT.dtype, torch.float32), (weight_DW.shape[1], x_1DT.shape[2])
    padded = torch.nn.functional.pad(x_1DT[0].T, (0, 0, width - 1, 0)).to(dtype)
    out_TD = reduce(torch.add, (padded[j : j + total] * weight_DW[:, j].to(dtype) for j in range(width)))
    return (out_TD if bias_D is None else out_TD + bias_D.to(dtype)).to(x_1DT.dtype).T.unsqueeze(0)


def _gather(x_1DT: Tensor, rows_CW: Tensor) -> Tensor:
    """[D, C, W] of the given rows; 0 for a row of -1."""
    found_DCW = x_1DT[0].index_select(1, rows_CW.clamp(min=0).flatten()).unflatten(1, rows_CW.shape)
    return found_DCW * (rows_CW >= 0)


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
    taps may be are there. The first two rows are always among them, so that compiled code, to which counts of 0 and 1 are other
    code, does not depend on the forest."""
    taps_WT, missing = _taps(layout, width), max(0, layout.front - (width - 1))
    adjacent_WT = np.maximum(np.arange(1 - width, 1)[:, None] + np.arange(taps_WT.shape[1]), -1)
    differs_T = (taps_WT != adjacent_WT).any(0)
    differs_T[missing : missing + 2] = True
    rows_C = np.flatnonzero(differs_T)
    return rows_C - missing, np.ascontiguousarray(np.maximum(taps_WT[:, rows_C].T - missing, -1))
