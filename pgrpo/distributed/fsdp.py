"""Sharding: FSDP2 around a policy, and whole tensors out of its shards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from pgrpo.distributed.world import World


def place(
    module: nn.Module,
    layers: Iterable[nn.Module],
    world: World,
    dtype: torch.dtype,
    methods: Sequence[str] = (),
    *,
    offload: bool = False,
) -> None:
    """Put a module on this rank's device: sharded by FSDP2, layer by layer, where there are several ranks or the compute
    dtype is not float32 (FSDP2 keeps float32 masters and casts what it gathers); as it is otherwise. With several copies
    (hybrid sharding), weights are gathered among the ranks that share one, and gradients averaged over the copies as well.

    Args:
        module: the root. Gradients of a sharded root are *averaged* over ranks: scale the loss by ``world.dp_size``.
        layers: submodules that are gathered one at a time.
        dtype: what the forward and backward compute in. Gradients are reduced in float32.
        methods: names of methods beside ``forward`` that use the root's weights.
        offload: keep the shards in host memory; a layer visits the device while it computes. Needs a compute dtype or ranks
            that FSDP2 is for.
    """
    if world.size == 1 and dtype == torch.float32:
        module.to(world.device)
        return
    if not dist.is_initialized():
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    if world.shards == world.size:
        mesh = init_device_mesh(world.device.type, (world.size,))
    else:
        mesh = init_device_mesh(
            world.device.type, (world.size // world.shards, world.shards), mesh_dim_names=("replicate", "shard")
        )
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    home = CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if offload else OffloadPolicy()
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision, offload_policy=home)
    fully_shard(module, mesh=mesh, mp_policy=precision, offload_policy=home)
    for name in methods:
        register_fsdp_forward_method(module, name)


class Root(Protocol):
    """A module that ``place`` was given."""

    def modules(self) -> Iterator[nn.Module]: ...


@contextmanager
def no_gradient(root: Root) -> Iterator[None]:
    """Every forward without a gradient belongs in here. FSDP2 keeps the root's parameters gathered from a forward to its backward;
    where no backward comes they would lie beside an awake vLLM, so they are shards again at the end."""
    with torch.no_grad():
        try:
            yield
        finally:
            reshard(root)


def reshard(root: Root) -> None:
    """Make all parameters shards again, in the dtype that they are held in. While gathered they are in the compute dtype, and what
    ``parameters()`` gives is not what the optimizer knows."""
    for part in root.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor on the CPU, on every rank (a collective call when it is sharded)."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def copy_full(target: Tensor, full: Tensor) -> None:
    """Write a whole tensor, present on every rank, into a tensor that may be sharded."""
    with torch.no_grad():
        if isinstance(target, DTensor):
            full = full.to(target.device, target.dtype)
            target.copy_(distribute_tensor(full, target.device_mesh, target.placements))
        else:
            target.copy_(full)
