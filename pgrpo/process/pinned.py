"""How PyTorch makes pinned host memory, of which moments and weights that leave the GPU take tens of GiB at the start of a run."""

from __future__ import annotations

import os

SETTING = "pinned_use_cuda_host_register:True,pinned_num_register_threads:8"
"""Eight threads map the pages, which CUDA then registers. By default one thread of the driver maps 2 to 3 GiB a second."""


def pin_with_threads() -> None:
    """Call this before a GPU is used, as PyTorch reads the variable once. What a user says of pinned memory stays."""
    name = "PYTORCH_ALLOC_CONF" if "PYTORCH_ALLOC_CONF" in os.environ else "PYTORCH_CUDA_ALLOC_CONF"
    given = os.environ.get(name, "")
    if "pinned_" not in given:
        os.environ[name] = f"{given},{SETTING}".strip(",")
