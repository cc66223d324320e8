"""Shares a GPU's memory between the policy and a vLLM that sleeps during updates, so that they use it in turn (``awake.py``: where
it need not sleep)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from pgrpo.config import Config, ConfigError
from pgrpo.distributed.world import World
from pgrpo.placement.choices import compute_dtype
from pgrpo.placement.sizes import (
    HOST_SHARE,
    SLEEPING_VLLM_GIB,
    USABLE_SHARE,
    gpu_memory,
    has_updates,
    host_memory,
    host_ranks,
    plan_sizes,
)
from pgrpo.planning.flops import GIB, ModelDims
from pgrpo.planning.memory import MemoryPlan, memory_plan
from pgrpo.rollout.vllm import start as vllm_start

VLLM_ACTIVATIONS_GIB = 2.0
"""GPU memory within vLLM's share that is neither weights nor cache: activations of its largest prefill."""
VLLM_BUFFERS_GIB = 1.5
"""GPU memory within vLLM's share beside weights, cache and the activations of ``just_enough_gib``: libraries, its own buffers, and
its estimate of its CUDA graphs, which some of its model runners take from there."""
PREFILL_ROWS = 16_384
"""The most tokens that vLLM computes at once by default; on A100s, and on GPUs below 70 GiB, it is half."""
VLLM_BLOCK_TOKENS = 16
UNCOUNTED_GIB, SLACK = 8.0, 1.25
"""Added to what vLLM's weights and cache can use, and by which that is multiplied before: activations, what is rounded up."""
SAMPLER_BYTES = 16
"""Of each logit while vLLM samples: at its start it tries as many rows as it may decode at once."""
CPU_SHARE = 0.2
"""Share of the host's memory for vLLM's weights, keys and values where there is no GPU."""


class VLLMMemory(NamedTuple):
    """vLLM's part of a GPU's memory.

    Attributes:
        share: of the GPU's memory, for weights, keys and values (vLLM's ``gpu_memory_utilization``).
        offloaded: parts of the memory plan that are in host memory while vLLM samples: ``weights``, ``moments``.
        offloaded_gib: how much of them is.
        staying_gib: how much of them stays.
    """

    share: float
    offloaded: tuple[str, ...] = ()
    offloaded_gib: float = 0.0
    staying_gib: float = 0.0

    @property
    def text(self) -> str:
        of = f" of {self.offloaded_gib + self.staying_gib:.1f}" if self.staying_gib else ""
        away = f", which gets the policy's {' and '.join(self.offloaded)} out of its way ({self.offloaded_gib:.1f}{of} GiB)"
        return f"gpu_memory_utilization {self.share:.2f}{away if self.offloaded else ''}"


