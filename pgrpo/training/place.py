"""Loads a model, sets its attention, recomputation and compilation as configured, and shards it over ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal

import torch
from transformers import PreTrainedModel

from pgrpo.config import Config, ConfigError, ModelConfig
from pgrpo.distributed import fsdp
from pgrpo.distributed.sequence import Ulysses
from pgrpo.distributed.world import World
from pgrpo.model.families.vision import freeze
from pgrpo.model.lora import add_adapters
from pgrpo.model.policy import Policy, load_model
from pgrpo.model.recompute import set_up_layers
from pgrpo.placement.choices import attention_choice, compute_dtype, is_compiled, teacher_model
from pgrpo.placement.layers import layer_plan
from pgrpo.placement.sizes import recomputes_tower
from pgrpo.planning.dims import decoder_layers
from pgrpo.planning.flops import ModelDims
from pgrpo.planning.hub import load_hf_config
from pgrpo.planning.recompute import LayerPlan
from pgrpo.process.pinned import pinning
from pgrpo.training.long_samples import set_up_long_samples


def place_policy(
    config: Config,
    world: World,
    load: Callable[[ModelConfig, torch.dtype], PreTrainedModel] = load_model,
    plan: LayerPlan | None = None,
) -> Policy:
    """The model on this rank's device, sharded if there are several ranks. With LoRA the model is frozen in the compute dtype and
    gets new adapters.

    Args:
        load: makes the model, with weights of a dtype.
        plan: of its layers; None is the config's.

    Raises:
        ConfigError: the model cannot run on this device as configured.
    """
    if config.model.lora_rank:
        model = load(config.model, compute_dtype(config))
        add_adapters(model, config.model, config.seed)
    else:
        model = load(config.model, torch.float32)  # master weights
        freeze(model, tower=not config.model.train_vision, projector=not config.model.train_projector)
    policy, dims = wrap(model, config, world, plan), ModelDims.from_config(model.config)
    stay_gathered = (plan or layer_plan(config, dims, world)).stay_gathered
    # Gathering is a collective call, and GPUs of several hosts may differ in memory: the fewest of any rank.
    stay_gathered = -int(world.max(torch.tensor(-stay_gathered, device=world.device)).item())
    fsdp.place(
        policy, decoder_layers(model), world, compute_dtype(config),
        methods=("next_logits", "keep"), stay_gathered=stay_gathered,
    )  # fmt: skip
    return policy


def place_reference(config: Config, world: World) -> Policy:
    """The initial model for the KL term: frozen, sharded like the policy, and in the compute dtype, with the same bits as float32
    weights that are cast in each forward. With ``loss.ref_offload=cpu`` it is in host memory, and a layer is on the GPU only while
    it computes."""
    return _place_frozen(config.model, config, world, "loss.ref_offload", config.loss.ref_offload)


def place_teacher(config: Config, world: World) -> Policy:
    """The model of ``loss.teacher``: frozen, sharded and offloaded as a reference is. Its log-probs are at the rollout's
    temperature, as the policy's are."""
    try:
        return _place_frozen(teacher_model(config), config, world, "loss.teacher_offload", config.loss.teacher_offload)
    except ConfigError as error:
        raise ConfigError(str(error).replace("model.path", "loss.teacher", 1)) from error


def _place_frozen(which: ModelConfig, config: Config, world: World, key: str, home: Literal["none", "cpu"]) -> Policy:
    """A frozen model, in the home that the config's ``key`` names."""
    model = load_model(which, compute_dtype(config))
    policys = layer_plan(config, ModelDims.from_config(load_hf_config(config.model)), world)
    plan = LayerPlan(["full"] * len(decoder_layers(model)), policys.mlp_chunks)  # there is no backward to recompute for
    frozen = wrap(model, config, world, plan).requires_grad_(False)
    size = sum(parameter.nbytes for parameter in frozen.parameters()) // world.shards
    with pinning(size, "a frozen model", f"{key}=cpu", f"{key}=none") if home == "cpu" else nullcontext():
        fsdp.place(
            frozen, decoder_layers(model), world, compute_dtype(config),
            methods=("teacher_rows", "keep"), offload=home == "cpu",
        )  # fmt: skip
    return frozen


def wrap(model: PreTrainedModel, config: Config, world: World, plan: LayerPlan | None = None) -> Policy:
    """A policy with attention, compilation and recomputation as configured. Does not move the weights. ``plan``: of the layers of
    a model that is not the one that is trained."""
    is_trained = plan is None
    dims = ModelDims.from_config(model.config)
    ranks = Ulysses.of(world)
    policy = Policy(model, config.rollout.temperature, attention_choice(config, dims, world.device), ranks)
    layers, plan = decoder_layers(model), plan or layer_plan(config, dims, world)
    compiled = is_compiled(config, world.device) and not (policy.vision and policy.vision.family.sees_whole_images)
    set_up_layers(layers, plan.recompute, compiled=compiled)
    if policy.vision and is_trained and recomputes_tower(config, world.device):
        policy.vision.recompute()
    set_up_long_samples(layers, plan.recompute, plan.mlp_chunks)
    return policy
