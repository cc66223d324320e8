"""Loads a model, sets its attention, recomputation and compilation as configured, and shards it over ranks."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from pgrpo.config import Config, ModelConfig
from pgrpo.distributed import fsdp
from pgrpo.distributed.world import World
from pgrpo.model.lora import add_adapters
from pgrpo.model.policy import Policy, load_model
from pgrpo.model.recompute import set_up_layers
from pgrpo.planning.dims import decoder_layers
from pgrpo.planning.flops import ModelDims
from pgrpo.planning.placement import attention_choice, compute_dtype, is_compiled, recompute_by_layer, teacher_model
from pgrpo.types import Recompute


def place_policy(config: Config, world: World) -> Policy:
    """The model on this rank's device, sharded if there are several ranks. With LoRA the model is frozen in the compute dtype and
    gets new adapters.

    Raises:
        ConfigError: the model cannot run on this device as configured.
    """
    if config.model.lora_rank:
        model = load_model(config.model, compute_dtype(config))
        add_adapters(model, config.model, config.seed)
    else:
        model = load_model(config.model)
    policy = wrap(model, config, world)
    fsdp.place(policy, decoder_layers(model), world, compute_dtype(config), methods=("next_logits",))
    return policy


def place_reference(config: Config, world: World) -> Policy:
    """The initial model for the KL term: frozen, sharded like the policy, and in the compute dtype, with the same bits as float32
    weights that are cast in each forward. With ``loss.ref_offload=cpu`` it is in host memory, and a layer is on the GPU only while
    it computes."""
    return _place_frozen(config.model, config, world, offload=config.loss.ref_offload == "cpu")


def place_teacher(config: Config, world: World) -> Policy:
    """The model of ``loss.teacher``: frozen, sharded and offloaded as a reference is. Its log-probs are at the rollout's
    temperature, as the policy's are."""
    return _place_frozen(teacher_model(config), config, world, offload=config.loss.teacher_offload == "cpu")


def _place_frozen(which: ModelConfig, config: Config, world: World, *, offload: bool) -> Policy:
    model = load_model(which, compute_dtype(config))
    nothing: list[Recompute] = ["none" for _ in decoder_layers(model)]
    frozen = wrap(model, config, world, nothing).requires_grad_(False)
    fsdp.place(frozen, decoder_layers(model), world, compute_dtype(config), methods=("teacher_rows",), offload=offload)
    return frozen


def wrap(model: PreTrainedModel, config: Config, world: World, recompute: Sequence[Recompute] | None = None) -> Policy:
    """A policy with attention, compilation and, unless given, recomputation as configured. Does not move the weights."""
    dims = ModelDims.from_config(model.config)
    policy = Policy(model, config.rollout.temperature, attention_choice(config, dims, world.device))
    recompute = recompute_by_layer(config, dims, world) if recompute is None else recompute
    set_up_layers(decoder_layers(model), recompute, compiled=is_compiled(config, world.device))
    return policy
