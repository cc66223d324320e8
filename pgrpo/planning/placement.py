"""Puts a model on this rank's device: chooses the attention kernel, compilation, recomputation and engine, and shards the
weights."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch

from pgrpo.attention.choose import AttentionChoice
from pgrpo.attention.kernels.flash import choose_kernel
from pgrpo.config import Config, ConfigError
from pgrpo.distributed.world import World
from pgrpo.model.logprobs import chunk_bytes
from pgrpo.model.lora import adapter_parameters
from pgrpo.planning.flops import GIB, ModelDims, parameter_count
from pgrpo.planning.memory import fewest_recomputed_layers, memory_plan
from pgrpo.rollout.vllm import start as vllm_start
from pgrpo.types import Recompute

USABLE_SHARE = 0.92
"""Share of a GPU's memory that may be planned. The rest is for the CUDA context, libraries and fragmentation."""
SLEEPING_VLLM_GIB = 4.0
"""GPU memory that vLLM holds while it sleeps, and beyond its share while it is awake: CUDA graphs, workspaces, libraries.
Measured: 3.6 GiB for Qwen3-4B with 256 sequences on an H100."""
CPU_SHARE = 0.2
"""Share of the host's memory for vLLM's weights, keys and values where there is no GPU."""


def check_device(config: Config, device: torch.device) -> None:
    """Refuse what this device cannot do, before any weight is loaded."""
    if device.type == "cuda" and config.model.dtype == "float32":
        raise ConfigError(
            "model.dtype=float32: flash attention on a GPU computes in bfloat16: set model.dtype=bfloat16"
        )
    for key, value in (("optim.offload", config.optim.offload), ("loss.ref_offload", config.loss.ref_offload)):
        if device.type == "cpu" and value == "cpu":
            raise ConfigError(f"{key}=cpu: there is no GPU to offload from: set {key}=none")


def compute_dtype(config: Config) -> torch.dtype:
    return getattr(torch, config.model.dtype)


def is_compiled(config: Config, device: torch.device) -> bool:
    """``model.compile``; unless it is set, true on a GPU only."""
    return device.type == "cuda" if config.model.compile is None else config.model.compile


def attention_choice(config: Config, dims: ModelDims, device: torch.device) -> AttentionChoice:
    """How the policy's attention is computed: kernel, and one of its two ways.

    Raises:
        ConfigError: ``model.attention_kernel`` cannot run here.
    """
    try:
        kernel = choose_kernel(config.model.attention_kernel, device, compute_dtype(config), dims.head_dim)
    except ValueError as error:
        raise ConfigError(f"model.attention_kernel={config.model.attention_kernel}: {error}") from error
    passes = "auto" if device.type == "cuda" else "two_passes"
    return AttentionChoice(kernel.name, dims.heads, dims.kv_heads, dims.head_dim, passes, kernel.reason)


def recompute_by_layer(config: Config, dims: ModelDims, world: World) -> list[Recompute]:
    """What the backward recomputes in each layer."""
    mode = config.model.activation_checkpointing
    if mode != "auto":
        return [mode] * dims.layers
    if world.device.type == "cpu":
        return ["none"] * dims.layers
    capacity = USABLE_SHARE * torch.cuda.get_device_properties(world.device).total_memory / GIB
    if engine_name(config, world.device) == "vllm":
        capacity -= SLEEPING_VLLM_GIB
    return fewest_recomputed_layers(dims, capacity, **plan_sizes(config, dims, world, world.device))


class EngineChoice(NamedTuple):
    """The engine that samples, and why it was chosen."""

    name: Literal["vllm", "embedded"]
    reason: str

    @property
    def text(self) -> str:
        what = {"vllm": "rollouts by vLLM", "embedded": "rollouts by the policy itself"}[self.name]
        return f"{what} ({self.reason})"


def engine_choice(config: Config, device: torch.device) -> EngineChoice:
    """``rollout.engine``; ``auto`` is vLLM where it is installed and there is a GPU."""
    if config.rollout.engine != "auto":
        return EngineChoice(config.rollout.engine, "asked for")
    if device.type != "cuda":
        return EngineChoice("embedded", "there is no GPU")
    if not vllm_start.is_installed():
        return EngineChoice("embedded", "vLLM is not installed, which is many times faster: pip install 'pgrpo[vllm]'")
    return EngineChoice("vllm", "it is installed")


def engine_name(config: Config, device: torch.device) -> Literal["vllm", "embedded"]:
    return engine_choice(config, device).name


def vllm_memory_share(config: Config, dims: ModelDims, world: World) -> float:
    """``rollout.gpu_memory_utilization``; unless it is set, the share of this GPU's memory that the policy leaves free between
    updates, from the memory plan.

    Raises:
        ConfigError: the engine's weights and one group do not fit into it.
    """
    if (share := config.rollout.gpu_memory_utilization) is not None:
        return share
    if world.device.type == "cpu":
        return CPU_SHARE
    total = torch.cuda.get_device_properties(world.device).total_memory / GIB
    sizes = plan_sizes(config, dims, world, world.device)
    plan = memory_plan(
        dims, recompute=["none" for _ in range(dims.layers)], **sizes
    )  # `recompute` matters for updates only
    held = plan.weights + plan.moments + plan.reference
    share = USABLE_SHARE - (held + SLEEPING_VLLM_GIB) / total
    rollout, width = config.rollout, compute_dtype(config).itemsize
    rows = config.data.max_prompt_tokens + rollout.group_size * rollout.max_completion_tokens
    bytes_needed = width * (parameter_count(dims) + 2 * dims.layers * dims.kv_heads * dims.head_dim * rows)
    needed = bytes_needed / rollout.tensor_parallel_size / GIB
    if share * total < needed:
        raise ConfigError(
            f"rollout.gpu_memory_utilization: beside the policy's {held:.0f} GiB of {total:.0f}, and "
            f"{total - USABLE_SHARE * total + SLEEPING_VLLM_GIB:.0f} for CUDA, its graphs and libraries, "
            f"{max(0, share * total):.0f} are left for vLLM, which needs {needed:.0f} for its weights and one group: "
            "set optim.offload=cpu or model.lora_rank, use more GPUs, or lower rollout.max_completion_tokens"
        )
    return share


def plan_sizes(config: Config, dims: ModelDims, world: World, device: torch.device) -> dict[str, Any]:
    """Arguments of ``memory_plan``, except activation checkpointing."""
    rollout = config.rollout
    samples = rollout.prompts_per_step * rollout.group_size
    return {
        "token_budget": config.train.token_budget,
        "dtype_bytes": compute_dtype(config).itemsize,
        "compiled": is_compiled(config, device),
        "ranks": world.shards,
        "replicas": world.size // world.shards,
        "adapters": adapter_parameters(config.model, dims),
        "reference": bool(config.loss.kl_coef),
        "ref_offload": config.loss.ref_offload == "cpu",
        "offload": config.optim.offload == "cpu",
        "concurrent": 0 if engine_name(config, device) == "vllm" else min(rollout.max_concurrent, samples),
        "group_size": rollout.group_size,
        "prompt_tokens": config.data.max_prompt_tokens,
        "completion_tokens": rollout.max_completion_tokens,
        "logit_chunk_bytes": chunk_bytes(device.type),
    }
