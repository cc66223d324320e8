"""What makes samples of 100,000 tokens fit one GPU, layer by layer: inputs of layers wait in host memory for their backward
(``activation_checkpointing: offload``), and an MLP is computed in parts of the rows (``mlp_chunks``).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from pgrpo.attention.hook import current
from pgrpo.model.families.linear import forward_of
from pgrpo.model.recompute import is_training
from pgrpo.planning.dims import mlp_of
from pgrpo.process.pinned import pinning
from pgrpo.types import KEEPS_MLP, Recompute

KEY = "model.activation_checkpointing"
SMALLEST_PIECE = 2**20
"""Bytes."""


def set_up_long_samples(layers: Iterable[nn.Module], recompute: Sequence[Recompute], mlp_chunks: int) -> None:
    """Call this after ``recompute.set_up_layers``.

    Args:
        layers: decoder layers.
        recompute: one entry a layer. Inputs of layers that say ``offload`` are in host memory between forward and backward.
        mlp_chunks: parts of the rows in which the MLPs of all layers that recompute them are computed. Batches of fewer than
            twice as many rows are computed whole.
    """
    host = HostInputs()
    for layer, mode in zip(layers, recompute, strict=True):
        if mode == "offload":
            layer.forward = partial(host.run, layer.forward)
        mlp = mlp_of(layer)
        if mlp_chunks > 1 and mlp is not None and mode not in KEEPS_MLP:
            mlp.__class__ = _in_parts(getattr(mlp, "whole", type(mlp)), mlp_chunks)


class HostInputs:
    """The inputs of layers that wait for their backward in host memory, which is pinned on a GPU. Copies run on a stream of their
    own: out while the layer computes, and back while the backward of the layer behind it does."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._last: Callable[[], _Kept | None] = lambda: None

    def run(self, forward: Callable[..., Tensor], hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``forward(hidden, ...)``. Where autograd would keep ``hidden``, it keeps a copy in host memory."""
        if not torch.is_grad_enabled() or not is_training(current.layout):
            return forward(hidden, *args, **kwargs)
        address, size = hidden.data_ptr(), hidden.numel()

        def pack(x: Tensor) -> Any:
            # Autograd hands out other objects and shapes of the same memory. Parameters and what layers share stay where they are.
            return self._keep(x) if (x.data_ptr(), x.numel()) == (address, size) else x

        def unpack(kept: Any) -> Tensor:
            return kept.fetch() if isinstance(kept, _Kept) else kept

        with saved_tensors_hooks(pack, unpack):
            return forward(hidden, *args, **kwargs)

    def _keep(self, x: Tensor) -> _Kept:
        if x.is_cuda and self._stream is None:
            self._stream = torch.cuda.Stream(x.device)
        kept = _Kept(x, self._stream, self._last)
        self._last = weakref.ref(kept)
        return kept


class _Kept:
    """A tensor in host memory. ``before``: the one that was kept before it, which the backward wants next."""

    def __init__(self, x: Tensor, stream: torch.cuda.Stream | None, before: Callable[[], _Kept | None]) -> None:
        self._device, self._stream, self._before = x.device, stream, before
        self._back: Tensor | None = None
        self._shape, self._sizes = x.shape, piece_sizes(x.numel(), x.element_size())
        with pinning(x.nbytes, "the input of one more layer", KEY, "model.activation_checkpointing=full"):
            self._host = [torch.empty(size, dtype=x.dtype, pin_memory=stream is not None) for size in self._sizes]
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(x.device))
        with self._copying():
            for piece, part in zip(self._host, x.detach().reshape(-1).split(self._sizes), strict=True):
                piece.copy_(part, non_blocking=True)
        if stream is not None:
            x.record_stream(stream)

    def fetch(self) -> Tensor:
        """The tensor on its device. Also begins to copy the next one."""
        self._begin()
        back, self._back = self._back, None
        assert back is not None
        if self._stream is not None:
            here = torch.cuda.current_stream(self._device)
            here.wait_stream(self._stream)
            back.record_stream(here)
        if (before := self._before()) is not None:
            before._begin()
        return back

    def _begin(self) -> None:
        if self._back is None:
            with self._copying():
                self._back = torch.empty(self._shape, dtype=self._host[0].dtype, device=self._device)
                for piece, part in zip(self._host, self._back.view(-1).split(self._sizes), strict=True):
                    part.copy_(piece, non_blocking=True)

    def _copying(self) -> Any:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def piece_sizes(elements: int, element_bytes: int) -> list[int]:
    """Elements of the pieces in which a tensor lies in host memory. PyTorch rounds each piece of pinned memory up to a power of two
    bytes, of which a whole tensor could waste nearly half: these waste less than ``SMALLEST_PIECE``."""
    sizes, left = [], elements
    while left * element_bytes >= SMALLEST_PIECE:
        sizes.append(1 << (left.bit_length() - 1))
        left -= sizes[-1]
    return [*sizes, left] if left or not sizes else sizes


@cache
def _in_parts(whole: type[nn.Module], chunks: int) -> type[nn.Module]:
    """That class of MLPs, computed in parts of the rows. Its backward computes a part again, so that the activations of one part
    alone exist at a time. Compiled code needs no checkpoint for that: a layer that recomputes its MLP recomputes each part where
    it is needed. This is a class, and no function of each MLP, because layers of one class share what is compiled."""

    def forward(mlp: nn.Module, hidden_1TE: Tensor) -> Any:
        compiling = torch.compiler.is_compiling()
        forward_ = whole.forward if compiling else forward_of(mlp, whole)

        def run(part: Tensor) -> Any:
            # Code that is compiled for a part alone would be compiled again for views of another offset: copy.
            return forward_(mlp, part if forward_ is whole.forward else part.clone())

        if not is_training(current.layout):
            return run(hidden_1TE)
        rows = hidden_1TE.shape[1]
        if rows < 2 * chunks:  # to compiled code parts of 0 and 1 rows are other code, and these few rows need no parts
            return whole.forward(mlp, hidden_1TE)
        if torch.is_grad_enabled() and not compiling:
            run = partial(checkpoint, run, use_reentrant=False)
        # The remainder is the last part's. If it were spread out, compiled code would be of one remainder, and compiled for each.
        most = rows // chunks
        parts = [run(part) for part in hidden_1TE.split([most] * (chunks - 1) + [rows - (chunks - 1) * most], 1)]
        if isinstance(parts[0], Tensor):
            return torch.cat(parts, 1)
        return tuple(
            torch.cat(each, each[0].ndim - 2) for each in zip(*parts, strict=True)
        )  # with what a router says of each row

    return type(whole.__name__, (whole,), {"forward": forward, "whole": whole, "__doc__": whole.__doc__})
