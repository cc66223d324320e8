"""Chooses what the backward recomputes in each layer, and how many layers stay gathered, by what the memory allows."""

from __future__ import annotations

from bisect import bisect_right
from itertools import product
from typing import Any, NamedTuple

from pgrpo.planning.flops import ModelDims
from pgrpo.planning.memory import memory_plan
from pgrpo.types import Recompute


class LayerPlan(NamedTuple):
    """How layers run in an update.

    Attributes:
        recompute: what the backward recomputes in each layer.
        mlp_chunks: parts of the rows in which MLPs that it recomputes are computed.
        stay_gathered: number of layers, the first ones, whose weights FSDP2 gathers, and casts, once an update. It gathers the
            others for each forward and each backward of a micro-batch.
    """

    recompute: list[Recompute]
    mlp_chunks: int = 1
    stay_gathered: int = 0


MLP_CHUNKS = (4, 16)
"""What is tried, in this order, where whole MLPs do not fit."""


def fewest_recomputed_layers(
    dims: ModelDims, capacity_gib: float, *, host_gib: float = 0.0, mlp_chunks: int | None = None, **sizes: Any
) -> LayerPlan:
    """Implements ``activation_checkpointing: auto``: the first setting that fits by its memory plan, of these, the fastest first.

    1. All layers stay gathered, or as many as a rollout has room for, with ``matmuls`` in as few as possible.
    2. None stays gathered, until ``most_gathered`` fills memory that is left: ``matmuls`` in all, and then ``attention`` in as few
       as possible, and ``full``.
    3. MLPs in parts, with ``full`` in as few layers as possible, and then ``offload``, as far as ``host_gib`` of host memory go.

    Where there is no ``matmuls`` (layers that are not compiled, LoRA, layers with a state), nothing is recomputed instead.

    To gather a layer for every forward and backward takes longer, for the memory that it frees, than to compute again what lies
    between its products, and about as long as to compute products again. Parts and ``offload`` compute nothing more in compiled
    layers, but ``offload`` moves inputs, and pins memory for them in the first update. Uncompiled layers and layers with a state
    compute parts once more, so there ``offload`` comes first. MLPs stay whole where parts spare no layer its ``offload``.

    If nothing fits, the plan with the lowest peak. The first layers recompute more than the last ones: the backward needs the
    activations of the last layers first, and frees them before all gradients exist.

    Args:
        mlp_chunks: the only number of parts that may be tried; None: any.
    """
    whole = (mlp_chunks or 1,)
    # With adapters a product is the sum of two, both of which ``matmuls`` keeps, and nothing keeps those of layers with a state.
    keeps_products = sizes.get("compiled") and not sizes.get("adapters") and not dims.state_elements
    least: Recompute = "matmuls" if keeps_products else "none"
    steps: list[tuple[Recompute, Recompute, tuple[int, ...]]] = [
        ("attention", least, whole),
        ("full", "attention", whole),
    ]
    if mlp_chunks or not dims.has_mlp or not sizes.get("compiled") or dims.state_elements:
        steps.append(("offload", "full", whole))
    else:
        steps.append(("full", "attention", MLP_CHUNKS[:1]))
    if mlp_chunks is None and dims.has_mlp:
        steps.extend(("offload", "full", (1, chunks)) for chunks in MLP_CHUNKS)
    tried: list[tuple[float, float, LayerPlan]] = []

    def rollout(count: int) -> float:
        nothing: list[Recompute] = ["none"] * dims.layers
        return memory_plan(dims, recompute=nothing, stay_gathered=count, **sizes).rollout

    # Recomputation makes no room in a rollout of the embedded engine.
    most = bisect_right(range(1, dims.layers + 1), capacity_gib, key=rollout)
    every = [(least, "none", whole, most), *((*step, 0) for step in steps)]
    for more, less, fewest_first, stay_gathered in every:
        for count, chunks in product(range(dims.layers + 1), fewest_first):
            recompute: list[Recompute] = [more if layer < count else less for layer in range(dims.layers)]
            plan = LayerPlan(recompute, chunks, stay_gathered)
            memory = memory_plan(dims, **plan._asdict(), **sizes)
            if memory.host > host_gib:
                break
            tried.append((memory.peak, memory.update, plan))
            if memory.peak <= capacity_gib:
                return plan
    return min(tried, key=lambda one: one[:2])[-1]


def most_gathered(dims: ModelDims, capacity_gib: float, plan: LayerPlan, **sizes: Any) -> LayerPlan:
    """The plan with as many layers staying gathered as fit; none if nothing fits."""
    for count in range(dims.layers, 0, -1):
        more = plan._replace(stay_gathered=count)
        if memory_plan(dims, **more._asdict(), **sizes).peak <= capacity_gib:
            return more
    return plan
