"""What a config and a device give the memory plan (``planning/memory.py``): sizes, and the memory that there is."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from pgrpo.config import Config
from pgrpo.distributed.world import World
from pgrpo.model.logprobs import LOGITS_PER_CHUNK
from pgrpo.placement.choices import compute_dtype, engine_name, is_compiled, teacher_model
from pgrpo.planning.flops import ModelDims, adapter_parameters
from pgrpo.planning.hub import load_hf_config
from pgrpo.planning.kept import longest_kept

USABLE_SHARE = 0.92
"""Share of a GPU's memory that may be planned. The rest is for the CUDA context, libraries and fragmentation."""
SLEEPING_VLLM_GIB = 4.0
"""GPU memory that vLLM holds while it sleeps, and beyond its share while it is awake: CUDA graphs, workspaces, libraries.
Measured: 3.6 GiB for Qwen3-4B with 256 sequences on an H100."""
HOST_SHARE = 0.8
"""Share of the host's memory that ``rollout.offload_policy=auto`` and AdamW's offloaded moments may take together."""
PLANNED_GPU = 85_045_346_304
"""Bytes of an H100 of 80 GB, by CUDA."""


def gpu_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory; without a GPU (``--dry-run``) those of one of 80 GB."""
    return torch.cuda.get_device_properties(device).total_memory if torch.cuda.is_available() else PLANNED_GPU


def host_memory() -> int:
    """Bytes of memory that this host has, or that this container may use of it."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError, ValueError):  # no control groups, or "max"
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits)


def host_ranks(world: World) -> int:
    """Ranks that share this host's memory, by torchrun; those of a dry run are all on one host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world.size))


def plan_sizes(config: Config, dims: ModelDims, world: World, device: torch.device) -> dict[str, Any]:
    """Arguments of ``memory_plan``, except activation checkpointing."""
    rollout = config.rollout
    samples = rollout.prompts_per_step * rollout.group_size
    return {
        "token_budget": most_rows(config),
        "kept_tokens": longest_kept(config, dims),
        "dtype_bytes": compute_dtype(config).itemsize,
        "compiled": is_compiled(config, device),
        "ranks": world.shards,
        "replicas": world.size // world.shards,
        "together": world.sequence_parallel_size,
        "adapters": adapter_parameters(config.model, dims),
        "reference": bool(config.loss.kl_coef),
        "ref_offload": config.loss.ref_offload == "cpu",
        "teacher": ModelDims.from_config(load_hf_config(teacher_model(config))) if config.loss.teacher else None,
        "teacher_offload": config.loss.teacher_offload == "cpu",
        "full_kl": config.loss.teacher_kl == "full",
        "offload": config.optim.offload == "cpu",
        # An episode's turns have a prompt each. What they computed is kept for its next turn, in a copy beside the batch, which
        # has room for a turn more behind each row (half a turn in each of the two).
        "concurrent": 0
        if engine_name(config, device) == "vllm"
        else min(rollout.max_concurrent, samples) << config.has_tools,
        "group_size": 1 if config.has_tools else rollout.group_size,
        "prompt_tokens": config.data.max_prompt_tokens,
        "completion_tokens": config.max_sampled_tokens + config.has_tools * -(-rollout.max_completion_tokens // 2),
        # Temporaries included.
        "logit_chunk_bytes": LOGITS_PER_CHUNK[device.type] * {"cpu": 16, "cuda": 2}[device.type],
        "image_tokens": most_image_tokens(config, dims),
        "train_vision": config.model.train_vision,
        "train_projector": config.model.train_projector,
        "recompute_vision": recomputes_tower(config, device),
        "trains": has_updates(config),
    }


def has_updates(config: Config) -> bool:
    """Whether a model is placed to be trained: not to be evaluated alone, for which ``train.steps`` is 0."""
    return config.train.steps != 0


def most_rows(config: Config) -> int:
    """The most packed tokens of a micro-batch: the budget, or a whole step at its longest where that is less."""
    rollout, budget = config.rollout, config.train.token_budget
    if config.has_tools:  # an episode may have several samples
        return budget
    copies = 1 if config.model.attention == "grouped" else rollout.group_size
    group = copies * config.data.max_prompt_tokens + rollout.group_size * config.max_sampled_tokens
    return min(budget, rollout.prompts_per_step * group)


def most_image_tokens(config: Config, dims: ModelDims) -> int:
    """The most rows of images that a micro-batch may have: prompts may be hardly more than images."""
    told = config.environment.max_images
    sees = dims.tower is not None and (config.prompt.images_column or config.prompt.messages_column or told)
    prompts = config.rollout.prompts_per_step * config.data.max_prompt_tokens
    return min(config.train.token_budget, prompts if not told else config.train.token_budget) if sees else 0


def recomputes_tower(config: Config, device: torch.device) -> bool:
    """Whether the backward of a trained vision tower computes its layers again."""
    mode = config.model.activation_checkpointing
    return config.model.train_vision and (device.type == "cuda" if mode == "auto" else mode != "none")
