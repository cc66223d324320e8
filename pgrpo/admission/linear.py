"""Whether this machine can train a model with linear attention: a GPU needs fla-core's kernels, and a backward that is right."""

from __future__ import annotations

import importlib.util
import os
import re
from importlib.metadata import PackageNotFoundError, version

import torch
from transformers import PretrainedConfig

from pgrpo.config import ConfigError
from pgrpo.planning.dims import STATEFUL

INSTALL = "pip install -e '.[linear]'"
WRONG_ON_HOPPER = (3, 4, 0), (3, 7, 1)
"""Releases of Triton, from the first up to but without the second, whose gated backward is wrong on Hopper, by fla-core's own word
(its issue 640). It takes tilelang's instead where that is installed, and raises in the backward where not."""


def check_linear(path: str, config: PretrainedConfig, device: torch.device) -> None:
    """Refuse a model with Gated DeltaNet on a GPU that cannot train it, before weights are loaded. A CPU can.

    Args:
        path: ``model.path``, for the message.
        config: of the model.
        device: where it trains.

    Raises:
        ConfigError: with what to install.
    """
    kinds = getattr(config.get_text_config(), "layer_types", None) or ()
    if device.type != "cuda" or STATEFUL[0] not in kinds:
        return
    if importlib.util.find_spec("fla") is None:
        raise ConfigError(f"model.path={path}: its linear attention needs fla-core on a GPU: {INSTALL}")
    triton = release("triton")
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    first, fixed = WRONG_ON_HOPPER
    if hopper and first <= triton < fixed and (lacks := _lacks_for_tilelang()):
        raise ConfigError(
            f"model.path={path}: the backward of its linear attention is wrong on Hopper with Triton "
            f"{'.'.join(map(str, triton))} ({'.'.join(map(str, first))} to before {'.'.join(map(str, fixed))}): {lacks}, "
            "or install a PyTorch with a newer Triton"
        )


def _lacks_for_tilelang() -> str:
    """What to do so that fla-core takes tilelang's backward; empty if it will."""
    if importlib.util.find_spec("tilelang") is None:
        return f"install tilelang ({INSTALL})"
    if os.environ.get("FLA_TILELANG") == "0" or os.environ.get("FLA_DISABLE_BACKEND_DISPATCH") == "1":
        return "unset FLA_TILELANG and FLA_DISABLE_BACKEND_DISPATCH, which keep fla-core from tilelang"
    from fla.utils import has_usable_nvcc  # pyright: ignore[reportMissingImports]

    return "" if has_usable_nvcc() else "install CUDA's compiler nvcc for tilelang (pip install nvidia-cuda-nvcc)"


def release(package: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in re.findall(r"\d+", version(package))[:3])
    except PackageNotFoundError:
        return (0, 0, 0)
