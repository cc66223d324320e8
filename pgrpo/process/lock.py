"""The lock of a run folder: one run at a time."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from pgrpo.config import Config, ConfigError


def run_folder(config: Config) -> Path:
    """``run_dir`` as a path."""
    return Path(config.run_dir).expanduser()


def agree_on_run_dir(config: Config, from_main: Callable[[str], str]) -> None:
    """Set ``run_dir`` to rank 0's on all ranks, as `${now:...}` may differ between them. A collective call."""
    config.run_dir = from_main(config.run_dir)


def lock_run_dir(run_dir: Path) -> IO[str]:
    """Lock the run folder until the returned file is closed or the process ends. ConfigError: another process holds the lock.

    Children do not inherit a record lock (``lockf``), so a reward worker that outlives a killed run does not hold it.
    """
    # The open file is the lock. O_NOFOLLOW: a symbolic link in its place is an error.
    lock = open(Path(run_dir) / ".lock", "a+", opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW, 0o666))  # noqa: SIM115
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


RECORD = (
    "log.txt", "metrics.jsonl", "completions.jsonl", "config.yaml", "bad_batch_step_*.json", "checkpoints", "eval", "tensorboard",
    "wandb", "thumbnails", "plot.png", "report.html",
)  # fmt: skip
"""What a run writes into its folder, and what ``--overwrite`` removes."""


def check_shared(run_dir: Path, patience_s: float = 60.0) -> None:
    """Refuse a run folder that this node does not share with rank 0, which has just locked it.

    Args:
        patience_s: seconds that a network disk may take to show a new file.

    Raises:
        ConfigError: the lock file does not appear on this node.
    """
    deadline = time.monotonic() + patience_s
    while not (run_dir / ".lock").exists():
        if time.monotonic() > deadline:
            raise ConfigError(
                f"run_dir={run_dir}: {socket.gethostname()} does not see the folder that the first rank made; every rank writes "
                "its part of a checkpoint there: set run_dir to a folder that all nodes share"
            )
        time.sleep(0.1)


def open_run_dir(run_dir: Path, resume: bool, overwrite: bool = False) -> IO[str]:
    """Create and lock the run folder, on rank 0. Keep the returned lock until the run ends.

    Raises:
        ConfigError: the folder is in use, cannot be created, has a symbolic link in place of a folder of the run, or is neither
            empty nor a run's that finished no step, while ``resume`` and ``overwrite`` are false. Only a run's folder may be
            overwritten.
    """
    run_dir = Path(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        refuse_links(run_dir)
        names = {entry.name for entry in run_dir.iterdir()} - {"eval"}
        is_run = ".lock" in names
        is_free = resume or not names or (is_run and (overwrite or _finished_no_step(run_dir)))
        # Leave no lock file in a folder that is not a run's and will be refused.
        lock = lock_run_dir(run_dir) if is_free or is_run else None
    except OSError as error:
        raise ConfigError(f"run_dir={run_dir}: cannot be used ({error}); set another run_dir") from error
    if not is_free:
        if lock is not None:
            lock.close()
        replace = ", replace it (--overwrite)" if is_run else ""
        raise ConfigError(
            f"run_dir={run_dir}: not empty; go on with that run (--resume auto){replace}, or set another run_dir"
        )
    assert lock is not None
    return lock


def record_of(run_dir: Path) -> list[Path]:
    """All that runs wrote into the folder. Files of other names are not theirs."""
    return [path for name in RECORD for path in run_dir.glob(name)]


def refuse_links(run_dir: Path) -> None:
    """Refuse a run folder in which a symbolic link stands for a folder that a run writes to and deletes from (``ConfigError``)."""
    for name in ("checkpoints", "eval", "tensorboard", "thumbnails", "wandb"):
        if (run_dir / name).is_symlink():
            raise ConfigError(
                f"run_dir={run_dir}: {name} is a symbolic link, and a run would write and delete through it; remove it (run_dir "
                "itself may be a link to another disk)"
            )


def _finished_no_step(run_dir: Path) -> bool:
    """Whether there is no checkpoint, and no metrics but of step 0 (the evaluation before training)."""
    metrics = run_dir / "metrics.jsonl"
    rows = metrics.read_bytes().splitlines() if metrics.is_file() else []
    return all(row.startswith(b'{"step": 0,') for row in rows) and not any((run_dir / "checkpoints").glob("step_*"))
