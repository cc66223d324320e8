"""Files that are the record of a run: an error in writing one names it, and a symbolic link in the place of one is not followed."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

TRAINING = "without the run's record training does not go on; {fix}, then --resume auto"


@contextmanager
def writing(path: str | Path, advice: str = TRAINING) -> Iterator[None]:
    """The system's error of a write does not say of which file.

    Args:
        advice: what to do; ``{fix}`` becomes what helps against the system's error.

    Raises:
        RuntimeError: one that names the file, and what to do.
    """
    try:
        yield
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        fix = "make room" if is_full else f"see that {Path(path).parent} is there and can be written to"
        fix = "remove the symbolic link" if error.errno == errno.ELOOP else fix
        raise RuntimeError(f"{path}: cannot be written ({error.strerror}); {advice.format(fix=fix)}") from error


def appending(path: Path) -> IO[str]:
    """The file, open to append whole lines: a row is in it when its step is over. A lone surrogate becomes its JSON escape."""
    with writing(path):
        return open(path, "a", encoding="utf-8", errors="backslashreplace", buffering=1, opener=_not_through_a_link)


@contextmanager
def replacing(path: Path, advice: str = TRAINING) -> Iterator[IO[str]]:
    """A file to write, which takes the place of ``path`` when the block ends: it is there whole or not at all. ``advice`` is that
    of ``writing``."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path, advice):
        part.unlink(missing_ok=True)
        try:
            with open(part, "x", encoding="utf-8", errors="backslashreplace") as file:
                yield file
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def _not_through_a_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)
