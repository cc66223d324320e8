"""Two models of one small config, with the same random weights: untouched, and with grouped attention; and the float64 in which
they are compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel

from pgrpo.admission.compare import untouched_model
from pgrpo.admission.shrink import UNKNOWN
from pgrpo.attention.hook import ATTENTION_NAME
from pgrpo.planning.hub import new_model
from pgrpo.vision.families import attention_names


class True64(TorchFunctionMode):
    """Answers a model's requests for float32 with float64, so that rounding cannot hide what is nearly exact."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        swap = {torch.float32: torch.float64}
        swapped = [swap.get(a, a) if isinstance(a, torch.dtype) else a for a in args]
        named = {k: swap.get(a, a) if isinstance(a, torch.dtype) else a for k, a in (kwargs or {}).items()}
        return func(*swapped, **named)


MOST_PARAMETERS = 10**7
"""Of a small copy: those that are exact have at most half a million."""


class NotSmall(Exception):
    """A config that did not shrink."""


def twins(config: PretrainedConfig, seed: int, most: int = MOST_PARAMETERS) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The small model untouched and with grouped attention, with the same random weights, in float64.

    Raises:
        NotSmall: it has more than ``most`` parameters. Raised before their memory is written.
    """
    torch.manual_seed(seed)
    untouched = untouched_model(partial(_make, config, most)).double().train()
    _randomize(untouched, seed)
    grouped = _make(config, most, ATTENTION_NAME).double().train()
    grouped.load_state_dict(untouched.state_dict())
    return untouched, grouped


def _make(config: PretrainedConfig, most: int, attention: str) -> PreTrainedModel:
    total = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal total
        total += parameter.numel()
        if total > most:
            shape, integers = list(parameter.shape), _integers(config.to_dict())
            large = (f"{key}={value} of its config" for key, value in integers if value in shape and value > UNKNOWN)
            raise NotSmall(
                f"a small copy of it is not small: with {type(module).__name__}.{name} of {shape} it has more than {most:,} "
                f"parameters: {next(large, 'a size in its code')} was not made smaller"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        return new_model(config, attention_names(config, attention), dtype=torch.float64)
    finally:
        hook.remove()


def _integers(values: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Keys and values, those of nested configs as well."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{name}", one) for name, one in _integers(value))
        elif isinstance(value, int):
            yield key, value


@torch.no_grad()
def _randomize(model: nn.Module, seed: int) -> None:
    """Weights with which every term matters: norms, sinks, decays and biases are not left at 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if name.endswith("A_log"):
            parameter.copy_(noise - 1)
        elif parameter.ndim < 2:
            parameter.add_(0.2 * noise)
        elif "embed" in name or "wte" in name:
            parameter.copy_(noise)
        else:
            parameter.copy_(1.2 * noise / parameter.shape[-1] ** 0.5)


@contextmanager
def quiet() -> Iterator[None]:
    """transformers warns about small and odd configs, which these are."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


@contextmanager
def one_thread() -> Iterator[None]:
    """Small matrices gain nothing from more threads, which wait for each other for seconds where other programs use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
