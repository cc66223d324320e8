"""Puts a model on this rank's device: chooses the attention kernel, compilation, recomputation and engine, and shards the
weights."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from pgrpo.attention.choose import UPDATE_FLOPS_PER_NS, AttentionChoice
from pgrpo.attention.kernels.flash import choose_kernel
from pgrpo.config import Config, ConfigError, ModelConfig
from pgrpo.distributed.sequence import key_value_copies
from pgrpo.distributed.world import World
from pgrpo.model.logprobs import LOGITS_PER_CHUNK
from pgrpo.planning.flops import GIB, ModelDims, adapter_parameters
from pgrpo.planning.hub import load_hf_config
from pgrpo.planning.kept import cuts_groups, longest_kept
from pgrpo.planning.memory import LayerPlan, MemoryPlan, fewest_recomputed_layers, memory_plan
from pgrpo.rollout.vllm import start as vllm_start
from pgrpo.types import Recompute

USABLE_SHARE = 0.92
"""Share of a GPU's memory that may be planned. The rest is for the CUDA context, libraries and fragmentation."""
SLEEPING_VLLM_GIB = 4.0
"""GPU memory that vLLM holds while it sleeps, and beyond its share while it is awake: CUDA graphs, workspaces, libraries.
Measured: 3.6 GiB for Qwen3-4B with 256 sequences on an H100."""
VLLM_ACTIVATIONS_GIB = 2.0
"""GPU memory within vLLM's share that is neither weights nor cache: activations of its largest prefill."""
VLLM_BLOCK_TOKENS = 16
UNCOUNTED_GIB, SLACK = 8.0, 1.25
"""Added to what vLLM's weights and cache can use, and by which that is multiplied before: activations, what is rounded up."""
SAMPLER_BYTES = 16
"""Of each logit while vLLM samples: at its start it tries as many rows as it may decode at once."""
HOST_SHARE = 0.8
"""Share of the host's memory that ``rollout.offload_policy=auto`` and AdamW's offloaded moments may take together."""
PLANNED_GPU = 85_045_346_304
"""Bytes of an H100 of 80 GB, by CUDA."""
CPU_SHARE = 0.2
"""Share of the host's memory for vLLM's weights, keys and values where there is no GPU."""


def check_device(config: Config, device: torch.device) -> None:
    """Refuse what this device cannot do, before any weight is loaded."""
    if device.type == "cuda" and config.model.dtype == "float32":
        raise ConfigError(
            "model.dtype=float32: flash attention on a GPU computes in bfloat16: set model.dtype=bfloat16"
        )
    for key in ("optim.offload", "loss.ref_offload", "loss.teacher_offload"):
        if device.type == "cpu" and attrgetter(key)(config) == "cpu":
            raise ConfigError(f"{key}=cpu: there is no GPU to offload from: set {key}=none")


