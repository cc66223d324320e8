"""Files of a run's record. Errors name the file; symbolic links are not followed."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

TRAINING = "training stops without its record; {fix}, then --resume auto"


@contextmanager
def writing(path: str | Path, advice: str = TRAINING) -> Iterator[None]:
    """Turn an ``OSError`` of a write, which does not name the file, into an error that does.

    Args:
        advice: end of the message, with ``{fix}`` for the remedy of the system's error.

    Raises:
        RuntimeError: writing failed; the message names the file and the remedy.
    """
    try:
        yield
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        fix = "make room" if is_full else f"see that {Path(path).parent} is there and can be written to"
        fix = "remove the symbolic link" if error.errno == errno.ELOOP else fix
        raise RuntimeError(f"{path}: cannot be written ({error.strerror}); {advice.format(fix=fix)}") from error


def appending(path: Path) -> IO[str]:
    """Open a file to append lines; each line is written at once. A lone surrogate becomes its JSON escape."""
    with writing(path):
        return open(path, "a", encoding="utf-8", errors="backslashreplace", buffering=1, opener=_not_through_a_link)


@contextmanager
def replacing(path: Path, advice: str = TRAINING) -> Iterator[IO[str]]:
    """Write ``path`` atomically: the file replaces it at the end of the block. ``advice``: see ``writing``."""
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
