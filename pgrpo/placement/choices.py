"""Chooses what a config leaves to the device: the attention kernel, compilation, the engine. Refuses what the device cannot do."""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter
from typing import Literal, NamedTuple

import torch

from pgrpo.attention.choose import UPDATE_FLOPS_PER_NS, AttentionChoice
from pgrpo.attention.kernels.flash import choose_kernel
from pgrpo.config import Config, ConfigError, ModelConfig
from pgrpo.distributed.sequence import key_value_copies
from pgrpo.planning.flops import ModelDims
from pgrpo.rollout.vllm import start as vllm_start


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
        return EngineChoice(
            "embedded", "vLLM, which samples many times faster, is not installed: pip install -e '.[vllm]'"
        )
    return EngineChoice("vllm", "it is installed")


def engine_name(config: Config, device: torch.device) -> Literal["vllm", "embedded"]:
    return engine_choice(config, device).name
