"""Process group, sharding, and how a step's groups are shared out among ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pgrpo.process.stopping import StopFlag, Stopped

T = TypeVar("T")


class RankFailed(RuntimeError):
    """The work of another rank failed, which says why."""


@dataclass(frozen=True)
class World:
    """This process among the ranks of the run."""

    rank: int
    size: int
    device: torch.device
    stop: StopFlag = field(default_factory=StopFlag)
    control: Any = None
    """A process group for numbers on the CPU, so that asking them does not wait for a GPU. None: the default group does it."""
    fsdp_size: int | None = None
    """How many neighbouring ranks one copy of the weights is split over. None: all."""
    sequence_parallel_size: int = 1
    """How many neighbouring ranks hold the same data. Every other number of ranks here counts processes."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def shards(self) -> int:
        """Parts that one copy of the weights is in; there are ``size / shards`` copies."""
        return self.fsdp_size or self.size

    @property
    def dp_size(self) -> int:
        """Data-parallel size: how many ranks hold different data."""
        return self.size // self.sequence_parallel_size

    @property
    def dp_rank(self) -> int:
        """Whose data this rank holds, from 0 to ``dp_size - 1``."""
        return self.rank // self.sequence_parallel_size

    @property
    def leads(self) -> bool:
        """Whether this is the first of the ranks that hold the same data: the one whose data are scored, gathered and counted."""
        return self.rank % self.sequence_parallel_size == 0

    def share(self, items: Sequence[T]) -> tuple[list[T], int]:
        """This rank's contiguous part of items that every rank holds, as many on each rank, and how many of them are its own: the
        rest are fillers, the last item again, of which nothing may be kept."""
        count = -(-len(items) // self.dp_size)
        part = list(items[self.dp_rank * count : (self.dp_rank + 1) * count])
        return part + [items[-1]] * (count - len(part)), len(part)

    def from_main(self, item: T) -> T:
        """Rank 0's item, on every rank. A collective call, not on the GPUs."""
        box: list[Any] = [item]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def scatter(self, make: Callable[[], Sequence[T]]) -> T:
        """Item ``dp_rank`` of what rank 0 makes, which alone calls ``make``. A collective call, not on the GPUs.

        Raises:
            Exception: what ``make`` raised; ``RankFailed`` on the other ranks.
        """
        items: Any = self.together(lambda: make() if self.is_main else None)
        box: list[Any] = [None]
        if self.size == 1:
            return items[0]
        each = [items[rank // self.sequence_parallel_size] for rank in range(self.size)] if self.is_main else None
        dist.scatter_object_list(box, each, src=0, group=self.control)
        return box[0]

    def gather(self, items: list[T]) -> list[T]:
        """The items of every leading rank, on every rank, in rank order. A collective call, not on the GPUs."""
        if self.size == 1:
            return items
        parts: list[list[T]] = [[] for _ in range(self.size)]
        dist.all_gather_object(parts, items if self.leads else [], group=self.control)
        return [item for part in parts for item in part]

    def to_main(self, items: list[T]) -> list[T]:
        """The items of every leading rank, on rank 0, in rank order; none on the others. A collective call, not on the GPUs."""
        if self.size == 1:
            return items
        parts: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(items if self.leads else [], parts, group=self.control)
        return [item for part in parts or [] for item in part]

    def sum(self, values: Tensor) -> Tensor:
        """Sum over leading ranks, in place."""
        if not self.leads:
            values.zero_()
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def max(self, values: Tensor) -> Tensor:
        """Largest over ranks."""
        if self.size > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is true on any rank."""
        return bool(self.max(torch.tensor([float(flag)], device=self.device)).item()) if self.size > 1 else flag

    def check_stop(self) -> None:
        """Raise ``Stopped`` on all ranks once any of them was told to stop. A collective call, which does not wait for a GPU."""
        signum = self.stop.signum
        if self.size > 1:
            largest = torch.tensor([signum])
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.control)
            signum = int(largest.item())
        if signum:
            raise Stopped(signum)

    def together(self, work: Callable[[], T], *, break_off: bool = False) -> T:
        """This rank's own work (nothing collective in it), whose end all ranks wait for and learn of. A collective call.

        Args:
            break_off: a stop signal ends the work in the middle.

        Raises:
            Stopped: a rank was told to stop; on all ranks.
            Exception: what the work raised; ``RankFailed`` on the ranks where it did not. ``all_ranks_know`` of both.
        """
        result: Any = None
        error: BaseException | None = None
        try:
            with self.stop.breaking_off() if break_off else nullcontext():
                result = work()
        except (Exception, Stopped) as caught:
            error = caught
        signum = max(self.stop.signum, error.signum if isinstance(error, Stopped) else 0)
        failed = self.rank + 1 if isinstance(error, Exception) else 0
        if self.size > 1:
            outcome = torch.tensor([signum, failed])
            dist.all_reduce(outcome, dist.ReduceOp.MAX, group=self.control)
            signum, failed = outcome.tolist()
        if signum:
            raise Stopped(signum) from error
        if failed:
            error = error or RankFailed(f"rank {failed - 1} failed, and says why; this rank stopped with it")
            error.__dict__["all_ranks_know"] = True
            raise error
        return result

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read next has its work in it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def all_ranks_know(error: BaseException | None) -> bool:
    """Whether every rank has left the same call because of this error, or its cause, so that collective calls may follow."""
    while error is not None:
        if error.__dict__.get("all_ranks_know"):
            return True
        error = error.__cause__
    return False


def world_size() -> int:
    """Ranks that ``torchrun`` started, this one among them; 1 without it. Known before ``start``."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def start(fsdp_size: int | None = None) -> Iterator[World]:
    """Join the process group that ``torchrun`` set up (NCCL on GPUs, gloo on CPUs), or be the only process; leave at the end.

    Args:
        fsdp_size: ranks that share one copy of the weights (``World.fsdp_size``).
    """
    rank, size = int(os.environ.get("RANK", "0")), world_size()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    control = dist.new_group(backend="gloo") if size > 1 and device.type == "cuda" else None
    try:
        yield World(rank, size, device, control=control, fsdp_size=fsdp_size)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
