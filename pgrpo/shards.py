"""What part of a tensor this rank holds, and where it lies in the whole."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Sharded


@dataclass(frozen=True)
class Shard:
    """``tensor`` is the box that starts at ``offset`` in a whole tensor of ``shape`` (both have the whole's dimensions)."""

    tensor: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]

    @property
    def is_whole(self) -> bool:
        return tuple(self.tensor.shape) == self.shape

    @property
    def bytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()


def whole(tensor: Tensor) -> Shard:
    """A tensor that is not cut."""
    return Shard(tensor.detach(), tuple(tensor.shape), (0,) * tensor.ndim)


def shard_of(tensor: Tensor) -> Shard:
    """This rank's part of a tensor that FSDP2 may have cut; shares its memory. Nothing is communicated.

    Raises:
        ValueError: cut in another way than along one dimension of a mesh of one dimension.
    """
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return whole(tensor)
    local, shape, offset = tensor.to_local(), tuple(tensor.shape), [0] * tensor.ndim
    if tensor.device_mesh.ndim != 1:
        raise ValueError(f"a tensor on a mesh of {tensor.device_mesh.ndim} dimensions cannot be saved in shards")
    placement = tensor.placements[0]
    expected = list(shape)
    if isinstance(placement, Sharded):
        # torch.chunk's rule: equal parts, rounded up; the last ones are shorter, or empty.
        size, rank, length = tensor.device_mesh.size(), tensor.device_mesh.get_local_rank(), shape[placement.dim]
        part = -(-length // size)
        offset[placement.dim] = min(rank * part, length)
        expected[placement.dim] = min((rank + 1) * part, length) - offset[placement.dim]
    if list(local.shape) != expected:
        raise ValueError(f"a tensor placed as {placement} has a part of {list(local.shape)}, not {expected}")
    return Shard(local, shape, tuple(offset))
