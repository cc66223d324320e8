"""The files of one checkpoint: written by all ranks, each its own shards; verified; read whole or in any part."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pgrpo.config import ConfigError
from pgrpo.distributed.shards import Shard

PREFIX = "step_"
MANIFEST, SCALARS = "manifest.json", "scalars.json"
CUT = "cut"
"""Key in a safetensors file's metadata: JSON, name -> [shape of the whole, offset], of the tensors that are a part."""
Files = dict[str, dict[str, Any]]
"""File name -> its size and sha256, as the manifest has them."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or is not what was written. The message names the file."""


def write_shards(folder: Path, rank: int, sets: Mapping[str, Mapping[str, Shard]]) -> Files:
    """Write this rank's files into a folder that exists; on the disk when this returns.

    Raises:
        CheckpointError: a weight (set ``model``) is not finite, tensors share memory, or the disk is full.
    """
    for set_name, named in sets.items():
        _check(set_name, named)
    files: Files = {}
    need = sum(shard.bytes for named in sets.values() for shard in named.values())
    for set_name, named in sets.items():
        if not named:
            continue
        file = folder / f"{set_name}.{rank}.safetensors"
        cut = {name: [shard.shape, shard.offset] for name, shard in named.items() if not shard.is_whole}
        held = {name: shard.tensor.cpu().contiguous() for name, shard in named.items()}
        files |= write(file, need, lambda file=file, held=held, cut=cut: save_file(held, file, {CUT: json.dumps(cut)}))
    return files


def write(file: Path, need: int, content: Callable[[], Any]) -> Files:
    """Have ``content`` write a file, sync it, and read it back for its sum. CheckpointError: the disk takes no ``need`` bytes."""
    try:
        content()
        sync(file)
        return {file.name: {"size": file.stat().st_size, "sha256": _sha256(file)}}
    except (OSError, SafetensorError) as error:
        if not _disk_full(error):
            raise CheckpointError(f"{file}: cannot be written ({error})") from error
        raise CheckpointError(
            f"{file}: no space left on the disk; this rank's part of the checkpoint needs {need} bytes "
            f"({need / 2**30:.2f} GiB); older checkpoints are intact; free some space, or lower checkpoint.keep"
        ) from error


def dump_scalars(scalars: Mapping[str, Any]) -> str:
    """As JSON. CheckpointError if they would not come back equal."""
    text = json.dumps(scalars, indent=1)
    back = json.loads(text)
    if changed := [key for key in scalars if back.get(key) != scalars[key]]:
        raise CheckpointError(
            f"scalars {changed} do not survive JSON: use string keys, lists instead of tuples, and no NaN"
        )
    return text


