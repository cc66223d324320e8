"""Chooses what the backward recomputes in each layer: as little as the memory allows."""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

from pgrpo.planning.flops import ModelDims
from pgrpo.planning.memory import memory_plan
from pgrpo.types import Recompute


class LayerPlan(NamedTuple):
    """What the backward recomputes in each layer, and the parts of the rows in which MLPs that it recomputes are computed."""

    recompute: list[Recompute]
    mlp_chunks: int = 1


MLP_CHUNKS = (4, 16)
"""What is tried, in this order, where whole MLPs do not fit."""


def fewest_recomputed_layers(
    dims: ModelDims, capacity_gib: float, *, host_gib: float = 0.0, mlp_chunks: int | None = None, **sizes: Any
) -> LayerPlan:
    """Implements ``activation_checkpointing: auto``: the setting with the least recomputation whose memory plan fits.

    Tries ``matmuls`` in as few layers as possible; then ``attention`` in as few as possible, and ``full``; then MLPs in parts, with
    ``full`` in as few layers as possible, and then ``offload``, as far as ``host_gib`` of host memory go. Neither computes more in
    compiled layers, but ``offload`` moves inputs, and pins memory for them in the first update. Uncompiled layers and layers with
    a state compute parts once more, so there ``offload`` comes first. MLPs stay whole where parts spare no layer its ``offload``.
    If nothing fits, the plan with the lowest peak. The first layers recompute more than the last ones: the backward needs the
    activations of the last layers first, and frees them before all gradients exist.

    Args:
        mlp_chunks: the only number of parts that may be tried; None: any.
    """
    whole = (mlp_chunks or 1,)
    # With adapters a product is the sum of two, both of which ``matmuls`` keeps, and nothing keeps those of layers with a state.
    keeps_products = sizes.get("compiled") and not sizes.get("adapters") and not dims.state_elements
    steps: list[tuple[Recompute, Recompute, tuple[int, ...]]] = [
        ("attention", "none", whole),
        ("full", "attention", whole),
    ]
    if keeps_products:
        steps[:1] = [("matmuls", "none", whole), ("attention", "matmuls", whole)]
    if mlp_chunks or not dims.has_mlp or not sizes.get("compiled") or dims.state_elements:
        steps.append(("offload", "full", whole))
    else:
        steps.append(("full", "attention", MLP_CHUNKS[:1]))
    if mlp_chunks is None and dims.has_mlp:
        steps.extend(("offload", "full", (1, chunks)) for chunks in MLP_CHUNKS)
    tried: list[tuple[float, float, LayerPlan]] = []
    for more, less, fewest_first in steps:
        for count, chunks in product(range(dims.layers + 1), fewest_first):
            recompute: list[Recompute] = [more if layer < count else less for layer in range(dims.layers)]
            plan = memory_plan(dims, recompute=recompute, mlp_chunks=chunks, **sizes)
            if plan.host > host_gib:
                break
            tried.append((plan.peak, plan.update, LayerPlan(recompute, chunks)))
            if plan.peak <= capacity_gib:
                return tried[-1][-1]
    return min(tried, key=lambda one: one[:2])[-1]
