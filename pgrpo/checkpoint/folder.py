"""The folder of a run's checkpoints: finding them, adding one atomically, and removing old ones."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pgrpo.checkpoint.files import (
    MANIFEST,
    PREFIX,
    SCALARS,
    Files,
    dump_scalars,
    list_steps,
    sync,
    verify,
    write,
    write_shards,
)
from pgrpo.checkpoint.forms import CheckpointError
from pgrpo.checkpoint.shards import whole
from pgrpo.config import ConfigError

log = logging.getLogger(__name__)

WRITING = ".writing-"  # a checkpoint that is not complete
REPLACED = ".replaced-"  # a complete one that makes room for another of the same step


def save(root: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], scalars: Mapping[str, Any]) -> Path:
    """Write ``root/step_N`` from a single process and return its path. Atomic, and synced to the disk when this returns.

    Args:
        root: folder of the run's checkpoints, created if missing. Leftovers of a killed write in it are removed.
        step: N. An existing ``step_N`` is replaced.
        tensors: set name -> tensor name -> tensor of any shape, dtype and device; stored contiguous.
            Tied ones (the same memory under two names) are an error: pass one of the names.
        scalars: JSON types that are read back equal: string keys, lists instead of tuples, no NaN.

    Raises:
        CheckpointError: NaN or inf in the set ``model``, tied tensors, scalars that JSON would change, or a full disk.
            Older checkpoints are intact in every case.
    """
    root, text = Path(root), dump_scalars(scalars)
    tidy(root)
    try:
        folder = begin(root, step)
        files = write_shards(folder, 0, {s: {n: whole(t) for n, t in named.items()} for s, named in tensors.items()})
        return publish(root, step, files, text)
    except BaseException:
        abandon(root, step)
        raise


def begin(root: Path, step: int) -> Path:
    """The folder that all ranks write a checkpoint into. The first rank to call this creates it."""
    folder = root / f"{WRITING}{PREFIX}{step}"
    if folder.is_symlink():
        raise CheckpointError(f"{folder}: is a symbolic link, which is not written through; remove it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be made ({error})") from error
    return folder


def publish(root: Path, step: int, files: Files, scalars: str) -> Path:
    """Rename the folder of ``begin`` to ``step_N`` after all ranks wrote their ``files``, and return it.

    Raises:
        CheckpointError: a file is missing or has another size than its writer reported, or the disk is full.
    """
    folder, final = root / f"{WRITING}{PREFIX}{step}", root / f"{PREFIX}{step}"
    for name, entry in files.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != entry["size"]:
            raise CheckpointError(f"{folder / name}: missing; all ranks must see the same run_dir")
    for stale in {entry.name for entry in folder.iterdir()} - files.keys():  # of a failed write by more ranks
        remove(folder / stale)
    files |= write(folder / SCALARS, len(scalars), lambda: (folder / SCALARS).write_text(scalars))
    manifest = json.dumps({"step": step, "files": files}, indent=1)
    write(folder / MANIFEST, len(manifest), lambda: (folder / MANIFEST).write_text(manifest))
    sync(folder)
    replaced = root / f"{REPLACED}{final.name}"
    if os.path.lexists(final):
        final.rename(replaced)
    folder.rename(final)
    sync(root)
    remove(replaced)
    return final


def abandon(root: Path, step: int) -> None:
    """Remove the folder of ``begin``."""
    shutil.rmtree(root / f"{WRITING}{PREFIX}{step}", ignore_errors=True)


def latest(root: Path) -> Path | None:
    """The newest checkpoint that verifies. Skips broken ones with a warning."""
    return _newest_good(Path(root), list_steps(Path(root)))


def prune(root: Path, keep: int, spare: Collection[int] = (), written: Collection[int] = ()) -> None:
    """Remove all but the newest ``keep`` checkpoints (>= 1) and those of the steps ``spare``. If none of the newest verifies, the
    newest that does also stays. ``written``: steps that this process has just written, which need no verification."""
    if keep < 1:
        raise ConfigError(f"checkpoint.keep={keep}: must be at least 1")
    root = Path(root)
    steps = list_steps(root)
    old, kept = [step for step in steps[:-keep] if step not in spare], steps[-keep:]
    if not old:
        return
    is_good = not set(written).isdisjoint(kept) or _newest_good(root, kept)
    spared = None if is_good else _newest_good(root, steps[:-keep])
    for step in old:
        path = root / f"{PREFIX}{step}"
        if path != spared:
            # Renamed first, so that a kill halfway leaves no half-removed step_N.
            path.rename(root / f"{WRITING}{path.name}")
            remove(root / f"{WRITING}{path.name}")


def set_aside_after(root: Path, step: int) -> None:
    """Rename checkpoints newer than ``step`` to ``abandoned_step_M``, with a warning.

    For a run that resumes from an older step: otherwise ``latest`` and ``prune`` would take those for its newest.
    """
    for newer in [s for s in list_steps(root) if s > step]:
        path, aside = root / f"{PREFIX}{newer}", root / f"abandoned_{PREFIX}{newer}"
        remove(aside)
        path.rename(aside)
        log.warning("%s is newer than step %d, from which this run resumes: renamed to %s", path, step, aside.name)


def tidy(root: Path) -> None:
    """Clean up after a killed ``save`` or ``prune``. Only the holder of the run's lock may call this."""
    for replaced in root.glob(f"{REPLACED}*"):
        original = root / replaced.name.removeprefix(REPLACED)
        if os.path.lexists(original):
            remove(replaced)
        else:
            replaced.rename(original)
    for leftover in root.glob(f"{WRITING}*"):
        log.warning("%s: removed, left by a killed run", leftover)
        remove(leftover)


def remove(path: Path) -> None:
    """Remove a folder with its contents, a file, or a symbolic link (but not its target)."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
