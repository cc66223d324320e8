"""How PyTorch takes memory of the GPU, and pinned memory of the host, for a trainer that shares a process with vLLM."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PINNED = "pinned_use_cuda_host_register:True,pinned_num_register_threads:8"
"""Moments and weights that leave the GPU take tens of GiB of pinned memory when a run starts: eight threads map its pages, which
CUDA then registers. By default one thread of the driver maps 2 to 3 GiB a second."""


def set_up_allocators() -> None:
    """Call this before a GPU is used, as PyTorch reads the environment's settings once. What a user says there stays.

    Blocks of GPU memory come from segments that grow (PyTorch's expandable segments). Separate segments leave gaps that no block
    fits in: an update on 524,288 tokens failed on a GPU of 140 GB of which 15 GB were gaps.
    """
    if "pinned_" not in (given := os.environ.get(_variable(), "")):
        os.environ[_variable()] = f"{given},{PINNED}".strip(",")
    _grow(True)


@contextmanager
def fixed_segments() -> Iterator[None]:
    """Around what builds vLLM's engine: its pool of memory that sleeps refuses segments that grow, and NCCL, which registers the
    memory of captured CUDA graphs, takes such a segment for one allocation."""
    _grow(False)
    try:
        yield
    finally:
        _grow(True)


def _grow(on: bool) -> None:
    given = os.environ.get(_variable(), "")  # repeated, as PyTorch puts back to its defaults what a call does not name
    if torch.cuda.is_available() and "expandable_segments" not in given and "cudaMallocAsync" not in given:
        torch._C._accelerator_setAllocatorSettings(f"{given},expandable_segments:{on}".strip(","))  # pyright: ignore


def _variable() -> str:
    return "PYTORCH_ALLOC_CONF" if "PYTORCH_ALLOC_CONF" in os.environ else "PYTORCH_CUDA_ALLOC_CONF"
