"""Sizes of a model, counted from its modules. The model is built without memory (on PyTorch's meta device), so any architecture
that transformers can build has its sizes here, and nothing is known of any architecture.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from pgrpo.planning.hub import new_model, without_code
from pgrpo.planning.tower import TowerDims
from pgrpo.vision.families import family_of

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_total_experts")
STATEFUL = ("linear_attention", "conv")
"""Kinds of layers that have a state instead of attention."""
MLP = ("mlp", "feed_forward")
ACTIVE_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")


@dataclass(frozen=True, slots=True)
class ModelDims:
    """Sizes of a decoder.

    Attributes:
        heads, kv_heads, head_dim, value_dim: of attention; keys and values differ in size in MLA.
        windows: one entry for each layer with attention: the tokens of its sliding window, or 0 without one.
        state_flops: FLOPs a token of the recurrences of all linear-attention layers: decay, read, update and output of a state
            (chunked kernels do more).
        state_elements: float32 numbers that all layers with a state keep of one sequence: states and tails of convolutions.
        state_width: elements a token that a linear-attention layer keeps for its backward, about.
        softcapped: whether attention's scores are soft-capped.
        intermediate: width of the MLP that a token passes, as that of a gated MLP of the same number of elements; of a mixture,
            that of the experts that are active together.
        norms: norms of the hidden width in one layer. ``head_norms``: q and k are normalised by head.
        normed: how many of the outputs of attention and of the MLP a norm of the same layer reads, alone or added to its input.
        parameters: all of the model's; a head tied to the embedding is counted once.
        matrices: elements of all matrices of the layers that one token is multiplied with (of a mixture, the active experts).
        layer_matrix: elements of all matrices of the largest layer.
        linear_layers: (inputs, outputs) of every linear layer, by the last part of its name.
        stacked: names of parameters that have the matrices of all experts of a layer.
        expert_matrices: (experts, inputs, outputs) of every such parameter that can get LoRA adapters, by its name.
        active: experts of a layer that compute a token; 0 without experts.
        has_mlp: whether ``mlp_of`` finds one in every layer.
        tower: of a model that sees images, the tower's sizes; its parameters are part of ``parameters``.
        other_heads: numbers of query heads that some layers have in the place of ``heads``.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    windows: tuple[int, ...]
    state_flops: int
    state_elements: int
    state_width: int
    softcapped: bool
    intermediate: int
    norms: int
    normed: int
    head_norms: bool
    vocab: int
    tied: bool
    parameters: int
    matrices: int
    layer_matrix: int
    linear_layers: Mapping[str, tuple[tuple[int, int], ...]]
    stacked: tuple[str, ...] = ()
    expert_matrices: Mapping[str, tuple[tuple[int, int, int], ...]] = field(default_factory=dict)
    active: int = 0
    has_mlp: bool = True
    tower: TowerDims | None = None
    other_heads: tuple[int, ...] = ()

    @classmethod
    def from_config(cls, config: PretrainedConfig | Mapping[str, Any]) -> ModelDims:
        """From a Hugging Face config, as an object or as the mapping in config.json.

        Raises:
            ValueError: no model can be built from it, or it has no list of decoder layers.
        """
        if isinstance(config, Mapping):
            config = without_code(AutoConfig.for_model(**config))
        return _count(_Key(config))

    def adapted(self, targets: Collection[str]) -> tuple[set[str], set[str]]:
        """Names of the linear layers and of the stacked parameters that get LoRA adapters for ``model.lora_targets``. Stacked
        parameters get them only if they are named: together as ``experts``, or as ``experts.NAME``."""
        stacked = {name for name in self.expert_matrices if {"experts", f"experts.{name}"} & {*targets}}
        return set(self.linear_layers.keys() & (targets or self.linear_layers)), stacked


class _Key:
    """A config that equals another one with the same values."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config
        self.values = json.dumps(config.to_dict(), sort_keys=True, default=str)

    def __hash__(self) -> int:
        return hash(self.values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.values == other.values


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of the decoder, in order: its first list of as many modules as the config has layers.

    Raises:
        ValueError: there is none.
    """
    count = model.config.get_text_config().num_hidden_layers
    for part in (model.get_decoder() or model.base_model).modules():
        if isinstance(part, nn.ModuleList) and len(part) == count:
            return list(part)
    raise ValueError(f"a {model.config.model_type} model has no list of {count} decoder layers")


def mlp_of(layer: nn.Module) -> nn.Module | None:
    """A decoder layer's MLP or mixture of experts, which computes rows one by one; None if it has none of these names."""
    return next((part for name in MLP if isinstance(part := getattr(layer, name, None), nn.Module)), None)


def is_stack(module: nn.Module) -> bool:
    """Whether it is the stacked experts of a layer, by what transformers gives to these."""
    return hasattr(module, "is_transposed") and hasattr(module, "num_experts")


def normed_experts(model: nn.Module) -> bool:
    """Whether a norm is behind each expert, which routing weights cannot pass: such experts are computed by transformers' code."""
    return any(getattr(module, "has_post_expert_norm", False) for module in model.modules())


