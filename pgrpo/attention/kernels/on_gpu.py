"""Runs an operation's Triton kernel where its tensors are on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import ParamSpec, TypeVar

P, R = ParamSpec("P"), TypeVar("R")


def on_gpu(module: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """The decorated function is the specification, and runs on a CPU. On a GPU (by its first argument) the function of that name
    in ``module`` runs instead. The module is imported then: only PyTorch's CUDA builds bring Triton."""

    def decorate(plain: Callable[P, R]) -> Callable[P, R]:
        @wraps(plain)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            first: object = args[0]
            is_on_gpu = first.device.type == "cuda"  # pyright: ignore[reportAttributeAccessIssue]
            return (getattr(import_module(module), plain.__name__) if is_on_gpu else plain)(*args, **kwargs)

        return run

    return decorate
