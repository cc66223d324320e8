"""LoRA beside stacked experts: every expert has a pair of small matrices of its own, which ``expert_products.py`` computes with.

X experts, R rank, I inputs and O outputs of an expert's matrix.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pgrpo.planning.dims import is_stack, stacked_matrices

PREFIX = "lora_"
ALIGNMENT = 16
"""Strides of grouped products are multiples of so many bytes."""


class ExpertAdapter(nn.Module):
    """Adds ``scaling * B[x] @ A[x]`` to the matrix of each expert x in one stacked parameter (arXiv 2106.09685, equation 3).
    Beside the parameter ``NAME`` it is the module ``lora_NAME``, and has peft's names: ``lora_A.default.weight`` [X, R, I] begins
    as peft's beside linear layers does (uniform, at most ``I ** -0.5``), ``lora_B.default.weight`` [X, O, R] as zeros; both in
    float32 at least.

    Args:
        weight: the parameter: [X, O, I]; ``is_transposed``: [X, I, O].
    """

    lora_A: Any
    lora_B: Any

    def __init__(self, weight: Tensor, rank: int, alpha: float, *, is_transposed: bool) -> None:
        super().__init__()
        count, outputs, inputs = (weight.mT if is_transposed else weight).shape
        bound, dtype = inputs**-0.5, torch.promote_types(weight.dtype, torch.float32)
        # On the CPU, so that the values are the same on any device.
        drawn = torch.empty(count, rank, inputs, device="cpu").uniform_(-bound, bound)
        self.lora_A = _named_by_peft(drawn.to(weight.device, dtype))
        self.lora_B = _named_by_peft(torch.zeros(count, outputs, rank, device=weight.device, dtype=dtype))
        self.scaling = {"default": alpha / rank}
        self.is_transposed = is_transposed

    def matrices(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and B for a computation in ``dtype``. Zeros fill them up to the next rank whose strides grouped products take; with
        other strides these are computed one expert at a time, for which the host waits for the GPU."""
        a_XRI: Tensor = self.lora_A["default"].weight.to(dtype)
        b_XOR: Tensor = self.lora_B["default"].weight.to(dtype)
        zeros = -a_XRI.shape[1] % (ALIGNMENT // dtype.itemsize)
        if not zeros:
            return a_XRI, b_XOR
        return functional.pad(a_XRI, (0, 0, 0, zeros)), functional.pad(b_XOR, (0, zeros))


def _named_by_peft(weight: Tensor) -> nn.ModuleDict:
    """Holds a matrix as ``default.weight``, the name that peft gives to those of an adapter."""
    holder = nn.Module()
    holder.weight = nn.Parameter(weight)
    return nn.ModuleDict({"default": holder})


def adapter_of(module: nn.Module, name: str) -> ExpertAdapter | None:
    """The adapter of a parameter of the module, if it has one."""
    path, _, last = name.rpartition(".")
    return getattr(module.get_submodule(path), f"{PREFIX}{last}", None)


def add_expert_adapters(layers: Iterable[nn.Module], names: Collection[str], rank: int, alpha: float) -> None:
    """Give stacked parameters of these names new adapters, with initial values from PyTorch's default generator."""
    for stack in (module for layer in layers for module in layer.modules() if is_stack(module)):
        for name, weight in stacked_matrices(stack):
            if name in names:
                stack.add_module(
                    f"{PREFIX}{name}", ExpertAdapter(weight, rank, alpha, is_transposed=bool(stack.is_transposed))
                )


@torch.no_grad()
def merge_expert_adapters(model: nn.Module) -> None:
    """Add adapters to their parameters, and remove them."""
    for stack in filter(is_stack, list(model.modules())):
        for name, weight in stacked_matrices(stack):
            if (adapter := adapter_of(stack, name)) is not None:
                pairs = zip(*adapter.matrices(weight.dtype), strict=True)
                for one, (a, b) in zip(weight, pairs, strict=True):  # one by one, which takes less memory
                    delta = adapter.scaling["default"] * (b @ a)
                    one += delta.mT if adapter.is_transposed else delta
                delattr(stack, f"{PREFIX}{name}")
