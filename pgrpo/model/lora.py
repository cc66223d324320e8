"""LoRA (arXiv 2106.09685): trains small adapters beside linear layers (peft) and experts, and leaves the weights unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pgrpo.config import ModelConfig
from pgrpo.model.families.expert_adapters import add_expert_adapters, merge_expert_adapters
from pgrpo.planning.dims import ModelDims, decoder_layers


def add_adapters(model: PreTrainedModel, config: ModelConfig, seed: int) -> None:
    """Freeze the model and insert new adapters, in float32 at least, beside its linear layers and experts. The model keeps its
    class, and its output, because new adapters add zero.

    Args:
        model: on any device, in any precision.
        config: rank, alpha and targets.
        seed: of the adapters' initial values, which are therefore the same on all ranks.
    """
    from peft import LoraConfig, inject_adapter_in_model

    linear, stacked = ModelDims.from_config(model.config).adapted(config.lora_targets)
    layers = decoder_layers(model)  # and not those of a vision tower
    inside = {id(module) for layer in layers for module in layer.modules()}
    targets = [n for n, m in model.named_modules() if id(m) in inside and n.rpartition(".")[2] in linear]
    lora = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=targets)  # pyright: ignore[reportArgumentType]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model.requires_grad_(False)
        if targets:
            inject_adapter_in_model(lora, model)  # pyright: ignore[reportArgumentType]
        add_expert_adapters(layers, stacked, config.lora_rank, config.lora_alpha)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def merge_adapters(model: PreTrainedModel) -> None:
    """Add the adapters to the weights of their layers and remove them; the result is an ordinary model."""
    from peft.tuners.lora import LoraLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge()  # pyright: ignore[reportCallIssue]
            model.set_submodule(name, layer.get_base_layer())
    merge_expert_adapters(model)
    vars(model).pop("peft_config", None)


@contextmanager
def adapters_off(policy: nn.Module) -> Iterator[None]:
    """Forwards inside this block are those of the initial model, without a second copy of its weights: adapters add 0."""
    layers: list[Any] = [m for m in policy.modules() if isinstance(getattr(m, "scaling", None), dict)]
    scaling = layers[0].scaling  # the same of all
    try:
        for layer in layers:
            layer.scaling = dict.fromkeys(scaling, 0.0)
        yield
    finally:
        for layer in layers:
            layer.scaling = dict(scaling)
