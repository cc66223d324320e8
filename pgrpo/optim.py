"""AdamW, its learning rate, and its state as named tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pgrpo.config import OptimConfig
from pgrpo.distributed import copy_full, full_tensor
from pgrpo.offload import MOMENTS, OffloadedAdamW, as_sharded, local


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) with decoupled weight decay on matrices only: norms and biases have none."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.offload == "cpu":
        return OffloadedAdamW(groups, **settings)
    on_gpu = parameters[0].device.type == "cuda"
    return torch.optim.AdamW(groups, **settings, fused=on_gpu, foreach=not on_gpu)


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of 0-based ``step``: linear warm-up over ``warmup_steps``, then the schedule down to 0 after the last step."""
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
    """Scale gradients to a global norm of at most ``max_norm`` (0: leave them); returns the norm before, over all ranks."""
    norm = nn.utils.clip_grad_norm_(module.parameters(), max_norm if max_norm > 0 else float("inf"))
    return float((norm.full_tensor() if isinstance(norm, DTensor) else norm).item())


def optimizer_tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """AdamW's moments and step counts, whole and on the CPU, as ``<parameter name>.<moment>``. A collective call."""
    tensors = {}
    for name, parameter in module.named_parameters():
        state = optimizer.state.get(parameter)
        if state:
            tensors |= {
                f"{name}.{moment}": full_tensor(as_sharded(state[moment], parameter)) for moment in (*MOMENTS, "step")
            }
    return tensors


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put ``optimizer_tensors`` back, on any number of ranks. A parameter that had no state gets none."""
    for name, parameter in module.named_parameters():
        if f"{name}.step" not in tensors:
            continue
        state = optimizer.state[parameter]
        if isinstance(optimizer, OffloadedAdamW):
            optimizer.init_state(parameter)
        on_gpu = parameter.device.type == "cuda"
        state["step"] = tensors[f"{name}.step"].to(parameter.device if on_gpu else "cpu", copy=True)
        for moment in MOMENTS:
            whole = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            copy_full(whole, tensors[f"{name}.{moment}"])
            if isinstance(optimizer, OffloadedAdamW):
                state[moment].copy_(local(whole).view(-1))
            else:
                state[moment] = whole
