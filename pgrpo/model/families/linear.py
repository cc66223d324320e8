"""Layers that carry a state from token to token, over a packed forest: Gated DeltaNet (Qwen3.5, Qwen3-Next, OLMo hybrid; arXiv
2412.06464) and short convolutions (also alone, as in LFM2).

A prompt's state is shared by its completions as its keys are. No forward of a model is replaced: transformers mixes tokens in two
functions of each modelling file, ``causal_conv1d_fn`` and ``torch_chunk_gated_delta_rule``. ``follow_states`` replaces these by
functions that follow the layout of the forward that runs; without a layout they are transformers' own.

The delta rule runs depth by depth: a node starts from the final state of its parent, and the backward adds up the gradients of a
state over children. States are float32. On a CPU each depth is a few calls of transformers' own function in PyTorch, on a GPU one
call of fla-core's Triton kernel: the device decides, not what is installed.

T packed rows, N nodes of one depth, B rows of a decoding batch, D channels of a convolution, W its width, H heads, K and V sizes of
keys and values.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from pgrpo.attention.hook import current
from pgrpo.attention.layout import Node, PackedLayout, cumulative

CONV, RULE, STEP = "causal_conv1d_fn", "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"
CHUNK = 64
"""Tokens that the delta rule computes at once, as in transformers."""


class _Now:
    """The layer whose forward runs, for states of a rollout; and whether models without a layout must not use fla-core."""

    layer = 0
    plain = False


def follow_states(model: nn.Module) -> list[nn.Module]:
    """Let the linear-attention and convolution layers of a model follow the layouts of its forwards. Returns these layers."""
    found = [module for module in model.modules() if has_state(module)]
    for module in found:
        _replace_functions(sys.modules[type(module).__module__].__dict__)
        if _note_layer not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_note_layer)
    return found


def has_state(module: nn.Module) -> bool:
    """Whether the forward of this module itself calls the function of a short convolution (every such layer has one)."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and CONV in code.co_names and CONV in sys.modules[type(module).__module__].__dict__


def states_text(model: nn.Module, device: torch.device, *, compiled: bool) -> str:
    """What computes the layers with a state, for the log; empty for a model without any."""
    layers = [module for module in model.modules() if has_state(module)]
    rules = any(RULE in inspect.unwrap(type(layer).forward).__code__.co_names for layer in layers)
    by = "fla-core" if rules and device.type == "cuda" else "transformers' functions in PyTorch"
    return f"{len(layers)} layers with a state: by {by}{', not compiled' if compiled else ''}" if layers else ""


@contextmanager
def plain_functions() -> Iterator[None]:
    """Models without a layout compute in PyTorch inside this block, on a GPU too: to be compared with."""
    _Now.plain = True
    try:
        yield
    finally:
        _Now.plain = False


def _note_layer(module: Any, _: Any) -> None:
    _Now.layer = module.layer_idx


def _replace_functions(namespace: dict[str, Any]) -> None:
    for name, follow in ((CONV, _convolve), (RULE, _delta_rule)):
        original = namespace.get(name)
        if original is not None and not hasattr(original, "follows"):
            step = inspect.unwrap(namespace[STEP]) if name == RULE else None
            namespace[name] = _following(follow, original, step)


def _following(follow: Callable[..., Any], original: Any, step: Any) -> Callable[..., Any]:
    in_torch = inspect.unwrap(original)  # transformers decides at import by what is installed, not by the device

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if current.layout is not None:
            return follow(current.layout, (in_torch, step), x, *args, **kwargs)
        return (original if x.is_cuda and not _Now.plain else in_torch)(x, *args, **kwargs)

    run.follows = True  # pyright: ignore[reportFunctionMemberAccess]
    return run


# ---- short convolutions


def _convolve(
    layout: Any,
    functions: Any,
    x_1DT: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **_: Any,
) -> Tensor:
    """[1, D, T]: transformers' ``causal_conv1d_fn``, whose taps follow each row's path."""
    act = ACT2FN[activation] if activation is not None else lambda x: x
    if isinstance(layout, PackedLayout):
        return act(_forest_convolution(layout, functions[0], x_1DT, weight, bias))
    name = (_Now.layer, "convolution")
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
    rows_C, taps_CW = _kept(layout, ("taps", weight.shape[1]), lambda: _first_rows(layout, weight.shape[1]))
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
    """Rows whose taps are not the rows in front of them: [C], and their taps [C, W]."""
    taps_WT = _taps(layout, width)
    adjacent_WT = np.maximum(np.arange(1 - width, 1)[:, None] + np.arange(taps_WT.shape[1]), -1)
    rows_C = np.flatnonzero((taps_WT != adjacent_WT).any(0))
    return rows_C, taps_WT[:, rows_C].T


