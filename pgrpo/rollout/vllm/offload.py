"""Moves what only updates need to host memory while vLLM samples, so that its cache gets that GPU memory.

It empties whole storages and fills them again, so that every view of them stays valid: parameters, FSDP2's flat shards, moments.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress

import torch
from torch import Tensor, UntypedStorage

from pgrpo.process.pinned import pinning

PIECE = 2**28
"""Bytes of one pinned buffer. PyTorch rounds each buffer up to a power of 2, so one for each tensor would waste a third."""
LEAST = 2**20
"""Smaller storages stay: the allocator keeps small tensors together, in segments that it could not give back anyway."""

KEY = "rollout.offload_policy"


class Offload:
    """Moves tensors to pinned host memory and back. The buffers are made once, when they are first needed.

    Args:
        tensors: gives the tensors to move, each time that they leave.
        staying: bytes of them that may stay. They leave in the order of ``tensors``, in which they were allocated: what stays in
            between would hold parts of the allocator's segments.

    Attributes:
        seconds: of the last two moves, without what was done meanwhile.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]] = tuple, staying: float = 0.0) -> None:
        self.tensors, self.staying = tensors, staying
        self.seconds = 0.0
        self._pieces: list[Tensor] = []
        self._away: list[tuple[UntypedStorage, int]] = []

    @contextmanager
    def away(self, meanwhile: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Inside this block the storages of the tensors that left are empty, and their GPU memory is free. ``meanwhile``: what may
        read them, while a GPU copies them on a stream of its own; if it fails, nothing has left."""
        self._leave(meanwhile)
        try:
            yield
        except BaseException:
            with suppress(RuntimeError):  # after a device error this fails too; report the first error
                self._return()
            raise
        self._return()

    def _leave(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        started = time.perf_counter()
        storages = {storage.data_ptr(): storage for tensor in self.tensors() if (storage := tensor.untyped_storage())}
        left, leaving = sum(storage.nbytes() for storage in storages.values()), []
        for storage in storages.values():
            if left > self.staying and (size := storage.nbytes()) >= LEAST:
                leaving.append((storage, size))
                left -= size
        on_gpu = any(storage.device.type == "cuda" for storage, _ in leaving)
        with torch.cuda.stream(_behind_this_stream()) if on_gpu else nullcontext():
            self._copy(leaving, to_host=True)
        begun = time.perf_counter()
        meanwhile()
        resumed = time.perf_counter()
        if on_gpu:
            torch.cuda.synchronize()
        for storage, _ in leaving:
            storage.resize_(0)
        self._away = leaving
        if on_gpu:
            torch.cuda.empty_cache()
        self.seconds = time.perf_counter() - resumed + begun - started

    def _return(self) -> None:
        started = time.perf_counter()
        for storage, size in self._away:
            storage.resize_(size)
        self._copy(self._away, to_host=False)
        if any(storage.device.type == "cuda" for storage, _ in self._away):
            torch.cuda.synchronize()
        self._away = []
        self.seconds += time.perf_counter() - started

    def _copy(self, storages: Sequence[tuple[UntypedStorage, int]], *, to_host: bool) -> None:
        """Copy the storages to the buffers, one after the other, or back from there. A GPU has not finished when this returns."""
        at, total = 0, sum(size for _, size in storages)
        for storage, size in storages:
            on_gpu = storage.device.type == "cuda"
            own = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            first = 0
            while first < size:
                number, start = divmod(at, PIECE)
                if number == len(self._pieces):
                    with pinning(total, "the policy while vLLM samples", KEY, "rollout.offload_policy=never"):
                        self._pieces.append(torch.empty(PIECE, dtype=torch.uint8, pin_memory=on_gpu))
                length = min(size - first, PIECE - start)
                here, there = own[first : first + length], self._pieces[number][start : start + length]
                (there if to_host else here).copy_(here if to_host else there, non_blocking=True)
                first, at = first + length, at + length


def _behind_this_stream() -> torch.cuda.Stream:
    """A new stream that begins when the current one has done what it has."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    return stream
