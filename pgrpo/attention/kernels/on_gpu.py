"""Runs an operation's Triton kernel where its tensors are on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def on_gpu(module: str) -> Callable[[F], F]:
    """The decorated function is the specification, and runs on a CPU. On a GPU (by its first argument) the function of that name
    in ``module`` runs instead. The module is imported then: only PyTorch's CUDA builds bring Triton."""

    def decorate(plain: F) -> F:
        @wraps(plain)
        def run(tensor: Any, *others: Any) -> Any:
            is_on_gpu = tensor.device.type == "cuda"
            return (getattr(import_module(module), plain.__name__) if is_on_gpu else plain)(tensor, *others)

        return run  # pyright: ignore[reportReturnType]

    return decorate
