"""The gated delta rule (Gated DeltaNet, arXiv 2412.06464) over a packed forest.

It runs depth by depth: a node starts from the final state of its parent, and the backward adds up the gradients of a
state over children. States are float32. On a CPU each depth is a few calls of transformers' own function in PyTorch, on a GPU one
call of fla-core's Triton kernel: the device decides, not what is installed.

T packed rows, N nodes of one depth, H heads, K and V sizes of keys and values.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pgrpo.attention.hook import current
from pgrpo.attention.layout import Node, PackedLayout, cumulative
from pgrpo.model.families.convolution import Functions

CHUNK = 64
"""Tokens that the delta rule computes at once, as in transformers."""


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
    here = [node._replace(start=node.start - layout.front) for node in layout.nodes]
    for _, group in groupby(enumerate(here), key=lambda pair: pair[1].depth):
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


def delta_rule(
    layout: Any,
    layer: int,
    functions: Functions,
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
        front = current.front[1] if current.front is not None else None
        # A node alone may be a prefix to keep. Not decided by ``keep``, as a checkpoint must compute again what it computed.
        out, states = _forest_rule(layout, functions.chunk, xs, options, front, final=len(layout.nodes) == 1)
        if current.keep is not None:
            current.keep[-1].append(states)
        return out, None
    name = (layer, "delta rule")
    if name not in layout.states:
        out, states = _forest_rule(layout.prompts, functions.chunk, xs, options, final=True)
        layout.states[name] = layout.for_rows(states)
        return out, None
    q, k, v, g, beta = (x.transpose(0, 1) for x in xs)  # one token a row
    assert functions.step is not None
    out, layout.states[name] = functions.step(
        q, k, v, g=g, beta=beta, initial_state=layout.states[name], output_final_state=True, **options
    )
    return out.transpose(0, 1), None


def _forest_rule(
    layout: PackedLayout,
    function: Any,
    xs: tuple[Tensor, ...],
    options: dict[str, Any],
    front: Tensor | None = None,
    *,
    final: bool = False,
) -> tuple[Tensor, Tensor]:
    """Outputs [1, T, HV, V] of all rows; and final states [N, HV, K, V] of the deepest nodes if ``final``. ``front``: the final
    state [1, HV, K, V] of a kept first node, which has no rows here."""
    if "depths" not in layout.kept:  # the same in all layers of a batch
        layout.kept["depths"] = _depths(layout, xs[0].device)
    depths: list[Depth] = layout.kept["depths"]
    run, outs, states = _on_gpu if xs[0].is_cuda else _in_buckets, [], front
    for depth in depths[layout.front > 0 :]:
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
