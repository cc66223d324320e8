"""OpenMP's wait policy, which is fixed when torch is imported."""

from __future__ import annotations

import os
from pathlib import Path

GPU_DEVICES = ("nvidia[0-9]*", "dxg", "kfd")
"""Patterns in /dev: NVIDIA, Windows (WSL), AMD."""
SPINS = "1000"
"""Rounds that a thread of GNU's OpenMP (PyTorch's on Linux) spins before it sleeps. Without any, a step of the quick start takes
1.7 times as long on idle cores."""


def wait_passively() -> None:
    """Let OpenMP's threads sleep while they wait for each other. Call this before torch is imported.

    By default a waiting thread spins for some milliseconds. If other programs use the cores, that keeps the thread it waits for
    from running, and a step takes many times as long. Does nothing on machines with a GPU, where the CPU has little to do, and if
    the user set a policy. Child processes inherit the setting.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    no_gpu = hidden or not any(any(Path("/dev").glob(pattern)) for pattern in GPU_DEVICES)
    if no_gpu and "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