def teacher_model(config: Config) -> ModelConfig:
    """The section ``model`` of the teacher: keys that belong to the policy's weights are not set."""
    assert config.loss.teacher is not None
    return replace(config.model, path=config.loss.teacher, revision=None, max_positions=None, lora_rank=0)


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
        kernel = choose_kernel(
            config.model.attention_kernel, device, compute_dtype(config), dims.head_dim, dims.value_dim,
            softcapped=dims.softcapped,
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(f"model.attention_kernel={config.model.attention_kernel}: {error}") from error
    way = "auto" if device.type == "cuda" else "between_depths"
    # Of ranks that compute a batch together, each has all rows in attention, of its heads, and a part of them elsewhere.
    together = config.model.sequence_parallel_size
    heads, kv_heads = dims.heads // together, dims.kv_heads * key_value_copies(dims.kv_heads, together) // together
    flops_per_ns = len(dims.windows) * UPDATE_FLOPS_PER_NS[device.type] * together
    return AttentionChoice(
        kernel.name, heads, kv_heads, dims.head_dim, way, flops_per_ns=flops_per_ns, reason=kernel.reason
    )


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
    if not cuts_groups(config) and not {*plan.recompute} <= {"none", "attention"}:
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
    return max(0.0, HOST_SHARE * host_memory() / GIB / int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - own)


def gpu_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory; without a GPU (``--dry-run``) those of one of 80 GB."""
    return torch.cuda.get_device_properties(device).total_memory if torch.cuda.is_available() else PLANNED_GPU


def _capacity_gib(config: Config, world: World) -> float:
    """GPU memory that the policy and its update may take."""
    capacity = USABLE_SHARE * gpu_memory(world.device) / GIB
    return capacity - (SLEEPING_VLLM_GIB if engine_name(config, world.device) == "vllm" else 0)


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
    one, two = (memory_plan(dims, recompute=recompute, mlp_chunks=chunks, **sizes, kept_tokens=n) for n in (1, 2))
    room = _capacity_gib(config, world) - one.update
    per_token = two.kept - one.kept  # states are as large whatever the tokens
    if room < 0:
        return 0
    return min(wanted, 1 + int(room / per_token)) if per_token else wanted


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
        return EngineChoice("embedded", "vLLM is not installed, which is many times faster: pip install -e '.[vllm]'")
    return EngineChoice("vllm", "it is installed")


def engine_name(config: Config, device: torch.device) -> Literal["vllm", "embedded"]:
    return engine_choice(config, device).name


class VLLMMemory(NamedTuple):
    """vLLM's part of a GPU's memory.

    Attributes:
        share: of the GPU's memory, for weights, keys and values (vLLM's ``gpu_memory_utilization``).
        offloaded: parts of the memory plan that are in host memory while vLLM samples: ``weights``, ``moments``.
        offloaded_gib: their size.
    """

    share: float
    offloaded: tuple[str, ...] = ()
    offloaded_gib: float = 0.0

    @property
    def text(self) -> str:
        away = f", which gets the policy's {' and '.join(self.offloaded)} out of its way ({self.offloaded_gib:.1f} GiB)"
        return f"gpu_memory_utilization {self.share:.2f}{away if self.offloaded else ''}"


def vllm_memory(config: Config, dims: ModelDims, world: World) -> VLLMMemory:
    """What vLLM gets of this GPU: ``rollout.gpu_memory_utilization``; unless it is set, what the policy leaves free between
    updates, from the memory plan, but no more than it can use. With ``rollout.offload_policy=auto`` as little of the policy moves
    to host memory meanwhile as makes room for all completions that are sampled at once, at their longest; if there is never room,
    all that can.

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
    if rollout.gpu_memory_utilization is not None:
        wanted = rollout.gpu_memory_utilization * total
    free, offloaded, plan = 0.0, (), memory_plan(dims, **sizes)
    for offloaded in _offload_choices(config, plan):
        plan = memory_plan(dims, **sizes, offloaded=offloaded)
        free = USABLE_SHARE * total - SLEEPING_VLLM_GIB - plan.resting
        if free >= wanted:
            break
    if rollout.gpu_memory_utilization is not None:
        if wanted < (least := vllm_gib(config, dims, 1)):
            raise ConfigError(
                f"rollout.gpu_memory_utilization: {rollout.gpu_memory_utilization:g} of {total:.0f} GiB is {wanted:.1f}; vLLM "
                f"needs {least:.1f} for its weights and one sample of {config.max_sample_tokens} tokens: raise it, or share an "
                "engine between more GPUs (rollout.tensor_parallel_size)"
            )
        return VLLMMemory(rollout.gpu_memory_utilization, offloaded, plan.offloaded)
    if free < (needed := vllm_gib(config, dims, rollout.group_size)):
        away = "" if offloaded else ", rollout.offload_policy=auto"
        raise ConfigError(
            f"rollout.gpu_memory_utilization: beside the policy's {plan.resting:.0f} GiB of {total:.0f}, and "
            f"{total - USABLE_SHARE * total + SLEEPING_VLLM_GIB:.0f} for CUDA, its graphs and libraries, "
            f"{max(0, free):.0f} are left for vLLM, which needs {needed:.0f} for its weights and one group of prompts of "
            f"{config.data.max_prompt_tokens} tokens: set optim.offload=cpu or model.lora_rank{away}, use more GPUs "
            "(rollout.tensor_parallel_size), or lower rollout.max_completion_tokens"
        )
    return VLLMMemory(min(free, useful_gib(config, dims, world)) / total, offloaded, plan.offloaded)


