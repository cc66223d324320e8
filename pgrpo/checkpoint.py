"""Checkpoints: named sets of tensors and JSON scalars, written whole or not at all. Knows nothing of models.

    step_40/
      model.safetensors      one file a tensor set
      optimizer.safetensors
      scalars.json
      manifest.json          step, and size and sha256 of every other file

A checkpoint is written under a hidden name, synced to the disk and renamed, so a ``step_N`` that exists was once
complete; the manifest tells whether it still is. Nothing here pickles: tensors are safetensors, the rest is JSON.

The run folder's lock lives here too, since it is what makes cleaning up after a killed write safe.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Container, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pgrpo.config import ConfigError

log = logging.getLogger(__name__)

PREFIX = "step_"
WRITING = ".writing-"  # a checkpoint that is not complete
REPLACED = ".replaced-"  # a complete one that makes room for another of the same step
MANIFEST, SCALARS = "manifest.json", "scalars.json"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or is not what was written. The message names the file."""


def save(root: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], scalars: Mapping[str, Any]) -> Path:
    """Write ``root/step_N`` and return its path. Durable when this returns; until then ``step_N`` does not exist.

    Args:
        root: folder of the run's checkpoints, made if missing. Leftovers of a killed write in it are removed.
        step: N. An existing ``step_N`` is replaced.
        tensors: set name -> tensor name -> tensor of any shape, dtype and device; stored contiguous.
            Tied ones (the same memory under two names) are an error: pass one of the names.
        scalars: what must come back equal from JSON: string keys, lists instead of tuples, no NaN.

    Raises:
        CheckpointError: NaN or inf in the set ``model``, tied tensors, scalars that JSON would change, or a full disk.
            Older checkpoints are intact in every case.
    """
    root = Path(root)
    for set_name, named in tensors.items():
        _check_tensors(set_name, named)
    text = _dump_scalars(scalars)
    final = root / f"{PREFIX}{step}"
    writing = root / f"{WRITING}{final.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        tidy(root)
        _write(writing, step, tensors, text)
        _rename_over(writing, final)
    except BaseException as error:
        shutil.rmtree(writing, ignore_errors=True)
        if not _disk_full(error):
            raise
        need = sum(t.numel() * t.element_size() for named in tensors.values() for t in named.values()) + len(text)
        raise CheckpointError(
            f"{final}: no space left on the disk; the checkpoint needs {need} bytes ({need / 2**30:.2f} GiB); older "
            "checkpoints are intact; free some space, or lower checkpoint.keep"
        ) from error
    return final


def load(path: Path, only: Container[str] | None = None) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read ``(tensors, scalars)`` as they were given to ``save``; the tensors are on the CPU, bit-equal.

    Args:
        path: a ``step_N`` folder. All of it is verified.
        only: the tensor sets to read. None reads all.

    Raises:
        ConfigError: there is no such folder; lists the steps that exist beside it.
        CheckpointError: a file is missing, or its size or sha256 is not the manifest's.
    """
    path = Path(path)
    if not path.is_dir():
        steps = ", ".join(map(str, list_steps(path.parent))) or "none"
        raise ConfigError(f"no checkpoint at {path}; steps that exist in {path.parent}: {steps}")
    files = verify(path)
    sets = [name.removesuffix(".safetensors") for name in files if name.endswith(".safetensors")]
    tensors = {name: load_file(path / f"{name}.safetensors") for name in sets if only is None or name in only}
    return tensors, json.loads((path / SCALARS).read_text())


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
    for name, (size, sha256) in expected.items():
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise CheckpointError(f"{file}: missing")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file}: {file.stat().st_size} bytes, {size} were written")
        if _sha256(file) != sha256:
            raise CheckpointError(f"{file}: content changed since it was written (sha256 differs)")
    return list(expected)


def list_steps(root: Path) -> list[int]:
    """Steps that have a folder in ``root``, ascending, verified or not."""
    names = [entry.name.removeprefix(PREFIX) for entry in root.glob(f"{PREFIX}*")] if root.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def latest(root: Path) -> Path | None:
    """The newest checkpoint that verifies. Each broken one on the way there is skipped with a warning."""
    return _newest_good(Path(root), list_steps(Path(root)))


def prune(root: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints (>= 1); if none of those verifies, the newest that does stays."""
    if keep < 1:
        raise ConfigError(f"checkpoint.keep={keep}: must be at least 1")
    root = Path(root)
    steps = list_steps(root)
    old, kept = steps[:-keep], steps[-keep:]
    if not old:
        return
    spared = None if _newest_good(root, kept) else _newest_good(root, old)
    for step in old:
        path = root / f"{PREFIX}{step}"
        if path != spared:
            # Renamed first, so that a kill halfway leaves no half-removed step_N.
            path.rename(root / f"{WRITING}{path.name}")
            shutil.rmtree(root / f"{WRITING}{path.name}")


