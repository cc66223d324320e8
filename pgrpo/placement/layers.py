"""Chooses what the backward recomputes in each layer, and how much of a prefix may be kept, so that an update fits the device."""

from __future__ import annotations

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
from pgrpo.placement.vllm_memory import vllm_memory
from pgrpo.planning.flops import GIB, ModelDims
from pgrpo.planning.kept import cuts_groups
from pgrpo.planning.memory import memory_plan
from pgrpo.planning.recompute import LayerPlan, fewest_recomputed_layers
from pgrpo.types import Recompute


def layer_plan(config: Config, dims: ModelDims, world: World) -> LayerPlan:
    """What the backward recomputes in each layer, and the parts in which MLPs are computed."""
    mode, chunks = config.model.activation_checkpointing, config.model.mlp_chunks
    if mode != "auto":
        return LayerPlan([mode] * dims.layers, chunks or 1)
    if world.device.type == "cpu":
        return LayerPlan(["none"] * dims.layers, chunks or 1)
    sizes = plan_sizes(config, dims, world, world.device)
    room = {"host_gib": _host_room(config, dims, world), "mlp_chunks": chunks}
    plan = fewest_recomputed_layers(dims, _capacity_gib(config, world), **room, **sizes)
    if not cuts_groups(config) and {*plan.recompute} & {"full", "offload"}:
        # Only what several groups share could be kept. Keys and values of whole prompts may not cost attention's outputs.
        sizes["kept_tokens"] = 0
        plan = fewest_recomputed_layers(dims, _capacity_gib(config, world), **room, **sizes)
    return plan


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


def update_gib(config: Config, dims: ModelDims, world: World) -> float:
    """GiB of this GPU that the policy takes at its peak: of a full micro-batch's backward, or of the optimizer step."""
    sizes = plan_sizes(config, dims, world, world.device)
    sizes["kept_tokens"] = keepable_tokens(config, dims, world)
    recompute, chunks = layer_plan(config, dims, world)
    return memory_plan(dims, recompute=recompute, mlp_chunks=chunks, **sizes).peak


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
    recompute, chunks = layer_plan(config, dims, world)

    def update(tokens: int) -> float:
        return memory_plan(dims, recompute=recompute, mlp_chunks=chunks, **sizes, kept_tokens=tokens).update

    return bisect_right(range(1, wanted + 1), _capacity_gib(config, world), key=update)