def _kept(layout: PackedLayout, name: Any, make: Callable[[], Any]) -> Any:
    """What is the same in all layers of a batch."""
    if name not in layout.kept:
        layout.kept[name] = make()
    return layout.kept[name]


# ---- the gated delta rule


class Bucket(NamedTuple):
    """Nodes of a depth that are one call on a CPU: padded to one length with rows that change no state.

    Attributes:
        nodes: [M] int64, their numbers in the depth.
        rows: [M * length] int64, their rows in the depth; row 0 for padding.
        inside: [M, length] bool, False for padding.
        places: [rows] int64, where these are in the padded [M * length].
        chunk: tokens computed at once.
    """

    nodes: Tensor
    rows: Tensor
    inside: Tensor
    places: Tensor
    chunk: int


class Depth(NamedTuple):
    """The nodes of one depth.

    Attributes:
        rows: their rows in the packed batch.
        parents: [N] int64, their parents' numbers in the depth above; None for roots.
        count: N.
        filled: [N'] int64, the numbers of those that have rows.
        cu_seqlens, cu_seqlens_cpu: [N' + 1] int64, where these begin, on the device and on the CPU.
        buckets: how a CPU computes them; none on a GPU.
        row_order, node_order: where each row and node of the depth is in the results of all buckets.
    """

    rows: slice
    parents: Tensor | None
    count: int
    filled: Tensor
    cu_seqlens: Tensor
    cu_seqlens_cpu: Tensor
    buckets: list[Bucket]
    row_order: Tensor
    node_order: Tensor


def _depths(layout: PackedLayout, device: torch.device) -> list[Depth]:
    made: list[Depth] = []
    above: dict[int, int] = {}
    for _, group in groupby(enumerate(layout.nodes), key=lambda pair: pair[1].depth):
        numbers, nodes = zip(*group, strict=True)
        parents = [above[node.parent] for node in nodes] if made else None
        above = {number: i for i, number in enumerate(numbers)}
        made.append(_depth(nodes, parents, device))
    return made


def _depth(nodes: tuple[Node, ...], parents: list[int] | None, device: torch.device) -> Depth:
    first = nodes[0].start
    filled = [i for i, node in enumerate(nodes) if node.length]
    by_length: dict[int, list[int]] = {}
    for i in filled if device.type != "cuda" else ():
        by_length.setdefault(_padded(nodes[i].length), []).append(i)
    buckets, rows, order = [], [], [i for i, node in enumerate(nodes) if not node.length]
    for length, members in by_length.items():
        own = [np.arange(nodes[i].start, nodes[i].end) - first for i in members]
        padded = np.stack([np.pad(r, (0, length - len(r)), constant_values=-1) for r in own])
        inside = padded >= 0
        buckets.append(
            Bucket(
                torch.tensor(members, device=device),
                torch.from_numpy(padded.clip(0).ravel()).to(device),
                torch.from_numpy(inside).to(device),
                torch.from_numpy(np.flatnonzero(inside)).to(device),
                min(CHUNK, length),
            )
        )
        rows.append(np.concatenate(own))
        order += members
    cu_seqlens = cumulative([nodes[i].length for i in filled], torch.device("cpu")).long()
    row_order = np.argsort(np.concatenate([np.zeros(0, dtype=np.int64), *rows]))
    return Depth(
        slice(first, nodes[-1].end),
        None if parents is None else torch.tensor(parents, device=device),
        len(nodes),
        torch.tensor(filled, dtype=torch.int64, device=device),
        cu_seqlens.to(device),
        cu_seqlens,
        buckets,
        torch.from_numpy(row_order).to(device),
        torch.tensor(order).argsort().to(device),
    )


