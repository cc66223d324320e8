"""Chooses what the backward recomputes in each layer, how many layers stay gathered, and how much of a prefix may be kept, so that
an update fits the device."""

from __future__ import annotations

import math
from bisect import bisect_right
from contextlib import suppress
from typing import Any

from pgrpo.config import Config, ConfigError
from pgrpo.distributed.world import World
from pgrpo.placement.choices import engine_name
from pgrpo.placement.sizes import (
    HOST_SHARE,
    SLEEPING_VLLM_GIB,
    USABLE_SHARE,
    gpu_memory,
    host_memory,
    host_ranks,
    plan_sizes,
)
from pgrpo.placement.vllm_memory import awake_bounds, vllm_memory
from pgrpo.planning.flops import GIB, ModelDims
from pgrpo.planning.kept import cuts_groups
from pgrpo.planning.memory import memory_plan
from pgrpo.planning.recompute import LayerPlan, fewest_recomputed_layers, most_gathered
from pgrpo.types import Recompute


def layer_plan(config: Config, dims: ModelDims, world: World) -> LayerPlan:
    """How layers run in an update: on a GPU as its memory allows; on a CPU all stay gathered, and ``auto`` recomputes nothing."""
    mode, chunks = config.model.activation_checkpointing, config.model.mlp_chunks
    if world.device.type == "cpu":
        return LayerPlan(["none" if mode == "auto" else mode] * dims.layers, chunks or 1, dims.layers)
    sizes = plan_sizes(config, dims, world, world.device)
    if mode != "auto":
        return _with_gathered(config, dims, world, LayerPlan([mode] * dims.layers, chunks or 1))
    room = {"host_gib": _host_room(config, dims, world), "mlp_chunks": chunks}
    plan = fewest_recomputed_layers(dims, _capacity_gib(config, world), **room, **sizes)
    if cuts_groups(config) or not {*plan.recompute} & {"full", "offload"}:
        return _with_gathered(config, dims, world, plan)
    # Only what several groups share could be kept. Keys and values of whole prompts may not cost attention's outputs; they take
    # what memory is left.
    sizes["kept_tokens"] = 0
    return fewest_recomputed_layers(dims, _capacity_gib(config, world), **room, **sizes)._replace(stay_gathered=0)


def _with_gathered(config: Config, dims: ModelDims, world: World, plan: LayerPlan) -> LayerPlan:
    """The plan with as many layers staying gathered as memory is left for, beside a vLLM that is awake if it fits beside the plan
    without them: to sleep and to wake takes longer than to gather."""
    capacity, sizes = _capacity_gib(config, world), plan_sizes(config, dims, world, world.device)
    plan, awake = plan._replace(stay_gathered=0), _awake_gib(config, dims, world)
    if config.rollout.sleep == "never" or memory_plan(dims, **plan._asdict(), **sizes).peak + awake <= capacity:
        capacity -= awake
    return most_gathered(dims, capacity, plan, **sizes)


def _awake_gib(config: Config, dims: ModelDims, world: World) -> float:
    """GiB that vLLM takes where it stays awake during updates (``awake.py``), infinite if it cannot; 0 for another engine."""
    if engine_name(config, world.device) != "vllm":
        return 0.0
    with suppress(ConfigError):  # the engine says so itself
        if config.rollout.sleep == "never" or (
            config.rollout.sleep == "auto" and not vllm_memory(config, dims, world).offloaded
        ):
            return awake_bounds(config, dims, world)[0]
    return math.inf


def _host_room(config: Config, dims: ModelDims, world: World) -> float:
    """GiB of host memory for one rank's inputs of layers, beside all else of it that is there."""
    sizes: dict[str, Any] = {**plan_sizes(config, dims, world, world.device), "recompute": ["none"] * dims.layers}
    on_gpu: dict[str, Any] = {**sizes, "ref_offload": False, "teacher_offload": False}
    there, here = memory_plan(dims, **sizes), memory_plan(dims, **on_gpu)
    own = here.reference - there.reference + here.teacher - there.teacher
    own += 2 * here.gradients if config.optim.offload == "cpu" else 0.0
    if engine_name(config, world.device) == "vllm":  # pinned memory is kept
        with suppress(ConfigError):  # the engine says so itself
            own += vllm_memory(config, dims, world).offloaded_gib
    return max(0.0, HOST_SHARE * host_memory() / GIB / host_ranks(world) - own)


def _capacity_gib(config: Config, world: World) -> float:
    """GPU memory that the policy and its update may take."""
    capacity = USABLE_SHARE * gpu_memory(world.device) / GIB
    return capacity - (SLEEPING_VLLM_GIB if engine_name(config, world.device) == "vllm" else 0)


def update_gib(config: Config, dims: ModelDims, world: World, *, stay: bool = True) -> float:
    """GiB of this GPU that the policy takes at its peak: of a full micro-batch's backward, or of the optimizer step. ``stay``:
    whether the plan's layers stay gathered."""
    sizes, plan = plan_sizes(config, dims, world, world.device), layer_plan(config, dims, world)
    sizes["kept_tokens"] = keepable_tokens(config, dims, world)
    return memory_plan(dims, **(plan if stay else plan._replace(stay_gathered=0))._asdict(), **sizes).peak


def free_beside_policy(config: Config, dims: ModelDims, world: World) -> float:
    """GiB of this GPU that the policy leaves free between updates."""
    sizes = plan_sizes(config, dims, world, world.device)
    recompute: list[Recompute] = ["none"] * dims.layers
    resting = memory_plan(dims, **sizes, recompute=recompute).resting
    return USABLE_SHARE * gpu_memory(world.device) / GIB - resting


def keepable_tokens(config: Config, dims: ModelDims, world: World) -> int:
    """Tokens of the longest prefix that may be kept for several passes: on a GPU as many as the memory plan has room for."""
    sizes = plan_sizes(config, dims, world, world.device)
    wanted = sizes.pop("kept_tokens")
    if world.device.type == "cpu" or not wanted:
        return wanted
    plan = layer_plan(config, dims, world)._asdict()

    def update(tokens: int) -> float:
        return memory_plan(dims, **plan, **sizes, kept_tokens=tokens).update

    return bisect_right(range(1, wanted + 1), _capacity_gib(config, world), key=update)
