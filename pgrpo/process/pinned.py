"""Failures to pin host memory, which moments and weights that leave the GPU need, name the key that asked for it."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def pinning(size: int, what: str, key: str, instead: str) -> Iterator[None]:
    """Around what pins host memory: a failure of CUDA, whose text names neither, is raised with the key that asked for it.

    Args:
        size: bytes that are pinned for ``what`` on this rank.
        what: is in that memory.
        key: that asked for it, with its value if the plan may not have chosen that.
        instead: what to set where there is no more memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if type(error) not in (RuntimeError, torch.AcceleratorError, MemoryError):
            raise  # of the GPU's own memory, or NCCL's
        reason = str(error).strip().splitlines()[0] if str(error) else "no more memory"
        locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        limit = "no limit" if locked == resource.RLIM_INFINITY else f"{locked / 2**30:.2f} GiB"
        raise RuntimeError(
            f"{key}: this process cannot pin {size / 2**30:.2f} GiB of host memory for {what} ({reason}); {_available()}, and "
            f"`ulimit -l` says {limit}: give the machine or container more (docker run --ulimit memlock=-1), or set {instead}"
        ) from error


def _available() -> str:
    with open("/proc/meminfo") as file:
        kib = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    return f"{kib / 2**20:.2f} GiB are free"
