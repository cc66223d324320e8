"""LoRA (arXiv 2106.09685): trains small adapters beside the linear layers and leaves the model's weights unchanged (peft)."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn
from transformers import PreTrainedModel

from pgrpo.config import ModelConfig
from pgrpo.planning.dims import ModelDims, decoder_layers


def add_adapters(model: PreTrainedModel, config: ModelConfig, seed: int) -> None:
    """Freeze the model and insert new adapters, in float32 at least, into its linear layers. The model keeps its class, and its
    output, because new adapters add zero.

    Args:
        model: on any device, in any precision.
        config: rank, alpha and targets.
        seed: of the adapters' initial values, which are therefore the same on all ranks.
    """
    from peft import LoraConfig, inject_adapter_in_model

    wanted = config.lora_targets or ModelDims.from_config(model.config).linear_layers
    # Not those of a vision tower.
    inside = {id(module) for layer in decoder_layers(model) for module in layer.modules()}
    targets = [n for n, m in model.named_modules() if id(m) in inside and n.rpartition(".")[2] in wanted]
    lora = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=targets)  # pyright: ignore[reportArgumentType]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(lora, model)  # pyright: ignore[reportArgumentType]
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
    del model.peft_config


def adapters_off(policy: nn.Module) -> AbstractContextManager[None]:
    """Forwards inside this block are those of the initial model, without a second copy of its weights: adapters add 0."""
    from peft.helpers import rescale_adapter_scale

    return rescale_adapter_scale(policy, 0.0)
