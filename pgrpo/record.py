"""Files that are the record of a run: an error in writing one names it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """The system's error of a write does not say of which file.

    Raises:
        RuntimeError: one that does, and what to do.
    """
    try:
        yield
    except OSError as error:
        raise RuntimeError(
            f"{path}: cannot be written ({error.strerror}); without the run's record training does not go on; "
            "make room, then --resume auto"
        ) from error
