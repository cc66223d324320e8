"""Decides whether vLLM keeps its GPU memory during updates (``rollout.sleep``), which saves the time to wake and to fall asleep.

The update comes first: layers recompute what they would beside a sleeping vLLM, and prefixes are kept as there. vLLM stays awake
where it fits beside that, and layers stay gathered in what memory is left.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from pgrpo.config import Config, ConfigError
from pgrpo.distributed.world import World
from pgrpo.placement.layers import update_gib
from pgrpo.placement.sizes import SLEEPING_VLLM_GIB, USABLE_SHARE, gpu_memory, has_updates, most_rows
from pgrpo.placement.vllm_memory import VLLMMemory, awake_bounds, memory_text, useful_gib, vllm_gib, vllm_memory
from pgrpo.planning.flops import GIB, ModelDims


class EngineMemory(NamedTuple):
    """vLLM's memory, whether it is freed during updates, and why."""

    memory: VLLMMemory
    sleeps: bool
    why: str


def engine_memory(config: Config, dims: ModelDims, world: World) -> EngineMemory:
    """vLLM's part of this GPU by ``rollout.sleep``. With ``auto`` it stays awake where so much fits beside the update, as the
    memory plan has it, that no completion is ever preempted, and a sleeping vLLM would move nothing of the policy to host memory.

    Raises:
        ConfigError: it does not fit, asleep or awake.
    """
    mode = config.rollout.sleep
    if world.device.type == "cpu":
        if mode == "always":
            raise ConfigError("rollout.sleep: always: vLLM cannot sleep on a CPU: leave it out")
        return EngineMemory(vllm_memory(config, dims, world), False, "")
    if mode == "never":
        return _never(config, dims, world)
    asleep = vllm_memory(config, dims, world)
    if mode == "always":
        return EngineMemory(asleep, True, "rollout.sleep=always")
    if asleep.offloaded:
        return EngineMemory(asleep, True, "it samples in memory of the policy's")
    least, most = awake_bounds(config, dims, world)
    if math.isinf(least):
        return EngineMemory(asleep, True, "with tools, images or states there is no bound to what its cache can use")
    room, update = _room_gib(config, dims, world)
    if room < least:
        update = update_gib(config, dims, world, stay=False)  # no layer stays gathered at vLLM's cost
        return EngineMemory(asleep, True, f"its {least:.1f} GiB and the update's {update:.1f} do not fit side by side")
    return EngineMemory(VLLMMemory(_share(min(room, most), world)), False, _fits(update))


def _never(config: Config, dims: ModelDims, world: World) -> EngineMemory:
    if config.rollout.offload_policy == "always":
        raise ConfigError(
            "rollout.sleep: never: with rollout.offload_policy=always vLLM uses memory that updates need: leave one of them out"
        )
    room, update = _room_gib(config, dims, world)
    least, most = vllm_gib(config, dims, config.rollout.group_size), useful_gib(config, dims, world)
    if (share := config.rollout.gpu_memory_utilization) is not None:
        vllm_memory(config, dims, world)  # refuses a share that is too small
        least, most = awake_bounds(config, dims, world)
    if room < least:
        total = gpu_memory(world.device) / GIB
        what = "rollout.gpu_memory_utilization" if share is not None else "its weights and one group"
        who, more = "the policy", ""
        if has_updates(config):
            who = "the update"
            more = f", or lower train.token_budget below {most_rows(config)}, or set "
            more += "model.activation_checkpointing=attention or optim.offload=cpu"
        raise ConfigError(
            f"rollout.sleep: never: of {total:.0f} GiB {who} takes {update:.1f}, and CUDA, graphs and libraries "
            f"{total - update - room:.1f}: {max(0.0, room):.1f} are left for vLLM, which needs {least:.1f} ({what}): "
            f"leave it out{more}"
        )
    return EngineMemory(VLLMMemory(_share(min(room, most), world)), False, _fits(update))


def _room_gib(config: Config, dims: ModelDims, world: World) -> tuple[float, float]:
    """GiB of this GPU that are free at an update's peak, and those that it takes: without updates the policy by itself."""
    update = update_gib(config, dims, world)
    return USABLE_SHARE * gpu_memory(world.device) / GIB - SLEEPING_VLLM_GIB - update, update


def _share(gib: float, world: World) -> float:
    return gib * GIB / gpu_memory(world.device)


def _fits(update: float) -> str:
    return f"the update's {update:.1f} GiB fit beside it"


def vllm_text(config: Config, dims: ModelDims, world: World) -> str:
    """vLLM's part of the GPUs, in words, and whether it sleeps."""
    memory, sleeps, why = engine_memory(config, dims, world)
    text = memory_text(config, dims, world, memory)
    return f"{text}; {'asleep' if sleeps else 'awake'} during updates ({why})" if why else text