def vllm_memory(config: Config, dims: ModelDims, world: World) -> VLLMMemory:
    """What vLLM gets of this GPU if it sleeps during updates: ``rollout.gpu_memory_utilization``; unless it is set, what the policy
    leaves free between updates, from the memory plan, but no more than it can use. With ``rollout.offload_policy=auto`` as little
    of the policy moves to host memory meanwhile as makes room for all completions that are sampled at once, at their longest; if
    there is never room, all that can. Of the last part that moves, what ``just_enough_gib`` does not need stays.

    Raises:
        ConfigError: the engine's weights and one group do not fit into it.
    """
    rollout = config.rollout
    if world.device.type == "cpu":
        return VLLMMemory(rollout.gpu_memory_utilization or CPU_SHARE)
    total = gpu_memory(world.device) / GIB
    sizes = plan_sizes(config, dims, world, world.device)
    sizes["recompute"] = ["none"] * dims.layers  # which matters for updates only
    wanted = vllm_gib(config, dims, vllm_start.completions_at_once(config, world.size)) + VLLM_ACTIVATIONS_GIB
    enough = max(wanted, just_enough_gib(config, dims, world))
    if rollout.gpu_memory_utilization is not None:
        wanted = enough = rollout.gpu_memory_utilization * total
    free, offloaded, plan = 0.0, (), memory_plan(dims, **sizes)
    choices = _offload_choices(config, plan, world)
    for offloaded in choices:
        plan = memory_plan(dims, **sizes, offloaded=offloaded)
        free = USABLE_SHARE * total - SLEEPING_VLLM_GIB - plan.resting
        if free >= wanted:
            break
    stays = min(max(0.0, free - enough), plan.offloaded) if rollout.offload_policy == "auto" else 0.0
    moves = offloaded, plan.offloaded - stays, stays
    if rollout.gpu_memory_utilization is not None:
        if wanted < (least := vllm_gib(config, dims, 1)):
            raise ConfigError(
                f"rollout.gpu_memory_utilization: {rollout.gpu_memory_utilization:g} of {total:.0f} GiB is {wanted:.1f}; vLLM "
                f"needs {least:.1f} for its weights and one sample of {config.max_sample_tokens} tokens: raise it, or share an "
                "engine between more GPUs (rollout.tensor_parallel_size)"
            )
        return VLLMMemory(rollout.gpu_memory_utilization, *moves)
    if free < (needed := vllm_gib(config, dims, rollout.group_size)):
        host = ""
        if rollout.offload_policy == "auto" and choices == [()]:
            host = f" (host memory of {host_memory() / GIB:.0f} GiB has no room for them)"
        raise ConfigError(
            f"rollout.gpu_memory_utilization: beside the policy's {plan.resting:.0f} GiB of {total:.0f}{host}, and "
            f"{total - USABLE_SHARE * total + SLEEPING_VLLM_GIB:.0f} for CUDA, its graphs and libraries, "
            f"{max(0, free):.0f} are left for vLLM, which needs {needed:.0f} for its weights and one group of prompts of "
            f"{config.data.max_prompt_tokens} tokens: {_less_of_the_policy(config)}use more GPUs "
            "(rollout.tensor_parallel_size), or lower rollout.max_completion_tokens"
        )
    return VLLMMemory(min(free - stays, useful_gib(config, dims, world)) / total, *moves)


def useful_gib(config: Config, dims: ModelDims, world: World) -> float:
    """GiB of a GPU beyond which vLLM's cache has nothing to hold, generously: an engine that sleeps allocates and frees this memory
    at every step, which takes longer the more it is."""
    return SLACK * needed_gib(config, dims, world) + UNCOUNTED_GIB


def enough_gib(config: Config, dims: ModelDims, world: World) -> float:
    """GiB of a GPU in which vLLM never has to preempt: the same less generously."""
    return SLACK * needed_gib(config, dims, world) + VLLM_ACTIVATIONS_GIB


def awake_bounds(config: Config, dims: ModelDims, world: World) -> tuple[float, float]:
    """GiB that an awake vLLM needs to sample as fast as one that sleeps, and the most that are of use to it. Neither more nor less
    than ``rollout.gpu_memory_utilization`` asks for."""
    if (share := config.rollout.gpu_memory_utilization) is not None:
        return (asked := share * gpu_memory(world.device) / GIB), asked
    return enough_gib(config, dims, world), useful_gib(config, dims, world)


def needed_gib(config: Config, dims: ModelDims, world: World) -> float:
    """GiB of vLLM's weights, of its sampler, and of a step's samples at their longest, or those of an evaluation, in which every
    completion may have a prompt of its own. No bound for episodes, whose histories stay in the cache between turns and may branch,
    for images, whose tower needs memory of its own, and for states, whose blocks are of another size."""
    if config.has_tools or dims.tower is not None or dims.state_elements:
        return math.inf
    rollout, evaluation = config.rollout, config.eval
    samples = evaluation.rows * evaluation.samples if evaluation.every else 0
    own = replace(config, rollout=replace(rollout, group_size=1))
    needed = max(
        vllm_gib(config, dims, vllm_start.completions_at_once(config, world.size)),
        vllm_gib(own, dims, min(samples, rollout.max_concurrent)),
    )
    return needed + rollout.max_concurrent * dims.vocab * SAMPLER_BYTES / GIB


