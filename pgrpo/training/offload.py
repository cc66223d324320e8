"""AdamW with moments in host memory, which are copied to the GPU and back in pieces during an update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from pgrpo.process.pinned import pinning

MOMENTS = ("exp_avg", "exp_avg_sq")
PIECE = 2**26
"""Elements of a moment in one copy: 256 MiB."""
PIECES_ON_GPU = 3
"""One is copied in, one updated, one copied out."""
BUFFER = 2**30
"""Bytes of a buffer of host memory, unless less is needed. PyTorch rounds each up to a power of two: one for each moment would take
a third more memory, and time to pin it."""
ALIGNED = 256
"""Bytes that a moment begins at a multiple of."""


class OffloadedAdamW(torch.optim.AdamW):
    """The same update as ``torch.optim.AdamW(fused=True)``, which it calls on pieces of every parameter.

    Each piece's two moments are copied in on one stream, updated on the main stream and copied out on a third, so copies in both
    directions overlap, and the little arithmetic with them. Parameters and gradients stay on the GPU. The moments are flat parts of
    few large pinned buffers, of this rank's shard.
    """

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings, fused=True)
        self._reserved: Future[dict[Tensor, list[Tensor]]] | None = None

    def reserve(self) -> None:
        """Begin to pin the host memory of all moments, in a thread, as it takes seconds and nothing of the GPU. Not while a CUDA
        graph is captured, which pinning breaks off."""
        if self._reserved is None:
            thread = ThreadPoolExecutor(1, "moments")
            self._reserved = thread.submit(self._zero_moments)
            thread.shutdown(wait=False)

    def init_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The parameter's state; if it has none, make zero moments in host memory."""
        state = self.state[parameter]
        if not state:
            self.reserve()
            assert self._reserved is not None
            state["step"] = torch.zeros((), device=local(parameter).device)
            state |= dict(zip(MOMENTS, self._reserved.result()[parameter], strict=True))
        return state

    def _zero_moments(self) -> dict[Tensor, list[Tensor]]:
        """Zero moments of every parameter."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        shards = [local(parameter) for parameter in parameters]
        places, sizes = pack([shard.nbytes for shard in shards for _ in MOMENTS])
        on_gpu = bool(shards) and shards[0].device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(shards[0].device)  # of this thread
        with pinning(sum(sizes), "AdamW's moments", "optim.offload=cpu", "optim.offload=none"):
            buffers = [torch.zeros(size, dtype=torch.uint8, pin_memory=on_gpu) for size in sizes]
        found: dict[Tensor, list[Tensor]] = {parameter: [] for parameter in parameters}
        each = [(parameter, shard) for parameter, shard in zip(parameters, shards, strict=True) for _ in MOMENTS]
        for (parameter, shard), (buffer, at) in zip(each, places, strict=True):
            found[parameter].append(buffers[buffer][at : at + shard.nbytes].view(shard.dtype))
        return found

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        main, copy_in, copy_out = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()
        buffers = [torch.empty(len(MOMENTS), PIECE, device=main.device) for _ in range(PIECES_ON_GPU)]
        copy_in.wait_stream(main)
        emptied = [torch.cuda.Event() for _ in buffers]
        for i, (group, parameter, gradient, rows) in enumerate(self._pieces()):
            state, slot = self.init_state(parameter), i % PIECES_ON_GPU
            values = local(parameter).view(-1)[rows]
            moments = [row[: len(values)] for row in buffers[slot]]
            with torch.cuda.stream(copy_in):
                copy_in.wait_event(emptied[slot])
                for name, moment in zip(MOMENTS, moments, strict=True):
                    moment.copy_(state[name][rows], non_blocking=True)
            main.wait_stream(copy_in)
            # adamw increments the step in every piece; only a parameter's first piece may.
            step = state["step"] if rows.start == 0 else state["step"] - 1
            adamw(
                [values], [local(gradient).view(-1)[rows]], [moments[0]], [moments[1]], [], [step], fused=True, foreach=False,
                amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
                weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
            )  # fmt: skip
            copy_out.wait_stream(main)
            with torch.cuda.stream(copy_out):
                for name, moment in zip(MOMENTS, moments, strict=True):
                    state[name][rows].copy_(moment, non_blocking=True)
                emptied[slot].record()
        main.wait_stream(copy_out)
        main.synchronize()  # from here the host may read the moments

    def _pieces(self) -> Iterator[tuple[dict[str, Any], Tensor, Tensor, slice]]:
        """(parameter group, parameter, its gradient, rows of their flat shards) of everything that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is not None:
                    for at in range(0, local(parameter).numel(), PIECE):
                        yield group, parameter, gradient, slice(at, at + PIECE)


def pack(sizes: Sequence[int]) -> tuple[list[tuple[int, int]], list[int]]:
    """Places of tensors of so many bytes in few buffers, (buffer, first byte), and the buffers' bytes, which are powers of two. The
    largest first, each into the first buffer that has room."""
    rounded = [-(-size // ALIGNED) * ALIGNED for size in sizes]
    places, buffers, used, left = [(0, 0)] * len(sizes), [], [], sum(rounded)
    for i in sorted(range(len(sizes)), key=lambda i: -rounded[i]):
        size = rounded[i]
        fits = next((b for b, n in enumerate(buffers) if used[b] + size <= n), len(buffers))
        if fits == len(buffers):
            buffers.append(max(_power_of_two(size), min(BUFFER, _power_of_two(left))))
            used.append(0)
        places[i] = fits, used[fits]
        used[fits] += size
        left -= size
    return places, buffers


def _power_of_two(size: int) -> int:
    """The least that is not smaller."""
    return 1 << max(0, size - 1).bit_length()


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
