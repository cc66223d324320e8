"""Sharding with FSDP2."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
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

from pgrpo.distributed.world import World


def place(
    module: nn.Module,
    layers: Iterable[nn.Module],
    world: World,
    dtype: torch.dtype,
    methods: Sequence[str] = (),
    *,
    offload: bool = False,
    stay_gathered: int = 0,
) -> None:
    """Move a module to this rank's device. FSDP2 shards it, layer by layer, if there are several ranks or the compute dtype is
    not float32: FSDP2 keeps float32 weights and casts them when it gathers a layer. With several replicas (hybrid sharding)
    weights are gathered within a replica, and gradients averaged over the replicas too.

    Args:
        module: the root. Gradients of a sharded root are *averaged* over ranks: scale the loss by ``world.size``.
        layers: submodules that are gathered one at a time.
        dtype: compute dtype of forward and backward. Gradients are reduced in float32.
        methods: names of methods other than ``forward`` that use the root's weights.
        offload: keep the shards in host memory; a layer is on the device only while it computes. No effect on a module that
            FSDP2 does not shard.
        stay_gathered: how many of the layers, the first ones, stay gathered once a forward has gathered them, as the root does:
            until the backward of an update's last micro-batch (``expect_micro_batches``), or ``reshard``.
    """
    if world.size == 1 and dtype == torch.float32:
        module.to(world.device)
        return
    if not dist.is_initialized():
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    names = ("shard",) if world.shards == world.size else ("replicate", "shard")
    sizes = {"replicate": world.size // world.shards, "shard": world.shards}
    mesh = init_device_mesh(world.device.type, tuple(sizes[name] for name in names), mesh_dim_names=names)
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    home = CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if offload else OffloadPolicy()
    for number, part in enumerate((*layers, module)):
        stays = number < stay_gathered or part is module
        fully_shard(part, mesh=mesh, mp_policy=precision, offload_policy=home, reshard_after_forward=not stays)
        part.stays_gathered = stays  # pyright: ignore[reportArgumentType]
    for name in methods:
        register_fsdp_forward_method(module, name)


@contextmanager
def no_gradient(root: nn.Module) -> Iterator[None]:
    """Run forwards without gradients inside this block. FSDP2 keeps the root's parameters gathered from a forward to its
    backward. Without a backward they would stay gathered and take memory from vLLM, so this reshards them at the end."""
    with torch.no_grad():
        try:
            yield
        finally:
            reshard(root)


def expect_backwards(root: nn.Module, *, more: bool) -> None:
    """Whether backwards from now on are followed by another of the same forwards. Then FSDP2 keeps the order of these, by which it
    prefetches."""
    if isinstance(root, FSDPModule):
        root.set_is_last_backward(not more)


def expect_micro_batches(root: nn.Module, world: World, *, more: bool) -> None:
    """Whether backwards from now on are followed by another micro-batch of the update. If not, they free what stays gathered, and
    reduce gradients over ranks.

    Earlier ones reduce gradients too where a rank keeps no more than its shard of them. One that has whole gradients anyway (one
    GPU, or replicas that are not sharded) adds them up: to be reduced they are copied three times in float32, and sent to other
    replicas."""
    for part in _parts(root):
        if world.shards == 1:
            part.set_requires_gradient_sync(not more, recurse=False)
        if part.stays_gathered:
            part.set_reshard_after_backward(not more, recurse=False)


def reshard(root: nn.Module) -> None:
    """Free the gathered parameters. Afterwards ``parameters()`` gives the shards that the optimizer has, in their own dtype;
    gathered parameters are other tensors, in the compute dtype."""
    for part in _parts(root):
        # Of what stays gathered, a part whose forward failed would ignore ``reshard``.
        part.set_reshard_after_forward(True, recurse=False)
        part.reshard()
        part.set_reshard_after_forward(not part.stays_gathered, recurse=False)


def _parts(root: nn.Module) -> list[Any]:
    """What FSDP2 gathers at a time: the root and its layers; nothing of a module that it does not shard."""
    return [part for part in root.modules() if isinstance(part, FSDPModule)]
