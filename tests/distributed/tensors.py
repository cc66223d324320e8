"""Whole tensors out of shards and into them."""

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


def full_tensor(tensor):
    """The whole tensor on the CPU, on every rank (a collective call when it is sharded)."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def copy_full(target, full):
    """Write a whole tensor, present on every rank, into a tensor that may be sharded."""
    with torch.no_grad():
        if isinstance(target, DTensor):
            full = full.to(target.device, target.dtype)
            target.copy_(distribute_tensor(full, target.device_mesh, target.placements))
        else:
            target.copy_(full)
