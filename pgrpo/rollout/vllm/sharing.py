"""Neighbouring ranks that share an engine of vLLM (``tensor_parallel_size``): what they agree on, and their requests, of which each
submits those of all, in the same order and before the same step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pgrpo.distributed.world import World
from pgrpo.process.stopping import Stopped
from pgrpo.rollout.base import More, Wait
from pgrpo.types import Request

T = TypeVar("T")

CHECK_EVERY = 16
"""Ranks that share an engine exchange the stop signal once in this many decoding steps."""


class Sharers:
    """The ranks that share this rank's engine: itself alone, or with its neighbours.

    Args:
        world: this process among all ranks, which construct it together.
        size: ranks of one engine.

    Attributes:
        size: as given.
        rank: this one among them.
        group: of them, for tensors; None of one.
        control: of them, on the CPU, for objects: an awake vLLM leaves no GPU memory.
    """

    def __init__(self, world: World, size: int) -> None:
        self.world, self.size, self.rank = world, size, world.rank % size
        self.group, self.control = None, None
        for first in range(0, world.size if size > 1 else 0, size):
            ranks = list(range(first, first + size))
            groups = dist.new_group(ranks), dist.new_group(ranks, backend="gloo")  # collective: every rank makes all
            if world.rank in ranks:
                self.group, self.control = groups

    def sum(self, values: Tensor) -> Tensor:
        """``values`` added up over these ranks, in place."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def stop_signal(self, step: int) -> int:
        """The signal number that arrived, or 0. Ranks that share an engine must stop at the same step, so they exchange it."""
        if self.group is None:
            return self.world.stop.signum
        if step % CHECK_EVERY:
            return 0
        flag = torch.tensor([self.world.stop.signum], device=self.world.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return int(flag.item())

    def together(self, work: Callable[[], T]) -> T:
        """Run ``work`` and raise on all ranks if it fails on one. With a shared engine only the failing rank raises: the others are
        still inside the engine's collective calls, and the launcher ends them when this rank exits."""
        if self.group is None:
            return self.world.together(work)
        try:
            result = work()
        except Stopped:
            self.world.check_stop()
            raise
        self.world.check_stop()
        return result

    def shares(self) -> Shares | None:
        """Those of a new rollout; None where this rank has the engine for itself."""
        if self.group is None:
            return None
        together = self.world.sequence_parallel_size
        return Shares(self.control, self.size, self.rank, together, lambda: self.world.stop.signum)


class Shares:
    """The requests of one rollout. Its methods are collective calls of the ranks that share the engine.

    Args:
        group: of these ranks, on the CPU.
        size: how many they are.
        rank: this one among them.
        together: of them, so many neighbours have the same requests, which are sampled once.
        signum: the stop signal that arrived on this rank, or 0.

    Attributes:
        own: of each request so far, its position among this rank's; None for those of others.
    """

    def __init__(self, group: Any, size: int, rank: int, together: int, signum: Callable[[], int]) -> None:
        self._group, self._size, self._rank, self._together = group, size, rank, together
        self._signum = signum
        self.own: list[int | None] = []
        self._count = 0

    def gather(self, requests: Sequence[Request]) -> list[Request]:
        """The requests of all ranks, in the order of the ranks."""
        shares: list[Any] = [None] * self._size
        dist.all_gather_object(shares, list(requests), group=self._group)
        for number, share in enumerate(shares[:: self._together]):
            for _ in share:
                is_own = number == self._rank // self._together
                self.own.append(self._count if is_own else None)
                self._count += is_own
        return [request for share in shares[:: self._together] for request in share]

    def more(self, more: More, wait: Wait) -> list[Request]:
        """What ``more`` gives on all ranks. A rank whose episodes are all busy lets the others' go on."""
        while True:
            new = more("soon" if wait == "any" else "no")
            seen = torch.tensor([bool(new), new is not None, self._signum()])
            dist.all_reduce(seen, dist.ReduceOp.MAX, group=self._group)
            are_there, will_come, signum = seen.tolist()
            if are_there:
                return self.gather(new or ())
            if wait == "no" or not will_come or signum:
                return []
