"""AdamW, learning rate schedules, gradient clipping, and the optimizer's state as named tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pgrpo.checkpoint.shards import Shard, shard_of, whole
from pgrpo.config import OptimConfig
from pgrpo.training.offload import MOMENTS, OffloadedAdamW


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) with weight decay for matrices only: not for norms, biases and embeddings (tied heads are
    embeddings)."""
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    parameters = list(named.values())
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    # Biases by name too: those of stacked experts (gpt-oss) have two dimensions.
    decays = [p.ndim >= 2 and not name.endswith("bias") and id(p) not in embeddings for name, p in named.items()]
    groups = [
        {"params": [p for p, d in zip(parameters, decays, strict=True) if d], "weight_decay": config.weight_decay},
        {"params": [p for p, d in zip(parameters, decays, strict=True) if not d], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.offload == "cpu":
        return OffloadedAdamW(groups, **settings)
    on_gpu = parameters[0].device.type == "cuda"
    return torch.optim.AdamW(groups, **settings, fused=on_gpu, foreach=not on_gpu)


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of 0-based ``step``: linear warm-up over ``warmup_steps``, then the schedule, which reaches 0 after the last
    step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    if config.schedule == "linear":
        return config.lr * (1 - progress)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(module: nn.Module, max_norm: float) -> float:
    """Scale gradients to a global norm of at most ``max_norm`` (0: no clipping). Returns the norm before, over all ranks."""
    norm = nn.utils.clip_grad_norm_(module.parameters(), max_norm if max_norm > 0 else float("inf"))
    return float((norm.full_tensor() if isinstance(norm, DTensor) else norm).item())


def optimizer_shards(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Shard]:
    """This rank's shards of AdamW's moments, and the step counts, as ``<parameter name>.<moment>``. Shares their memory."""
    shards = {}
    for name, parameter in module.named_parameters():
        state = optimizer.state.get(parameter)
        if not state:
            continue
        shards[f"{name}.step"] = whole(state["step"])
        for moment in MOMENTS:
            shards[f"{name}.{moment}"] = _moment_shard(state[moment], parameter)
    return shards


def load_optimizer_shards(
    optimizer: torch.optim.Optimizer, module: nn.Module, names: Container[str], read: Callable[[str, Shard], Tensor]
) -> None:
    """Restore the state that ``optimizer_shards`` gave, on any number of ranks. A parameter that had no state gets none.

    Args:
        names: names of the saved tensors.
        read: reads the part of a saved tensor that a shard covers.
    """
    for name, parameter in module.named_parameters():
        if f"{name}.step" not in names:
            continue
        state = optimizer.state[parameter]
        if isinstance(optimizer, OffloadedAdamW):
            optimizer.init_state(parameter)
        device = parameter.device if parameter.device.type == "cuda" else torch.device("cpu")
        state["step"] = read(f"{name}.step", whole(torch.zeros(()))).to(device, copy=True)
        for moment in MOMENTS:
            if not isinstance(optimizer, OffloadedAdamW):
                state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            shard = _moment_shard(state[moment], parameter)
            shard.tensor.copy_(read(f"{name}.{moment}", shard))


def _moment_shard(moment: Tensor, parameter: nn.Parameter) -> Shard:
    """A moment is sharded like its parameter. An offloaded one is a flat tensor in host memory."""
    if isinstance(moment, DTensor) or not isinstance(parameter, DTensor):
        return shard_of(moment.view(parameter.shape))
    place = shard_of(parameter)
    return replace(place, tensor=moment.view(place.tensor.shape))
