"""Files that are the record of a run: an error in writing one names it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
        raise RuntimeError(f"{path}: cannot be written ({error.strerror}); {advice.format(fix=fix)}") from error
