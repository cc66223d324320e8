"""Requests of ranks that share an engine: each of them submits those of all, in the same order and before the same step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from pgrpo.rollout.base import More, Wait
from pgrpo.types import Request


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