def just_enough_gib(config: Config, dims: ModelDims, world: World) -> float:
    """GiB of a GPU that leave the policy as much as they can, and in which vLLM never has to preempt either: its activations are
    estimated. Qwen3-4B's and all buffers took 1.4 GiB of an H100 (vLLM 0.26, 256 sequences), for which this has 3.5. Infinite where
    more may be needed: where completions wait for others, and so those of more groups are sampled at once; for layers with unlike
    windows, which vLLM's cache pads; for ranks that share an engine, whose buffers were not measured. And without updates, as
    there are few copies then."""
    rollout = config.rollout
    waits = math.ceil(rollout.prompts_per_step / world.size) * rollout.group_size > rollout.max_concurrent
    if waits or len({*dims.windows}) > 1 or config.tensor_parallel_size > 1 or not has_updates(config):
        return math.inf
    rows = vllm_start.prefill(config).get("max_num_batched_tokens", PREFILL_ROWS)
    # Beside each other in an MLP: gate and up, their product, the residual stream, what goes in and comes out, of each expert.
    row = 3 * dims.intermediate + (4 + dims.active) * dims.hidden + (dims.heads + 2 * dims.kv_heads) * dims.head_dim
    return needed_gib(config, dims, world) + rows * row * compute_dtype(config).itemsize / GIB + VLLM_BUFFERS_GIB


def _less_of_the_policy(config: Config) -> str:
    """Keys that leave less of the policy on the GPU, of those that are not set already."""
    fixes = []
    if has_updates(config) and config.optim.offload != "cpu":
        fixes.append("optim.offload=cpu")
    if has_updates(config) and not config.model.lora_rank:
        fixes.append("model.lora_rank")
    if config.rollout.offload_policy == "never":
        fixes.append("rollout.offload_policy=auto")
    return f"set {' or '.join(fixes)}, " if fixes else ""


def _offload_choices(config: Config, plan: MemoryPlan, world: World) -> list[tuple[str, ...]]:
    """Parts of the memory plan that may go to host memory while vLLM samples, from none on, until one makes enough room. With
    ``auto`` no more than this host's memory has room for."""
    moments_stay = config.optim.offload == "cpu" or not has_updates(config)  # they are there already, or nowhere
    parts = ("weights",) if moments_stay else ("weights", "moments")
    if config.rollout.offload_policy != "auto":
        return [parts if config.rollout.offload_policy == "always" else ()]
    ranks, free = host_ranks(world), HOST_SHARE * host_memory() / GIB
    taken = ranks * 2 * plan.gradients if moments_stay else 0
    choices = [parts[:count] for count in range(len(parts) + 1)]
    return [
        names for names in choices if taken + ranks * sum(getattr(plan, name) for name in names) <= free or not names
    ]


def vllm_gib(config: Config, dims: ModelDims, samples: int) -> float:
    """GiB that one GPU holds of vLLM's weights, and of keys and values of so many completions at their longest."""
    rollout, width = config.rollout, compute_dtype(config).itemsize
    groups, block = math.ceil(samples / rollout.group_size), VLLM_BLOCK_TOKENS
    # A completion's last block is not full, and its first one has the prompt's last tokens, which are not shared.
    own = math.ceil(config.max_sampled_tokens / block) * block + block
    rows = groups * config.data.max_prompt_tokens + samples * own
    row = len(dims.windows) * dims.kv_heads * (dims.head_dim + dims.value_dim)
    return width * (dims.parameters + row * rows + dims.state_elements * samples) / config.tensor_parallel_size / GIB


def memory_text(config: Config, dims: ModelDims, world: World, memory: VLLMMemory) -> str:
    """vLLM's part of the GPUs, in words: what it is, and what a group at its longest takes of it."""
    if world.device.type == "cpu":
        return memory.text
    weights, group = vllm_gib(config, dims, 0), vllm_gib(config, dims, config.rollout.group_size)
    gpus = f", {size} of which share an engine" if (size := config.tensor_parallel_size) > 1 else ""
    room = memory.share * gpu_memory(world.device) / GIB
    takes = f"weights take {weights:.1f}, a group at its longest {group - weights:.1f}"
    return f"{memory.text}: {room:.1f} GiB a GPU{gpus}; {takes} of it"