def useful_gib(config: Config, dims: ModelDims, world: World) -> float:
    """GiB of a GPU beyond which vLLM's cache has nothing to hold, generously: at every step this memory is allocated and freed,
    which takes longer the more it is. Samples of a step, or those of an evaluation, in which every completion may have a prompt of
    its own. No bound for episodes, whose histories stay in the cache between turns and may branch, for images, whose tower needs
    memory of its own, and for states, whose blocks are of another size."""
    if config.has_tools or dims.tower is not None or dims.state_elements:
        return math.inf
    rollout, evaluation = config.rollout, config.eval
    samples = evaluation.rows * evaluation.samples if evaluation.every else 0
    own = replace(config, rollout=replace(rollout, group_size=1))
    needed = max(
        vllm_gib(config, dims, vllm_start.completions_at_once(config, world.size)),
        vllm_gib(own, dims, min(samples, rollout.max_concurrent)),
    )
    return SLACK * (needed + rollout.max_concurrent * dims.vocab * SAMPLER_BYTES / GIB) + UNCOUNTED_GIB


def vllm_text(config: Config, dims: ModelDims, world: World) -> str:
    """vLLM's part of the GPUs, in words: what it is, and what a group at its longest takes of it."""
    memory = vllm_memory(config, dims, world)
    if world.device.type == "cpu":
        return memory.text
    weights, group = vllm_gib(config, dims, 0), vllm_gib(config, dims, config.rollout.group_size)
    gpus = f", {size} of which share an engine" if (size := config.tensor_parallel_size) > 1 else ""
    room = memory.share * gpu_memory(world.device) / GIB
    takes = f"weights take {weights:.1f}, a group at its longest {group - weights:.1f}"
    return f"{memory.text}: {room:.1f} GiB a GPU{gpus}; {takes} of it"


def _offload_choices(config: Config, plan: MemoryPlan) -> list[tuple[str, ...]]:
    """Parts of the memory plan that may go to host memory while vLLM samples, from none on, until one makes enough room. With
    ``auto`` no more than this host's memory has room for."""
    moments_stay = config.optim.offload == "cpu"  # they are there already
    parts = ("weights",) if moments_stay else ("weights", "moments")
    if config.rollout.offload_policy != "auto":
        return [parts if config.rollout.offload_policy == "always" else ()]
    ranks, free = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), HOST_SHARE * host_memory() / GIB
    taken = ranks * 2 * plan.gradients if moments_stay else 0
    choices = [parts[:count] for count in range(len(parts) + 1)]
    return [
        names for names in choices if taken + ranks * sum(getattr(plan, name) for name in names) <= free or not names
    ]


def host_memory() -> int:
    """Bytes of memory that this host has, or that this container may use of it."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError, ValueError):  # no control groups, or "max"
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits)


def vllm_gib(config: Config, dims: ModelDims, samples: int) -> float:
    """GiB that one GPU holds of vLLM's weights, and of keys and values of so many completions at their longest."""
    rollout, width = config.rollout, compute_dtype(config).itemsize
    groups, block = math.ceil(samples / rollout.group_size), VLLM_BLOCK_TOKENS  # a completion's last block is not full
    rows = groups * config.data.max_prompt_tokens + samples * (config.max_sampled_tokens + block)
    row = len(dims.windows) * dims.kv_heads * (dims.head_dim + dims.value_dim)
    return width * (dims.parameters + row * rows + dims.state_elements * samples) / config.tensor_parallel_size / GIB


def plan_sizes(config: Config, dims: ModelDims, world: World, device: torch.device) -> dict[str, Any]:
    """Arguments of ``memory_plan``, except activation checkpointing."""
    rollout = config.rollout
    samples = rollout.prompts_per_step * rollout.group_size
    return {
        "token_budget": config.train.token_budget,
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
    }


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