class Saved:
    """A checkpoint to be read, piece by piece: only what is asked for is read from the disk.

    Attributes:
        scalars: as they were given to ``save``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.scalars: dict[str, Any] = json.loads((path / SCALARS).read_text())
        self._open = ExitStack()
        self._parts: dict[str, dict[str, list[tuple[Any, tuple[int, ...]]]]] = {}  # set -> name -> (file, offset)
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        for name in json.loads((path / MANIFEST).read_text())["files"]:
            if name.endswith(".safetensors"):
                self._index(name)
        for set_name, parts in self._parts.items():
            for name, pieces in parts.items():
                there = sum(prod(file.get_slice(name).get_shape()) for file, _ in pieces)
                if there != prod(self._shapes[set_name][name]):
                    raise CheckpointError(f"{path}: a part of {name} in {set_name} is missing")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @property
    def sets(self) -> list[str]:
        return sorted(self._parts)

    def shapes(self, set_name: str) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape of the whole, of a set; empty if there is no such set."""
        return self._shapes.get(set_name, {})

    def read(self, set_name: str, name: str, like: Shard | None = None) -> Tensor:
        """The part of a tensor that lies where ``like`` lies (None: all of it), on the CPU, whoever wrote it in what parts."""
        shape = self._shapes[set_name][name]
        start = like.offset if like else (0,) * len(shape)
        size = tuple(like.tensor.shape) if like else shape
        result: Tensor | None = None
        for file, offset in self._parts[set_name][name]:
            piece = file.get_slice(name)
            length = piece.get_shape()
            if not shape or (start == offset and list(size) == length):
                return file.get_tensor(name)
            low = [max(a, b) for a, b in zip(start, offset, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(start, size, offset, length, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            values = piece[_box(low, high, offset)]
            whole = result if result is not None else values.new_empty(size)
            whole[_box(low, high, start)] = values
            result = whole
        return result if result is not None else torch.empty(size)

    def _index(self, file_name: str) -> None:
        # Read as bytes of known types: nothing in the file can run.
        file = self._open.enter_context(safe_open(self.path / file_name, framework="pt"))
        cut = json.loads((file.metadata() or {}).get(CUT, "{}"))
        set_name = file_name.rsplit(".", 2)[0]
        for name in file.keys():  # noqa: SIM118 - not a dict
            shape, offset = cut.get(name) or (
                file.get_slice(name).get_shape(),
                [0] * len(file.get_slice(name).get_shape()),
            )
            self._parts.setdefault(set_name, {}).setdefault(name, []).append((file, tuple(offset)))
            self._shapes.setdefault(set_name, {})[name] = tuple(shape)


def open_saved(path: Path, *, verified: bool = False) -> Saved:
    """A ``step_N`` folder, to be read. All of it is verified first, unless it was just now.

    Raises:
        ConfigError: there is no such folder; lists the steps that exist beside it.
        CheckpointError: a file is missing, or its size or sha256 is not the manifest's.
    """
    path = Path(path)
    if not path.is_dir():
        steps = ", ".join(map(str, list_steps(path.parent))) or "none"
        raise ConfigError(f"no checkpoint at {path}; steps that exist in {path.parent}: {steps}")
    if not verified:
        verify(path)
    try:
        return Saved(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error


def load(path: Path, only: Container[str] | None = None) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read ``(tensors, scalars)`` as they were given to ``save``; the tensors are whole, on the CPU, bit-equal.

    Args:
        path: a ``step_N`` folder. All of it is verified.
        only: the tensor sets to read. None reads all.

    Raises:
        ConfigError, CheckpointError: as ``open_saved``.
    """
    with open_saved(path) as saved:
        wanted = [name for name in saved.sets if only is None or name in only]
        tensors = {s: {name: saved.read(s, name) for name in saved.shapes(s)} for s in wanted}
        return tensors, saved.scalars


def verify(path: Path) -> list[str]:
    """Read every byte of a checkpoint and return its file names; CheckpointError names the first file that is wrong."""
    manifest = path / MANIFEST
    try:
        content = json.loads(manifest.read_text())
        step, files = content["step"], dict(content["files"])
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{manifest}: unreadable ({type(error).__name__}: {error})") from error
    if path.name.startswith(PREFIX) and path.name != f"{PREFIX}{step}":
        raise CheckpointError(f"{manifest}: is of step {step}, the folder is {path.name}")
    if SCALARS not in expected:
        raise CheckpointError(f"{manifest}: does not list {SCALARS}")
    for name, (size, _) in expected.items():
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise CheckpointError(f"{file}: missing")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file}: {file.stat().st_size} bytes, {size} were written")
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for name, sha256 in zip(expected, threads.map(lambda name: _sha256(path / name), expected), strict=True):
            if sha256 != expected[name][1]:
                raise CheckpointError(f"{path / name}: content changed since it was written (sha256 differs)")
    return list(expected)


def list_steps(root: Path) -> list[int]:
    """Steps that have a folder in ``root``, ascending, verified or not."""
    names = [entry.name.removeprefix(PREFIX) for entry in root.glob(f"{PREFIX}*")] if root.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check(set_name: str, named: Mapping[str, Shard]) -> None:
    owners: dict[tuple[torch.device, int], str] = {}
    for name, shard in named.items():
        tensor = shard.tensor
        if not tensor.numel():
            continue
        # The extremes are NaN when any entry is: one pass, and no mask of the tensor's size.
        if set_name == "model" and tensor.is_floating_point() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise CheckpointError(
                f"model weight {name} holds NaN or inf: not saved; lower optim.lr or optim.max_grad_norm"
            )
        other = owners.setdefault((tensor.device, tensor.data_ptr()), name)
        if other != name:
            raise CheckpointError(f"tensor set {set_name}: {other} and {name} share memory (tied): pass one of them")


def _box(low: Sequence[int], high: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _disk_full(error: BaseException) -> bool:
    # safetensors reports an I/O error of its writer as text only. EFBIG: the largest file that this process may write.
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError):
        return error.errno in full
    return any(f"(os error {code})" in str(error) for code in full)
