"""The files of one checkpoint: each rank writes its shards; files are verified, and read whole or in part."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import combinations
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pgrpo.checkpoint.forms import COUNT, CheckpointError, parse
from pgrpo.checkpoint.shards import Shard
from pgrpo.config import ConfigError

PREFIX = "step_"
MANIFEST, SCALARS = "manifest.json", "scalars.json"
CUT = "cut"
"""Key in a safetensors file's metadata: JSON, name -> [shape of the whole, offset], of tensors that are shards."""
Files = dict[str, dict[str, Any]]
"""File name -> its size and sha256, as the manifest has them."""
MANIFEST_FORM = {"step": COUNT, "files": {str: {"size": COUNT, "sha256": str}}}


def write_shards(folder: Path, rank: int, sets: Mapping[str, Mapping[str, Shard]]) -> Files:
    """Write this rank's files into an existing folder. They are synced to the disk when this returns.

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
    """Call ``content``, which writes a file, sync the file, and read it back for its sha256. CheckpointError: it cannot be written;
    if the disk is full the message has ``need``, the bytes that this rank's part of the checkpoint takes."""
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
    """JSON of scalars. CheckpointError: they would not be equal when read back."""
    text = json.dumps(scalars, indent=1)
    back = json.loads(text)
    if changed := [key for key in scalars if back.get(key) != scalars[key]]:
        raise CheckpointError(
            f"scalars {changed} do not survive JSON: use string keys, lists instead of tuples, and no NaN"
        )
    return text


