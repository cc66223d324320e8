"""``pgrpo train --dry-run``: prints the resolved config and the cost of a step. Reads the model's config.json, but no weights."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import get_args

import torch
from rich.console import Console

from pgrpo.admission.fits import check_chunks, check_heads, check_lora, check_positions, check_sampled_positions
from pgrpo.admission.models import check_model
from pgrpo.admission.rows import check_rows
from pgrpo.config import Config, ConfigError, check_world_size, to_yaml
from pgrpo.distributed.world import World, world_size
from pgrpo.placement.awake import engine_memory, vllm_text
from pgrpo.placement.choices import attention_choice, engine_choice, engine_name, is_compiled, teacher_model
from pgrpo.placement.layers import keepable_tokens, layer_plan
from pgrpo.placement.sizes import gpu_memory, most_image_tokens, plan_sizes
from pgrpo.planning.flops import GIB, ModelDims, active_adapters, adapter_parameters, flat_work, rho, update_flops
from pgrpo.planning.hub import load_hf_config
from pgrpo.planning.kept import kept_text, longest_kept, why_none_kept
from pgrpo.planning.memory import memory_plan
from pgrpo.planning.recompute import LayerPlan
from pgrpo.process.caches import cache_root
from pgrpo.training.engine import check_built, check_engine, check_pushable, check_sharers
from pgrpo.types import Recompute


def plan(config: Config) -> None:
    """Print the resolved config and the plan, once."""
    check_world_size(config, planned_ranks(config))
    costs = plan_text(config)  # before printing: a config that this refuses is not shown
    if os.environ.get("RANK", "0") != "0":
        return
    # Do not wrap lines, so that the output can be pasted into a file.
    Console(markup=False, highlight=False, emoji=False).print(f"{to_yaml(config)}\n{costs}", soft_wrap=True)


def planned_ranks(config: Config) -> int:
    """Ranks that torchrun started; without it as many as compute a micro-batch together, or share a vLLM engine."""
    return world_size() if "WORLD_SIZE" in os.environ else config.tensor_parallel_size


def plan_text(config: Config) -> str:
    """Tokens, micro-batches and memory of a step in which every prompt and completion is as long as allowed."""
    rollout, budget = config.rollout, config.train.token_budget
    prompt, completion = config.data.max_prompt_tokens, config.max_sampled_tokens
    ranks, together = planned_ranks(config), config.model.sequence_parallel_size
    hf_config = load_hf_config(config.model)
    not_kept = check_model(config.model.path, hf_config, prompt + completion).not_kept or _teachers_not_kept(config)
    check_positions(config.model, hf_config, prompt + completion, config.sampled_limit)
    dims = ModelDims.from_config(hf_config)
    check_lora(config.model, dims)
    check_chunks(config.model, dims)
    check_heads(together, dims)
    check_rows(config.model.path, hf_config, prompt + completion, together)
    completions = [completion] * rollout.group_size
    shared = config.model.attention == "grouped"
    packed = rollout.prompts_per_step * int(flat_work(prompt, completions, shared=shared).rows.sum())
    repeated = rollout.prompts_per_step * int(flat_work(prompt, completions, shared=False).rows.sum())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    planned = torch.device("cpu" if config.model.dtype == "float32" else "cuda")  # the device that the config is for
    if engine_name(config, planned) == "vllm":
        check_sampled_positions(config, hf_config)
        check_sharers(config, dims, ranks)
    world = World(0, ranks, planned, fsdp_size=config.model.fsdp_size, sequence_parallel_size=together)
    built = ""
    if planned.type == device.type:  # else vLLM is somewhere else
        check_engine(config, dims, world)
        check_pushable(config, hf_config, world)
        built = check_built(config, hf_config, world)
    offloaded_gib, vllm = _vllm(config, dims, world)
    chosen, sizes = layer_plan(config, dims, world), plan_sizes(config, dims, world, planned)
    sizes["kept_tokens"] = kept_tokens = 0 if not_kept else keepable_tokens(config, dims, world)
    memory = replace(memory_plan(dims, **chosen._asdict(), **sizes), offloaded=offloaded_gib)
    elsewhere = "" if planned.type == device.type else f", on a {planned.type} device"
    gpu = f" of {gpu_memory(planned) / GIB:.0f}{' (assumed)' if elsewhere else ''}" if planned.type == "cuda" else ""
    host = f"; {memory.host:.1f} of host memory for inputs of layers" if memory.host else ""
    shares = f", {together} of which compute a micro-batch together" if together > 1 else ""
    each = f"{together} ranks" if together > 1 else "rank"
    # A module that FSDP2 does not shard has nothing to gather.
    stay = f"; {chosen.stay_gathered} of {dims.layers} stay gathered during an update" if memory.gathered else ""
    adapters = adapter_parameters(config.model, dims)
    epochs = config.train.epochs_per_step
    group_flops = update_flops(dims, prompt, completions, shared=shared, adapters=active_adapters(config.model, dims))
    flops = epochs * rollout.prompts_per_step * group_flops
    trained = f", frozen; LoRA trains {adapters:,} beside them" if adapters else ""
    return (
        f"model         {config.model.path}: {dims.parameters:,} parameters, {config.model.dtype}{trained}\n"
        f"{_teacher(config, sizes['teacher'])}"
        f"a step        {rollout.prompts_per_step} prompts x {rollout.group_size} completions on {ranks} rank(s){shares}, "
        f"{config.train.updates_per_step * epochs} update(s)\n"
        f"at most       {packed:,} packed tokens a step; {repeated:,} if every completion had its own prompt, "
        f"{rho(prompt, completions):.2f} times the tokens (rho)\n"
        f"micro-batches {math.ceil(packed * together / ranks / budget)} a step and {each}, of at most {budget:,} tokens "
        f"(train.token_budget), if every prompt and completion is as long as allowed\n"
        f"{_kept(config, dims, kept_tokens, not_kept)}"
        f"layers        {_layers(config, dims, device, chosen)}{stay}\n"
        f"sampling      {engine_choice(config, planned).text}{elsewhere}{vllm}{built and f'; {built}'}\n"
        f"compiled code {cache_root(config.cache_dir)}\n"
        f"work          {flops / 1e12:,.3g} TFLOP for a step's forward and backward{_images(config, dims)}\n"
        f"memory        {memory.peak:.1f} GiB{gpu} a rank (estimate): rollout {memory.rollout:.1f}, update {memory.update:.1f}, "
        f"optimizer step {memory.optimizer_step:.1f}{host}"
    )


def _vllm(config: Config, dims: ModelDims, world: World) -> tuple[float, str]:
    """GiB of the policy that are in host memory while vLLM samples, and its memory in words. Only a GPU that is here refuses."""
    if world.device.type == "cpu" or engine_name(config, world.device) != "vllm":
        return 0.0, ""
    try:
        return engine_memory(config, dims, world).memory.offloaded_gib, f" with {vllm_text(config, dims, world)}"
    except ConfigError as error:
        if torch.cuda.is_available():
            raise
        return 0.0, f"; such a GPU would refuse: {error}"


def _teachers_not_kept(config: Config) -> str:
    if not config.loss.teacher:
        return ""
    model = teacher_model(config)
    not_kept = check_model(model.path, load_hf_config(model), config.max_sample_tokens).not_kept
    return not_kept and f"of the teacher, {not_kept}"


def _kept(config: Config, dims: ModelDims, tokens: int, not_kept: str) -> str:
    """Whether prefixes are kept for several passes: of so many tokens at most."""
    wanted = 0 if not_kept else longest_kept(config, dims)
    text = kept_text(wanted, tokens) if wanted else why_none_kept(config, dims, not_kept)
    return f"kept prefixes {text}\n" if text else ""


def _teacher(config: Config, dims: ModelDims | None) -> str:
    return f"teacher       {config.loss.teacher}: {dims.parameters:,} parameters, frozen\n" if dims else ""


def _images(config: Config, dims: ModelDims) -> str:
    """What images take of a step's work, at most; nothing where prompts have none."""
    if dims.tower is None or not most_image_tokens(config, dims):
        return ""
    model, work = config.model, dims.tower.work_of_tokens(config.data.max_prompt_tokens)
    one = dims.tower.flops(work, tower=model.train_vision, projector=model.train_projector)
    times = config.train.epochs_per_step if model.train_vision or model.train_projector else 1
    flops = times * config.rollout.prompts_per_step * one
    return f"; up to {flops / 1e12:,.3g} more for images, if prompts were nothing else"


def _layers(config: Config, dims: ModelDims, here: torch.device, chosen: LayerPlan) -> str:
    """How layers run."""
    choice = attention_choice(config, dims, here)
    modes = get_args(Recompute)[:0:-1]
    counts = [
        f"{mode} in {chosen.recompute.count(mode)} of {dims.layers}" for mode in modes if mode in chosen.recompute
    ]
    chunks = f", MLPs in {chosen.mlp_chunks} parts" if chosen.mlp_chunks > 1 else ""
    compiled = "compiled" if is_compiled(config, here) else "not compiled"
    return (
        f"{compiled} here, {choice.kernel} attention kernel ({choice.reason}), activation checkpointing: "
        f"{', '.join(counts) or 'none'}{chunks}"
    )
