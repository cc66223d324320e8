"""How OpenMP's threads wait for work, which is decided when torch is imported."""

from __future__ import annotations

import os
from pathlib import Path

GPU_DEVICES = ("nvidia[0-9]*", "dxg", "kfd")
"""In /dev: NVIDIA's, those of Windows (WSL), AMD's."""


def wait_passively() -> None:
    """Let OpenMP's threads sleep while they wait for each other. Call it before torch is imported; no effect after.

    A thread that waits spins for some milliseconds by default. Where other programs want the cores, the thread that it waits for
    does not run meanwhile, and a step takes many times as long. A run on a GPU does little on the CPU and is left as it is. So is
    a policy that the user set. Child processes inherit the setting.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    if hidden or not any(any(Path("/dev").glob(pattern)) for pattern in GPU_DEVICES):
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