def set_aside_after(root: Path, step: int) -> None:
    """Rename checkpoints newer than ``step`` to ``abandoned_step_M``, with a warning.

    A run that goes on from an older step calls this: ``latest`` and ``prune`` would still take those for its newest.
    """
    for newer in [s for s in list_steps(root) if s > step]:
        path, aside = root / f"{PREFIX}{newer}", root / f"abandoned_{PREFIX}{newer}"
        if aside.exists():
            shutil.rmtree(aside)
        path.rename(aside)
        log.warning("%s is newer than step %d, from which this run goes on: renamed to %s", path, step, aside.name)


def tidy(root: Path) -> None:
    """Undo what a killed ``save`` or ``prune`` left. Only the holder of the run's lock may call this."""
    for replaced in root.glob(f"{REPLACED}*"):
        original = root / replaced.name.removeprefix(REPLACED)
        if original.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(original)
    for leftover in root.glob(f"{WRITING}*"):
        log.warning("%s: removed, left by a killed run", leftover)
        shutil.rmtree(leftover)


def lock_run_dir(run_dir: Path) -> IO[str]:
    """Take the run folder for this process, until the result is closed or the process ends.

    ConfigError if another process has it.

    A record lock (``lockf``) is not inherited by children, so a reward worker that outlives a killed run holds nothing.
    """
    lock = open(Path(run_dir) / ".lock", "a+")  # noqa: SIM115 - stays open, that is the lock
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.seek(0)
        owner = lock.read().strip() or "unknown"
        lock.close()
        raise ConfigError(
            f"run_dir={run_dir}: another run ({owner}) is using it; stop that run or set another run_dir"
        ) from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return lock


def open_run_dir(run_dir: Path, resume: bool) -> IO[str]:
    """Make and lock the run folder and return the lock; call it on rank 0 and keep the result until the run ends.

    Raises:
        ConfigError: the folder is in use, cannot be made, or has files in it while ``resume`` is false.
    """
    run_dir = Path(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        names = {entry.name for entry in run_dir.iterdir()}
        # Without resume a folder that is not a run's gets no lock file of ours.
        lock = lock_run_dir(run_dir) if resume or ".lock" in names or not names else None
    except OSError as error:
        raise ConfigError(f"run_dir={run_dir}: cannot be used ({error.strerror}); set another run_dir") from error
    if names - {".lock"} and not resume:
        if lock is not None:
            lock.close()
        raise ConfigError(f"run_dir={run_dir}: not empty; go on with that run (--resume auto), or set another run_dir")
    assert lock is not None
    tidy(run_dir / "checkpoints")
    return lock


def _check_tensors(set_name: str, named: Mapping[str, Tensor]) -> None:
    owners: dict[tuple[torch.device, int], str] = {}
    for name, tensor in named.items():
        if set_name == "model" and tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"model weight {name} holds NaN or inf: not saved; lower optim.lr or optim.max_grad_norm"
            )
        if tensor.numel():
            other = owners.setdefault((tensor.device, tensor.data_ptr()), name)
            if other != name:
                raise CheckpointError(
                    f"tensor set {set_name}: {other} and {name} share memory (tied): pass one of them"
                )


def _dump_scalars(scalars: Mapping[str, Any]) -> str:
    text = json.dumps(scalars, indent=1)
    back = json.loads(text)
    if changed := [key for key in scalars if back.get(key) != scalars[key]]:
        raise CheckpointError(
            f"scalars {changed} do not survive JSON: use string keys, lists instead of tuples, and no NaN"
        )
    return text


def _write(folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], scalars: str) -> None:
    folder.mkdir()
    for set_name, named in tensors.items():
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
        save_file(held, folder / f"{set_name}.safetensors")
    (folder / SCALARS).write_text(scalars)
    files = {}
    for file in sorted(folder.iterdir()):
        _sync(file)
        files[file.name] = {"size": file.stat().st_size, "sha256": _sha256(file)}
    (folder / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=1))
    _sync(folder / MANIFEST)
    _sync(folder)


def _rename_over(new: Path, final: Path) -> None:
    replaced = final.parent / f"{REPLACED}{final.name}"
    if final.exists():
        final.rename(replaced)
    new.rename(final)
    _sync(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _newest_good(root: Path, steps: list[int]) -> Path | None:
    for step in reversed(steps):
        path = root / f"{PREFIX}{step}"
        try:
            verify(path)
        except CheckpointError as error:
            log.warning("checkpoint %s is broken and skipped: %s", path.name, error)
        else:
            return path
    return None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _disk_full(error: BaseException) -> bool:
    # safetensors reports an I/O error of its writer as text only.
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in full
    return isinstance(error, SafetensorError) and any(f"(os error {code})" in str(error) for code in full)
