"""Writes checkpoints in the background while training continues."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.torch_version import TorchVersion

from pgrpo.checkpoint.files import Files, dump_scalars, write_shards
from pgrpo.checkpoint.folder import abandon, begin, prune, publish
from pgrpo.checkpoint.forms import CheckpointError
from pgrpo.checkpoint.shards import Shard
from pgrpo.distributed.world import World

log = logging.getLogger(__name__)
T = TypeVar("T")

CAN_WAIT = TorchVersion(torch.__version__) >= "2.12"
"""Whether torchrun of this PyTorch has TORCH_ELASTIC_SHUTDOWN_TIMEOUT. Read from the version, as importing torchrun is slow."""


class Writer:
    """Writes a run's checkpoints: each rank writes its shards from a copy in host memory.

    ``save`` returns after copying. A thread on every rank then writes and syncs; after all ranks have, rank 0 renames the
    checkpoint and removes old ones. A failure on one rank fails the checkpoint on all ranks; older checkpoints stay intact. The
    host memory of the copy is kept for the next one. Allocating it takes longer than copying, so ``reserve`` does it ahead.

    Args:
        root: folder of the run's checkpoints, the same on all ranks.
        world: the ranks. Building a writer is a collective call.
        keep: newest checkpoints to keep.
    """

    def __init__(self, root: Path, world: World, keep: int) -> None:
        self._root, self._world, self._keep = root, world, keep
        # A separate gloo group: the threads' calls must not mix with those of training, nor wait for a GPU.
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._copies: dict[tuple[str, str], Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._seconds, self._is_warned = 0.0, False

    def reserve(self, sets: Mapping[str, Mapping[str, Shard]]) -> None:
        """Allocate host memory for copies of ``sets`` in the background. Reads only their sizes, so values may change."""
        self.wait()
        like = [((s, name), shard.tensor) for s, named in sets.items() for name, shard in named.items()]

        def touch() -> None:
            for key, tensor in like:
                self._copies[key] = _host(tensor).zero_()

        self._thread = threading.Thread(target=touch, name="pgrpo-checkpoint")
        self._thread.start()

    def save(
        self,
        step: int,
        sets: Mapping[str, Mapping[str, Shard]],
        scalars: Mapping[str, Any],
        spare: Collection[int] = (),
    ) -> None:
        """Wait for the previous checkpoint, copy this rank's shards, and start to write ``step_N``. All ranks call this.

        Args:
            step: N. An existing ``step_N`` is replaced.
            sets: set name -> tensor name -> a shard that this rank writes.
            scalars: rank 0's are written.
            spare: steps that pruning keeps.

        Raises:
            CheckpointError: the previous checkpoint could not be written (``wait``).
        """
        self.wait()
        text = dump_scalars(scalars)
        copies = {name: {n: self._copy(name, n, shard) for n, shard in named.items()} for name, named in sets.items()}
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)
        # Not a daemon: a run that ends by an exception still finishes the checkpoint.
        self._thread = threading.Thread(target=self._run, args=(step, copies, text, spare), name="pgrpo-checkpoint")
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether the last checkpoint is known to have failed; ``wait`` raises the reason."""
        return self._error is not None

    def wait(self) -> None:
        """Wait until the last checkpoint is complete on all ranks.

        Raises:
            CheckpointError: it could not be written, with the reasons of all ranks.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._warn_if_slow()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _copy(self, set_name: str, name: str, shard: Shard) -> Shard:
        tensor, key = shard.tensor, (set_name, name)
        held = self._copies.get(key)
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            held = self._copies[key] = _host(tensor)
        held.copy_(tensor, non_blocking=True)
        return Shard(held, shard.shape, shard.offset)

    def _run(self, step: int, sets: Mapping[str, Mapping[str, Shard]], scalars: str, spare: Collection[int]) -> None:
        started = time.monotonic()
        try:
            self._write(step, sets, scalars, spare)
        except BaseException as error:
            self._error = error
        self._seconds = time.monotonic() - started

    def _write(self, step: int, sets: Mapping[str, Mapping[str, Shard]], scalars: str, spare: Collection[int]) -> None:
        root, files, reason = self._root, Files(), None
        try:
            files = write_shards(begin(root, step), self._world.rank, sets)
        except Exception as error:
            reason = _text(error)
        written = self._gather((files, reason))
        reasons = [text for _, text in written if text]
        if self._world.is_main and not reasons:
            try:
                publish(root, step, {name: entry for part, _ in written for name, entry in part.items()}, scalars)
                prune(root, self._keep, spare, written=[step])
            except Exception as error:
                reasons = [_text(error)]
        reasons = self._gather(reasons)[0]
        if reasons:
            if self._world.is_main:
                abandon(root, step)
            raise CheckpointError("; ".join(dict.fromkeys(reasons)))

    def _warn_if_slow(self) -> None:
        """Warn if writing takes about as long as torchrun waits, after passing on a stop signal, before it kills the ranks."""
        grace = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30)) if CAN_WAIT else 30.0
        near = self._seconds > grace / 2 and "TORCHELASTIC_RUN_ID" in os.environ
        if near and self._world.is_main and not self._is_warned:
            self._is_warned = True
            log.warning(
                "a checkpoint took %.0f s to write, and torchrun kills the ranks %.0f s after it passed Ctrl-C or SIGTERM on, "
                "saved or not: %s",
                self._seconds, grace, "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600" if CAN_WAIT else "stop the ranks by "
                "pkill -TERM -f -- '-u -m pgrpo' (PyTorch 2.12 and newer can wait longer)",
            )  # fmt: skip

    def _gather(self, item: T) -> list[T]:
        if self._group is None:
            return [item]
        items: list[Any] = [None] * self._world.size
        dist.all_gather_object(items, item, group=self._group)
        return items


def _host(tensor: Tensor) -> Tensor:
    """Host memory for a copy, pinned if the tensor is on a GPU."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda")


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
