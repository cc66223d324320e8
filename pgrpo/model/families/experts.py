"""Mixtures of experts: how they are computed, the names of their weights in a checkpoint, and what of them is not trained.

transformers stacks the matrices of all experts of a layer into two parameters; checkpoints of most mixtures, and vLLM, have them
one by one. ``to_checkpoint`` undoes the stacking tensor by tensor, so that no more than a layer's experts are unsharded at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    revert_weight_conversion,
)

from pgrpo.model.families.expert_products import NAME
from pgrpo.planning.dims import ACTIVE_EXPERTS, EXPERTS, first_of

PREDICTORS = ("mtp_num_hidden_layers", "num_nextn_predict_layers", "num_mtp_layers")
"""Numbers of layers that predict further tokens, in configs."""

Convert = Callable[[str, Tensor], Iterator[tuple[str, Tensor]]]


def has_other_tensors(config: PretrainedConfig) -> bool:
    """Whether transformers holds the model in other tensors than its checkpoint has."""
    return any(isinstance(one, WeightConverter) for one in _conversions(config))


def has_prefix(config: PretrainedConfig) -> bool:
    """Whether the language model may come out of a checkpoint with images, where its names have a prefix (Qwen3.5 as published)."""
    return any(isinstance(one, PrefixChange) for one in _conversions(config.get_text_config()))


def can_unstack(config: PretrainedConfig) -> bool:
    """Whether these can be made again from one tensor at a time: stacks of experts can. Not so other concatenations, whose parts
    may have different sizes (the convolutions of OLMo hybrid)."""
    converters = [one for one in _conversions(config) if isinstance(one, WeightConverter)]
    return all(
        len(c.target_patterns) == 1
        and isinstance(c.operations[0], MergeModulelist)
        and all(isinstance(op, MergeModulelist | Concatenate) for op in c.operations)
        for c in converters
    )


def to_checkpoint(model: nn.Module) -> Convert:
    """Makes a parameter of the model (name, whole tensor) the tensors that a checkpoint has for it: the one that the model came
    from, as far as prefixes go."""
    if not isinstance(model, PreTrainedModel) or not (has_other_tensors(model.config) or has_prefix(model.config)):
        return lambda name, tensor: iter([(name, tensor)])
    return lambda name, tensor: iter(revert_weight_conversion(model, {name: tensor}).items())


def experts_text(model: PreTrainedModel) -> str:
    """How a mixture is computed, for the log; empty for another model."""
    text = model.config.get_text_config()
    count, active = first_of(text, EXPERTS), first_of(text, ACTIVE_EXPERTS)
    if not count:
        return ""
    how = getattr(text, "_experts_implementation", None) or "eager"
    by = "in grouped products" if how == NAME else f"by transformers' {how} experts"
    return f"a mixture of {count} experts, {active} for a token, computed {by}"


def untrained_text(config: PretrainedConfig) -> str:
    """What of a checkpoint is neither trained, pushed nor exported; empty if there is nothing."""
    count = first_of(config.get_text_config(), PREDICTORS)
    if not count:
        return ""
    return (
        f"the heads of multi-token prediction ({count} layers) are not loaded, trained or exported; a sampler that speculates with "
        "those of the initial checkpoint would have heads of other weights"
    )


def balance_refusal(config: PretrainedConfig) -> str:
    """Why the load-balancing term that a config asks for is refused; empty if it asks for none."""
    text = config.get_text_config()
    coefficient = getattr(text, "router_aux_loss_coef", 0.0) or 0.0
    if not getattr(text, "output_router_logits", False) or not coefficient:
        return ""
    return (
        f"output_router_logits=true with router_aux_loss_coef={coefficient}: no load-balancing term is trained; set "
        "output_router_logits to false in its config.json"
    )


def _conversions(config: PretrainedConfig) -> list[object]:
    return get_checkpoint_conversion_mapping(config.model_type) or []