def _padded(length: int) -> int:
    """Of at most a chunk: the next power of two, from 8 on; of more: whole chunks."""
    return max(8, 1 << (length - 1).bit_length()) if length <= CHUNK else -(-length // CHUNK) * CHUNK


def _delta_rule(
    layout: Any,
    functions: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' ``torch_chunk_gated_delta_rule``: [1, T, H, K] queries and keys, [1, T, HV, V] values, [1, T, HV] g and beta
    -> [1, T, HV, V]. Its last state is not needed by models without a cache."""
    xs, options = (query, key, value, g, beta), {"use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel}
    if isinstance(layout, PackedLayout):
        return _forest_rule(layout, functions[0], xs, options)[0], None
    name = (_Now.layer, "delta rule")
    if name not in layout.states:
        out, states = _forest_rule(layout.prompts, functions[0], xs, options, final=True)
        layout.states[name] = layout.for_rows(states)
        return out, None
    q, k, v, g, beta = (x.transpose(0, 1) for x in xs)  # one token a row
    out, layout.states[name] = functions[1](
        q, k, v, g=g, beta=beta, initial_state=layout.states[name], output_final_state=True, **options
    )
    return out.transpose(0, 1), None


def _forest_rule(
    layout: PackedLayout, function: Any, xs: tuple[Tensor, ...], options: dict[str, Any], *, final: bool = False
) -> tuple[Tensor, Tensor]:
    """Outputs [1, T, HV, V] of all rows; and final states [N, HV, K, V] of the deepest nodes if ``final``."""
    depths: list[Depth] = _kept(layout, "depths", lambda: _depths(layout, xs[0].device))
    run, outs, states = _on_gpu if xs[0].is_cuda else _in_buckets, [], None
    for depth in depths:
        if depth.parents is None:
            key, value = xs[1], xs[2]
            dtype = torch.promote_types(key.dtype, torch.float32)
            initial = key.new_zeros(depth.count, value.shape[2], key.shape[3], value.shape[3], dtype=dtype)
        else:
            assert states is not None
            initial = states.index_select(0, depth.parents)
        out, states = run(
            depth, function, tuple(x[0, depth.rows] for x in xs), initial, options, final or depth is not depths[-1]
        )
        outs.append(out)
    return torch.cat(outs).unsqueeze(0), states  # pyright: ignore[reportReturnType]


def _in_buckets(
    depth: Depth, function: Any, xs: tuple[Tensor, ...], initial: Tensor, options: dict[str, Any], final: bool
) -> tuple[Tensor, Tensor | None]:
    """Calls of nodes of about one length. Padding has g = 0 (no decay) and beta = 0 (no update)."""
    outs, is_empty = [], torch.ones(depth.count, dtype=torch.bool, device=initial.device)
    states = [initial[is_empty.index_fill(0, depth.filled, False)]]
    for bucket in depth.buckets:
        q, k, v, g, beta = (x.index_select(0, bucket.rows).unflatten(0, bucket.inside.shape) for x in xs)
        g, beta = (x * bucket.inside.unsqueeze(-1) for x in (g, beta))
        start = initial.index_select(0, bucket.nodes)
        out, state = function(
            q, k, v, g=g, beta=beta, chunk_size=bucket.chunk, initial_state=start, output_final_state=True, **options
        )
        outs.append(out.flatten(0, 1).index_select(0, bucket.places))
        states.append(state)
    out = torch.cat(outs).index_select(0, depth.row_order) if outs else xs[2]
    return out, torch.cat(states).index_select(0, depth.node_order) if final else None


def _on_gpu(
    depth: Depth, _: Any, xs: tuple[Tensor, ...], initial: Tensor, options: dict[str, Any], final: bool
) -> tuple[Tensor, Tensor | None]:
    """One call of fla-core."""
    if not len(depth.filled):
        return xs[2], initial if final else None
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # pyright: ignore[reportMissingImports]

    q, k, v, g, beta = (x.unsqueeze(0).contiguous() for x in xs)
    out, states = chunk_gated_delta_rule(
        q, k, v, g=g, beta=beta, initial_state=initial.index_select(0, depth.filled), output_final_state=final,
        cu_seqlens=depth.cu_seqlens, cu_seqlens_cpu=depth.cu_seqlens_cpu, **options,
    )  # fmt: skip
    return out[0], initial.index_copy(0, depth.filled, states.to(initial.dtype)) if final else None
