"""Loads a model, sets its attention, recomputation and compilation as configured, and shards it over ranks."""

from __future__ import annotations

from transformers import PreTrainedModel

from pgrpo.config import Config
from pgrpo.distributed import fsdp
from pgrpo.distributed.world import World
from pgrpo.model.lora import add_adapters
from pgrpo.model.policy import Policy, load_model
from pgrpo.model.recompute import set_up_layers
from pgrpo.planning.dims import decoder_layers
from pgrpo.planning.flops import ModelDims
from pgrpo.planning.placement import attention_choice, compute_dtype, is_compiled, recompute_by_layer


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
    model = load_model(config.model, compute_dtype(config))
    reference = wrap(model, config, world).requires_grad_(False)
    offload = config.loss.ref_offload == "cpu"
    fsdp.place(reference, decoder_layers(model), world, compute_dtype(config), offload=offload)
    return reference


def wrap(model: PreTrainedModel, config: Config, world: World) -> Policy:
    """A policy with attention, recomputation and compilation as configured. Does not move the weights."""
    dims = ModelDims.from_config(model.config)
    policy = Policy(model, config.rollout.temperature, attention_choice(config, dims, world.device))
    set_up_layers(
        decoder_layers(model), recompute_by_layer(config, dims, world), compiled=is_compiled(config, world.device)
    )
    return policy
