"""A policy's weights, unsharded and under the names of a Hugging Face checkpoint, for an engine that loads such names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pgrpo.model.families.experts import to_checkpoint

BASE, ADAPTER = ".base_layer.", ".lora_"
"""Parts of the names that peft gives to the parameters of a linear layer and of its adapter."""


def weight_names(model: nn.Module) -> set[str]:
    """The names that ``full_weights`` yields. Of names that share a tensor (tied embeddings) only one."""
    own = {name.replace(BASE, "."): x.shape for name, x in model.named_parameters() if ADAPTER not in name}
    own |= {name: x.shape for name, x in _kept_buffers(model).items()}
    convert = to_checkpoint(model)
    return {new for name, shape in own.items() for new, _ in convert(name, torch.empty(shape, device="meta"))}


def _kept_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that a checkpoint has, as the correction of a router's scores (DeepSeek): nothing trains them, but an engine that
    sleeps loses them."""
    kept = model.state_dict(keep_vars=True).keys()
    return {name: x for name, x in model.named_buffers() if name in kept and x.is_floating_point()}


@torch.no_grad()
def full_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every weight in the order of the layers, one at a time, LoRA adapters merged into theirs, stacked experts
    taken apart.

    A collective call where weights are sharded: every rank must consume the iterator to its end. Shards are cast before they
    are gathered, which halves the traffic.

    Args:
        model: a causal language model, sharded or not.
        dtype: of the tensors, which are on the model's device; buffers keep their own.
    """
    convert = to_checkpoint(model)
    for name, tensor in _own_weights(model, dtype):
        yield from convert(name, tensor)


def _own_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if ADAPTER in name:
            continue
        weight = _whole(parameter, parameter.dtype if BASE in name else dtype)
        if BASE in name and name.endswith("weight"):
            weight = weight.float() + _adapter(model.get_submodule(name.partition(BASE)[0]))
            weight = _round_stochastically(weight) if dtype == torch.bfloat16 else weight
        yield name.replace(BASE, "."), weight.to(dtype)
    yield from _kept_buffers(model).items()


def _adapter(layer: Any) -> Tensor:
    """The matrix that a LoRA layer adds to its weight: [out, in], float32 (arXiv 2106.09685, equation 3)."""
    delta = torch.zeros((), device=layer.weight.device)
    for adapter, scale in layer.scaling.items():
        a_RI, b_OR = (_whole(matrix[adapter].weight, torch.float32) for matrix in (layer.lora_A, layer.lora_B))
        delta = delta + scale * (b_OR @ a_RI)
    return delta


def _round_stochastically(x: Tensor) -> Tensor:
    """Round float32 to bfloat16 values (returned as float32), up or down with the probability that makes the mean exact
    (arXiv 1502.02551).

    A young adapter adds less than half a unit in the last place of most bfloat16 weights, so rounding to nearest would drop it. The
    random numbers are the same each time, so that an unchanged weight is rounded alike in every push.
    """
    generator = torch.Generator(x.device).manual_seed(0)
    noise = torch.randint(2**16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    return ((x.contiguous().view(torch.int32) + noise) & -(2**16)).view(torch.float32)


def _whole(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """All of a tensor that may be sharded, cast before it is gathered. On one rank that is its shard, without DTensor's own calls,
    which take longer than the copy of a small tensor."""
    if isinstance(tensor, DTensor) and tensor.device_mesh.size() == 1:
        tensor = tensor.to_local()
    cast = tensor.detach().to(dtype)
    return cast.full_tensor() if isinstance(cast, DTensor) else cast
