"""Compiles vLLM's model in a process of its own, before the run starts the engine, which then loads the compiled code.

It is the run's own start of vLLM, ended when the memory that is left for the cache has been measured, with vLLM's first forward: by
then all is compiled and written. The size of the cache is given, since other processes use the GPU meanwhile; neither this size nor
the share of the memory is in the key of vLLM's code (0.26, 0.32).
"""

from __future__ import annotations

import importlib
import os
import pickle
import sys
from typing import Any, NoReturn

import torch

from pgrpo.config import Config
from pgrpo.distributed.world import World, start
from pgrpo.process.caches import use_caches
from pgrpo.rollout.vllm import start as vllm_start
from pgrpo.rollout.vllm.requests import EngineError

SHARE, CACHE_BYTES = 0.01, 2**30
"""Of the GPU's memory, which vLLM compares with what is free; of its cache, which is not made."""


class _Compiled(BaseException):
    """Not an Exception, which vLLM might catch."""


def compile_model(config: Config, world: World, *, sleeps: bool) -> None:
    """Fill vLLM's cache of compiled code. Afterwards vLLM's parts are left as they are: this process is to end.

    Args:
        sleeps: whether the run's engine has sleep mode, which is in the key of vLLM's code.

    Raises:
        EngineError: vLLM does not start, or did not stop where it should.
    """
    vllm_start.prepare(config, world)
    executor: Any = importlib.import_module("vllm.v1.executor.uniproc_executor").ExecutorWithExternalLauncher
    measure = executor.determine_available_memory

    def measured(self: Any) -> NoReturn:
        measure(self)
        raise _Compiled

    executor.determine_available_memory = measured
    try:
        vllm_start.start(config, world, SHARE, sleeps=sleeps, cache_bytes=CACHE_BYTES)
    except _Compiled:
        return
    finally:
        executor.determine_available_memory = measure
    raise EngineError("vLLM started without measuring the memory for its cache")


def main(cache_dir: str | None) -> NoReturn:
    """Of the second process, which is given the config and whether vLLM sleeps."""
    use_caches(cache_dir)
    if vllm_start.is_installed():  # takes seconds, in which the run finds out whether this process is needed
        vllm_start.import_engine(torch.device("cuda"))
    config: Config
    config, sleeps = pickle.load(sys.stdin.buffer)
    with start() as world:
        compile_model(config, world, sleeps=sleeps)
        sys.stdout.flush()
        os._exit(0)  # half an engine cannot be shut down: its allocator reports errors
