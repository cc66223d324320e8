"""A policy's weights, unsharded and under the names of a Hugging Face checkpoint, for an engine that loads such names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pgrpo.model.families.expert_adapters import adapter_of
from pgrpo.model.families.experts import to_checkpoint

BASE, ADAPTER = ".base_layer.", ".lora_"
"""Parts of the names of a linear layer's parameters (by peft), and of adapters'."""


def weight_names(model: nn.Module) -> set[str]:
    """The names that ``full_weights`` yields. Of names that share a tensor (tied embeddings) only one."""
    own = {name.replace(BASE, "."): x for name, x in model.named_parameters() if ADAPTER not in name}
    own, convert = own | _kept_buffers(model), to_checkpoint(model)
    return {new for name, x in own.items() for new, _ in convert(name, torch.empty(x.shape, device="meta"))}


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
        if ADAPTER not in name:
            adapted = _adapted(model, name)
            yield name.replace(BASE, "."), _merged(parameter, adapted, dtype) if adapted else _whole(parameter, dtype)
    yield from _kept_buffers(model).items()


def _adapted(model: nn.Module, name: str) -> Any:
    """What has the adapter of a weight, and its scale, by peft's names; None without an adapter."""
    if BASE in name and name.endswith("weight"):
        return model.get_submodule(name.partition(BASE)[0])
    return adapter_of(model, name)


def _merged(parameter: Tensor, adapted: Any, dtype: torch.dtype) -> Tensor:
    """A weight and, in float32, what its adapter adds to it (arXiv 2106.09685, equation 3). Of stacked experts one by one, which
    takes less memory."""
    weight = _whole(parameter, parameter.dtype)
    a, b = (_whole(matrix["default"].weight, torch.float32) for matrix in (adapted.lora_A, adapted.lora_B))
    if getattr(adapted, "is_transposed", False):
        a, b = b.mT, a.mT
    stacks = (x.view(-1, *x.shape[-2:]) for x in (weight, a, b))
    sums = (w.float() + adapted.scaling["default"] * (b_OR @ a_RI) for w, a_RI, b_OR in zip(*stacks, strict=True))
    merged = [(_round_stochastically(x) if dtype == torch.bfloat16 else x).to(dtype) for x in sums]
    return torch.stack(merged).view_as(weight)


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