class Saved:
    """An open checkpoint. Reads from the disk only the tensors, or parts of them, that are asked for.

    Attributes:
        scalars: as given to ``save``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.scalars: dict[str, Any] = parse((path / SCALARS).read_text(), dict, path / SCALARS)
        self._open = ExitStack()
        self._parts: dict[str, dict[str, list[_Part]]] = {}  # set -> tensor name -> its parts
        with ExitStack() as opened:  # closed again on an error
            for name in parse((path / MANIFEST).read_text(), MANIFEST_FORM, path / MANIFEST)["files"]:
                if name.endswith(".safetensors"):
                    self._index(opened, path / name)
            for set_name, named in self._parts.items():
                for name, parts in named.items():
                    _check_cover(parts, f"{path}: {name} in {set_name}")
            self._open = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @property
    def sets(self) -> list[str]:
        return sorted(self._parts)

    def shapes(self, set_name: str) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape of the whole tensor, for all of a set; empty if there is no such set."""
        return {name: parts[0].shape for name, parts in self._parts.get(set_name, {}).items()}

    def read(self, set_name: str, name: str, like: Shard | None = None) -> Tensor:
        """The part of a tensor that the shard ``like`` covers (None: the whole tensor), on the CPU, put together from the shards
        that were written.

        Raises:
            CheckpointError: there is no such tensor, or its shape is not ``like.shape``.
        """
        parts = self._parts.get(set_name, {}).get(name)
        if not parts:
            raise CheckpointError(f"{self.path}: has no {name} in {set_name}")
        shape = parts[0].shape
        if like and like.shape != shape:
            raise CheckpointError(
                f"{self.path}: {name} in {set_name} is {list(shape)} in the checkpoint, {list(like.shape)} here"
            )
        start = like.offset if like else (0,) * len(shape)
        size = tuple(like.tensor.shape) if like else shape
        result: Tensor | None = None
        for part in parts:
            if not shape or (start == part.offset and size == part.size):
                return part.file.get_tensor(name)
            low = [max(a, b) for a, b in zip(start, part.offset, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(start, size, part.offset, part.size, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            values = part.file.get_slice(name)[_box(low, high, part.offset)]
            whole = result if result is not None else values.new_empty(size)
            whole[_box(low, high, start)] = values
            result = whole
        # The parts cover the whole tensor, so there is no result only if ``like`` is empty.
        return result if result is not None else parts[0].file.get_slice(name)[:0].new_empty(size)

    def _index(self, opened: ExitStack, path: Path) -> None:
        # safetensors holds bytes of known types: nothing in the file can run.
        file = opened.enter_context(safe_open(path, framework="pt"))
        names = list(file.keys())
        cut = parse((file.metadata() or {}).get(CUT, "{}"), {str: [[COUNT]]}, f"{path}: {CUT}")
        if strange := [name for name, box in cut.items() if name not in names or len(box) != 2]:
            raise CheckpointError(f"{path}: {CUT}: {strange[0]!a} is no part of a tensor")
        own = self._parts.setdefault(path.name.rsplit(".", 2)[0], {})
        for name in names:
            piece = file.get_slice(name)
            size = piece.get_shape()
            shape, offset = cut.get(name) or (size, [0] * len(size))
            own.setdefault(name, []).append(
                _Part(file, tuple(offset), tuple(size), tuple(shape), str(piece.get_dtype()))
            )


class _Part(NamedTuple):
    """A box of a tensor in one file: its offset in the whole tensor, its size, and the shape of the whole."""

    file: Any
    offset: tuple[int, ...]
    size: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str


def _check_cover(parts: Sequence[_Part], where: str) -> None:
    """CheckpointError unless the parts make up one tensor: same shape and dtype, inside the shape, disjoint, without gaps."""
    shape = parts[0].shape
    if any(part.shape != shape or part.dtype != parts[0].dtype or len(part.size) != len(shape) for part in parts):
        raise CheckpointError(f"{where}: its parts are of different tensors")
    if prod(max(n, 1) for n in shape) >= 2**62 or any(
        len(part.offset) != len(shape) or any(o + n > m for o, n, m in zip(part.offset, part.size, shape, strict=True))
        for part in parts
    ):
        raise CheckpointError(f"{where}: a part of it lies outside of its shape {list(shape)}")
    if sum(prod(part.size) for part in parts) != prod(shape):
        raise CheckpointError(f"{where}: a part of it is missing")
    for one, other in combinations([part for part in parts if prod(part.size)], 2):
        boxes = zip(one.offset, one.size, other.offset, other.size, strict=True)
        if all(a < b + m and b < a + n for a, n, b, m in boxes):
            raise CheckpointError(f"{where}: two parts of it overlap")


def open_saved(path: Path, *, verified: bool = False) -> Saved:
    """Open a ``step_N`` folder. Verifies all files first, unless ``verified`` says that this was done.

    Raises:
        ConfigError: there is no such folder; the message lists the steps in its parent folder.
        CheckpointError: a file is missing, or its size or sha256 is not as in the manifest.
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
    """Read ``(tensors, scalars)`` as given to ``save``: whole tensors, on the CPU, bit-equal.

    Args:
        path: a ``step_N`` folder. All files are verified.
        only: names of the tensor sets to read. None reads all.

    Raises:
        ConfigError, CheckpointError: as ``open_saved``.
    """
    with open_saved(path) as saved:
        wanted = [name for name in saved.sets if only is None or name in only]
        tensors = {s: {name: saved.read(s, name) for name in saved.shapes(s)} for s in wanted}
        return tensors, saved.scalars


def verify(path: Path) -> list[str]:
    """Read every byte of a checkpoint and return its file names. CheckpointError names the first damaged file."""
    manifest = path / MANIFEST
    try:
        content = parse(manifest.read_text(), MANIFEST_FORM, manifest)
        step, expected = content["step"], content["files"]
        if path.name.startswith(PREFIX) and path.name != f"{PREFIX}{step}":
            raise CheckpointError(f"{manifest}: is of step {step}, the folder is {path.name}")
        if unlisted := {SCALARS, *(file.name for file in path.glob("*.safetensors"))} - expected.keys():
            raise CheckpointError(f"{manifest}: does not list {min(unlisted)}")
        for name, entry in expected.items():
            if not re.fullmatch(r"[\w.-]{1,200}", name, re.ASCII):
                raise CheckpointError(f"{manifest}: lists {name!a:.80}: missing, it is no name of a file here")
            file = path / name
            if not file.is_file():
                raise CheckpointError(f"{file}: missing")
            if file.stat().st_size != entry["size"]:
                raise CheckpointError(f"{file}: {file.stat().st_size} bytes, {entry['size']} were written")
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            for name, sha256 in zip(expected, threads.map(lambda name: _sha256(path / name), expected), strict=True):
                if sha256 != expected[name]["sha256"]:
                    raise CheckpointError(f"{path / name}: content changed since it was written (sha256 differs)")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
    return list(expected)


def list_steps(root: Path) -> list[int]:
    """Steps with a folder in ``root``, ascending, not verified. Ignores ``step_007``, files and symbolic links."""
    entries = list(root.glob(f"{PREFIX}*")) if root.is_dir() else []
    names = [entry.name.removeprefix(PREFIX) for entry in entries if entry.is_dir() and not entry.is_symlink()]
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]{0,17}", name))


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
        # aminmax is NaN if any entry is: one pass, without a mask of the tensor's size.
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
    # safetensors reports I/O errors as text only. EFBIG: the limit of file sizes of this process.
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError):
        return error.errno in full
    return any(f"(os error {code})" in str(error) for code in full)
