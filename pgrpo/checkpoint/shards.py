"""Shards: the part of a tensor that a rank holds, and its position in the whole tensor."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Sharded


@dataclass(frozen=True)
class Shard:
    """A box of a tensor.

    Attributes:
        tensor: the values.
        shape: of the whole tensor.
        offset: of the box in the whole tensor, one number a dimension.
        replica: number of the replica that this shard belongs to (hybrid sharding).
    """

    tensor: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    replica: int = 0

    @property
    def is_whole(self) -> bool:
        return tuple(self.tensor.shape) == self.shape

    def is_written_by(self, rank: int) -> bool:
        """Whether ``rank``, which holds this shard, saves it: whole tensors rank 0, parts the first replica. Rank 0 saves empty
        parts too, so that a checkpoint has their names."""
        return rank == 0 or not (self.replica or self.is_whole or self.tensor.numel() == 0)

    @property
    def bytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()


def whole(tensor: Tensor) -> Shard:
    """The shard that is a whole tensor."""
    return Shard(tensor.detach(), tuple(tensor.shape), (0,) * tensor.ndim)


def shard_of(tensor: Tensor) -> Shard:
    """This rank's shard of a tensor that FSDP2 may have sharded. Shares its memory; communicates nothing.

    Raises:
        ValueError: the tensor is not sharded along one tensor dimension over the last dimension of the mesh.
    """
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return whole(tensor)
    local, shape, offset = tensor.to_local(), tuple(tensor.shape), [0] * tensor.ndim
    mesh, (*outer, placement) = tensor.device_mesh, tensor.placements
    if len(outer) > 1 or not all(p.is_replicate() for p in outer):
        raise ValueError(f"a tensor placed as {tensor.placements} cannot be saved in shards")
    replica = mesh.get_local_rank(0) if outer else 0
    expected = list(shape)
    if isinstance(placement, Sharded):
        # FSDP2 shards as torch.chunk does: equal parts, rounded up; the last ones are shorter or empty.
        size, rank, length = mesh.size(-1), mesh.get_local_rank(mesh.ndim - 1), shape[placement.dim]
        part = -(-length // size)
        offset[placement.dim] = min(rank * part, length)
        expected[placement.dim] = min((rank + 1) * part, length) - offset[placement.dim]
    if list(local.shape) != expected:
        raise ValueError(f"a tensor placed as {placement} has a part of {list(local.shape)}, not {expected}")
    return Shard(local, shape, tuple(offset), replica)