def stacked_matrices(stack: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and values of the parameters that have the matrices of all experts of a layer."""
    return ((name, p) for name, p in stack.named_parameters(recurse=False) if p.ndim == 3)


@lru_cache(maxsize=64)
def _count(key: _Key) -> ModelDims:
    config = copy.deepcopy(key.config)
    try:
        with torch.device("meta"):
            model = new_model(config, "eager")
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"no {config.model_type} model can be made of its config: {error}") from error
    text, layers = config.get_text_config(), decoder_layers(model)
    heads, hidden = text.num_attention_heads, text.hidden_size
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = value_dim = getattr(text, "head_dim", None) or hidden // heads
    if getattr(text, "qk_rope_head_dim", None):  # MLA
        kv_heads, head_dim, value_dim = heads, text.qk_nope_head_dim + text.qk_rope_head_dim, text.v_head_dim
    experts, active = first_of(text, EXPERTS), first_of(text, ACTIVE_EXPERTS)
    linear: dict[str, list[tuple[int, int]]] = {}
    of_experts: dict[str, list[tuple[int, int, int]]] = {}
    matrices, mlp, whole, stacked = 0, 0, 0, set()
    for layer in layers:
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                linear.setdefault(name.rpartition(".")[2], []).append((module.in_features, module.out_features))
            for of_stack, p in stacked_matrices(module) if is_stack(module) else ():
                count, outputs, inputs = (p.mT if module.is_transposed else p).shape
                of_experts.setdefault(of_stack, []).append((count, inputs, outputs))
        of_layer = {name: p.numel() for name, p in layer.named_parameters() if p.ndim >= 2}
        stacked |= {n.rpartition(".")[2] for n, p in layer.named_parameters() if _is_expert(n) and p.ndim == 3}
        used = {n: size * active // experts if experts and _is_expert(n) else size for n, size in of_layer.items()}
        matrices, whole = matrices + sum(used.values()), max(whole, sum(of_layer.values()))
        mlp = max(mlp, sum(size for name, size in used.items() if "att" not in name))
    norms = [(name, m) for name, m in layers[0].named_modules() if "Norm" in type(m).__name__]
    sizes = [(of, p.numel()) for of, norm in norms for name, p in norm.named_parameters() if name == "weight"]
    wide = [of for of, size in sizes if size == hidden]
    return ModelDims(
        layers=len(layers),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        windows=windows(text),
        **_states(text),
        softcapped=bool(getattr(text, "attn_logit_softcapping", None)),
        intermediate=mlp // (3 * hidden),
        norms=len(wide),
        # Two where both are normalised themselves: there are more than two norms, or two that come behind.
        normed=2 if len(wide) > 2 or sum("post" in of for of in wide) > 1 else 1,
        head_norms=any(size == head_dim for _, size in sizes),
        vocab=text.vocab_size,
        tied=model.get_output_embeddings() is not None
        and model.get_output_embeddings().weight is model.get_input_embeddings().weight,  # pyright: ignore
        parameters=model.num_parameters(),
        matrices=matrices,
        layer_matrix=whole,
        linear_layers={name: tuple(shapes) for name, shapes in linear.items()},
        stacked=tuple(sorted(stacked)),
        expert_matrices={} if normed_experts(model) else {name: tuple(shapes) for name, shapes in of_experts.items()},
        active=active if experts else 0,
        has_mlp=all(mlp_of(layer) is not None for layer in layers),
        tower=TowerDims.of(model, family) if (family := family_of(config)) else None,
        other_heads=tuple(sorted({*(getattr(text, "num_attention_heads_per_layer", None) or ())} - {heads})),
    )


def _is_expert(name: str) -> bool:
    """Whether only some tokens pass this parameter."""
    return "experts." in name and "shared" not in name


def windows(config: PretrainedConfig) -> tuple[int, ...]:
    """One entry for each layer with attention: the tokens of its sliding window, or 0 without one."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    if not isinstance(window, int) or getattr(config, "use_sliding_window", True) is False:
        window = 0
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds if kind not in STATEFUL)


def _states(config: PretrainedConfig) -> dict[str, int]:
    """Sizes of Gated DeltaNet (``linear_attention``) and of short convolutions alone (``conv``)."""
    kinds = getattr(config, "layer_types", None) or []
    linear, convolutions = (kinds.count(kind) for kind in STATEFUL)
    conv, heads = convolutions * (getattr(config, "conv_L_cache", None) or 1) * config.hidden_size, 0
    state = width = 0
    if linear and (heads := getattr(config, "linear_num_value_heads", None) or 0):
        keys, values = config.linear_num_key_heads * config.linear_key_head_dim, heads * config.linear_value_head_dim
        state, conv = (
            heads * config.linear_key_head_dim * config.linear_value_head_dim,
            conv + linear * (config.linear_conv_kernel_dim * (2 * keys + values)),
        )
        width = (
            4 * (2 * keys + values) + 4 * values
        )  # around the convolution and as copies for the rule; the gated norm
    return {"state_flops": 7 * state * linear, "state_elements": state * linear + conv, "state_width": width}


def first_of(config: PretrainedConfig, names: tuple[str, ...]) -> int:
    """The first of these that a config has as an integer; 0 without any."""
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), 0)
