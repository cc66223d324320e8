"""``pgrpo train --dry-run``: prints the resolved config and the cost of a step. Reads the model's config.json, but no weights."""

from __future__ import annotations

import math
import os

import torch
from rich.console import Console

from pgrpo.admission.models import check_model
from pgrpo.config import Config, check_world_size, to_yaml
from pgrpo.distributed.world import World, world_size
from pgrpo.model.lora import adapter_parameters, check_lora
from pgrpo.model.policy import check_positions, load_hf_config
from pgrpo.planning.flops import ModelDims, flat_work, rho, update_flops
from pgrpo.planning.memory import memory_plan
from pgrpo.planning.placement import (
    attention_choice,
    engine_choice,
    engine_name,
    is_compiled,
    plan_sizes,
    recompute_by_layer,
    vllm_memory,
)
from pgrpo.process.caches import cache_root
from pgrpo.types import Recompute


def plan(config: Config) -> None:
    """Print the resolved config and the plan, once."""
    check_world_size(config, world_size())
    costs = plan_text(config)  # before printing: a config that this refuses is not shown
    if os.environ.get("RANK", "0") != "0":
        return
    # Do not wrap lines, so that the output can be pasted into a file.
    Console(markup=False, highlight=False, emoji=False).print(f"{to_yaml(config)}\n{costs}", soft_wrap=True)


def plan_text(config: Config) -> str:
    """Tokens, micro-batches and memory of a step in which every prompt and completion is as long as allowed."""
    rollout, budget = config.rollout, config.train.token_budget
    prompt, completion = config.data.max_prompt_tokens, config.max_sampled_tokens
    ranks = world_size()
    hf_config = load_hf_config(config.model)
    check_model(config.model.path, hf_config, prompt + completion)
    check_positions(config.model, hf_config, prompt + completion)
    dims = ModelDims.from_config(hf_config)
    check_lora(config.model, dims)
    completions = [completion] * rollout.group_size
    shared = config.model.attention == "grouped"
    packed = rollout.prompts_per_step * flat_work(prompt, completions, shared=shared).rows
    repeated = rollout.prompts_per_step * flat_work(prompt, completions, shared=False).rows
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = World(0, ranks, device, fsdp_size=config.model.fsdp_size)
    recompute, layers = _layers(config, dims, world)
    planned = torch.device("cpu" if config.model.dtype == "float32" else "cuda")  # the device that the config is for
    sizes, vllm = plan_sizes(config, dims, world, planned), None
    if device.type == "cuda" and engine_name(config, planned) == "vllm":
        vllm = vllm_memory(config, dims, world)
    memory = memory_plan(dims, recompute=recompute, **sizes, offloaded=vllm.offloaded if vllm else ())
    elsewhere = "" if planned.type == device.type else f", on a {planned.type} device"
    adapters = adapter_parameters(config.model, dims)
    epochs = config.train.epochs_per_step
    group_flops = update_flops(dims, prompt, completions, shared=shared, adapters=adapters)
    flops = epochs * rollout.prompts_per_step * group_flops
    trained = f", frozen; LoRA trains {adapters:,} beside them" if adapters else ""
    return (
        f"model         {config.model.path}: {dims.parameters:,} parameters, {config.model.dtype}{trained}\n"
        f"{_teacher(config, sizes['teacher'])}"
        f"a step        {rollout.prompts_per_step} prompts x {rollout.group_size} completions on {ranks} rank(s), "
        f"{config.train.updates_per_step * epochs} update(s)\n"
        f"at most       {packed:,} packed tokens a step; {repeated:,} if every completion had its own prompt "
        f"(rho {rho(prompt, completions):.2f})\n"
        f"micro-batches {math.ceil(packed / ranks / budget)} a step and rank, of at most {budget:,} tokens "
        f"(train.token_budget), if every prompt and completion is as long as allowed\n"
        f"layers        {layers}\n"
        f"sampling      {engine_choice(config, planned).text}{elsewhere}{f' with {vllm.text}' if vllm else ''}\n"
        f"compiled code {cache_root(config.cache_dir)}\n"
        f"work          {flops / 1e12:,.3g} TFLOP for a step's forward and backward\n"
        f"memory        {memory.peak:.1f} GiB a rank (estimate): rollout {memory.rollout:.1f}, update {memory.update:.1f}, "
        f"optimizer step {memory.optimizer_step:.1f}"
    )


def _teacher(config: Config, dims: ModelDims | None) -> str:
    return f"teacher       {config.loss.teacher}: {dims.parameters:,} parameters, frozen\n" if dims else ""


def _layers(config: Config, dims: ModelDims, world: World) -> tuple[list[Recompute], str]:
    """What the backward recomputes in each layer, and a description of how layers run."""
    choice = attention_choice(config, dims, world.device)
    recompute: list[Recompute] = recompute_by_layer(config, dims, world)
    note = ""
    automatic = config.model.activation_checkpointing == "auto"
    if automatic and world.device.type == "cpu" and config.model.dtype != "float32":
        recompute = ["attention" for _ in recompute]
        note = "; auto decides on the GPU, this is a conservative guess"
    counts = [
        f"{mode} in {recompute.count(mode)} of {dims.layers}" for mode in ("full", "attention") if mode in recompute
    ]
    compiled = "compiled" if is_compiled(config, world.device) else "not compiled"
    return (
        recompute,
        f"{compiled} here, {choice.kernel} attention kernel ({choice.reason}), activation checkpointing: "
        f"{', '.join(counts) or 'none'}{note}",
    )
