"""The ranks of a run: process groups, and what ranks exchange."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pgrpo.process.allocators import set_up_allocators
from pgrpo.process.stopping import StopFlag, Stopped
from pgrpo.process.threads import yielding_cores

T = TypeVar("T")


class RankFailed(RuntimeError):
    """Another rank failed, and its own log has the reason."""


@dataclass(frozen=True)
class World:
    """This process among the ranks of the run."""

    rank: int
    size: int
    device: torch.device
    stop: StopFlag = field(default_factory=StopFlag)
    control: Any = None
    """The gloo group for objects and numbers on the CPU, which does not wait for a GPU. None: the default group, itself gloo."""
    fsdp_size: int | None = None
    """Number of neighbouring ranks that share one replica of the weights. None: all."""
    sequence_parallel_size: int = 1
    """Number of neighbouring ranks that hold the same data. All other numbers of ranks count processes."""
    sequence_group: Any = None
    """The group of these ranks, for tensors; None where each rank has data of its own."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def shards(self) -> int:
        """Number of shards of one replica of the weights. There are ``size / shards`` replicas."""
        return self.fsdp_size or self.size

    @property
    def dp_size(self) -> int:
        """Data-parallel size: the number of ranks with different data."""
        return self.size // self.sequence_parallel_size

    @property
    def dp_rank(self) -> int:
        """This rank's share of the data, from 0 to ``dp_size - 1``."""
        return self.rank // self.sequence_parallel_size

    @property
    def leads(self) -> bool:
        """Whether this rank is the first of those with the same data. Only leading ranks score, send and count data."""
        return self.rank % self.sequence_parallel_size == 0

    def share(self, items: Sequence[T]) -> tuple[list[T], int]:
        """This rank's contiguous part of items that every rank holds, and how many of them are its own. All ranks get equally
        many: the rest are fillers, copies of the last item, whose results must be dropped."""
        count = -(-len(items) // self.dp_size)
        part = list(items[self.dp_rank * count : (self.dp_rank + 1) * count])
        return part + [items[-1]] * (count - len(part)), len(part)

    def from_main(self, item: T) -> T:
        """Rank 0's item, on every rank. A collective call on CPUs."""
        box: list[Any] = [item]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def scatter(self, make: Callable[[], Sequence[T]]) -> T:
        """Item ``dp_rank`` of the sequence that ``make`` returns on rank 0; other ranks do not call it. A collective call on CPUs.

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
        """The items of all leading ranks, on every rank, in rank order. A collective call on CPUs."""
        if self.size == 1:
            return items
        parts: list[list[T]] = [[] for _ in range(self.size)]
        dist.all_gather_object(parts, items if self.leads else [], group=self.control)
        return [item for part in parts for item in part]

    def to_main(self, items: list[T]) -> list[T]:
        """The items of all leading ranks, on rank 0, in rank order; none on the others. A collective call on CPUs."""
        if self.size == 1:
            return items
        parts: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(items if self.leads else [], parts, group=self.control)
        return [item for part in parts or [] for item in part]

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the leading ranks, in-place. A collective call."""
        if not self.leads:
            values.zero_()
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def max(self, values: Tensor) -> Tensor:
        """Maximum over ranks, in-place. A collective call."""
        if self.size > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is true on any rank. A collective call."""
        return bool(self.max(torch.tensor([float(flag)], device=self.device)).item()) if self.size > 1 else flag

    def check_stop(self) -> None:
        """Raise ``Stopped`` on all ranks if a stop signal reached any of them. A collective call on CPUs."""
        self.together(lambda: None)

    def together(self, work: Callable[[], T], *, break_off: bool = False) -> T:
        """Run ``work``, in which nothing is collective, and wait for all ranks to finish theirs. If one fails, all raise. A
        collective call.

        Args:
            break_off: a stop signal interrupts the work.

        Raises:
            Stopped: a stop signal reached a rank; on all ranks.
            Exception: the error of this rank's work; ``RankFailed`` if only other ranks failed. ``all_ranks_know`` is true of both.
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
            error = error or RankFailed(f"rank {failed - 1} failed; its own log has the reason")
            error.__dict__["all_ranks_know"] = True
            raise error
        return result

    def synchronize(self) -> None:
        """Wait for the device: a clock that is read next includes its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def all_ranks_know(error: BaseException | None) -> bool:
    """Whether this error, or one of its causes, ended the same call on all ranks. Then collective calls may follow."""
    while error is not None:
        if error.__dict__.get("all_ranks_know"):
            return True
        error = error.__cause__
    return False


def world_size() -> int:
    """Number of ranks that ``torchrun`` started; 1 without it. Works before ``start``."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def start(fsdp_size: int | None = None, sequence_parallel_size: int = 1) -> Iterator[World]:
    """Join the process group that ``torchrun`` set up (NCCL on GPUs, gloo on CPUs), and leave it at the end of the block. Without
    ``torchrun`` this is the only rank.

    Args:
        fsdp_size: number of ranks that share one replica of the weights (``World.fsdp_size``).
        sequence_parallel_size: number of ranks that hold the same data.
    """
    rank, size = int(os.environ.get("RANK", "0")), world_size()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        set_up_allocators()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    is_ours = not dist.is_initialized()
    if size > 1 and is_ours:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    control = dist.new_group(backend="gloo") if size > 1 and device.type == "cuda" else None
    together = dist.new_subgroups(sequence_parallel_size)[0] if sequence_parallel_size > 1 else None
    try:
        with yielding_cores() if device.type == "cpu" else nullcontext():
            yield World(rank, size, device, StopFlag(), control, fsdp_size, sequence_parallel_size, together)
    finally:
        if is_ours and dist.is_initialized():
            dist.destroy_process_group()
