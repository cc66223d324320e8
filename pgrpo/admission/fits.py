"""Refusals of a config that does not fit the model, by numbers alone, before any weight is loaded."""

from __future__ import annotations

import importlib.util
import logging

from transformers import PretrainedConfig

from pgrpo.config import Config, ConfigError, ModelConfig
from pgrpo.planning.dims import ModelDims
from pgrpo.planning.rope import fixed_ropes, positions

log = logging.getLogger(__name__)


def check_positions(config: ModelConfig, hf_config: PretrainedConfig, max_sample: int, limits: str) -> None:
    """Refuse a run whose longest sample has more tokens than the model has positions, by config.json or ``model.max_positions``.

    Args:
        limits: what sets ``max_sample``, for the message (``Config.sampled_limit``).

    Raises:
        ConfigError: names both lengths.
    """
    most = positions(hf_config)
    if config.max_positions is not None:
        log.warning("model.max_positions=%d instead of %s, by the model's config.json", config.max_positions, most)
        most = config.max_positions
    if most is not None and max_sample > most:
        raise ConfigError(
            f"model.path={config.path}: it has {most} positions, the longest sample {max_sample} tokens (data.max_prompt_tokens + "
            f"{limits}): lower those, or set model.max_positions if the model can take more"
        )


def check_sampled_positions(config: Config, hf_config: PretrainedConfig) -> None:
    """Refuse samples beyond a model's own positions where vLLM's rotary embeddings are a table of that length, or depend on it.

    Raises:
        ConfigError: names the kind of RoPE, and both lengths.
    """
    most, kinds = positions(hf_config), fixed_ropes(hf_config)
    if kinds and most is not None and config.max_sample_tokens > most:
        raise ConfigError(
            f"model.max_positions={config.model.max_positions}: vLLM computes positions of {config.model.path} up to {most} "
            f"({', '.join(kinds)}), the longest sample has {config.max_sample_tokens} tokens: shorten it, raise the factor in the "
            "model's config.json, or set rollout.engine=embedded"
        )


def check_chunks(config: ModelConfig, dims: ModelDims) -> None:
    """Refuse parts of MLPs (``ConfigError``) where a layer has no MLP that is known: it would be computed whole."""
    if (config.mlp_chunks or 1) > 1 and not dims.has_mlp:
        raise ConfigError(
            f"model.mlp_chunks: {config.mlp_chunks}: not every layer of {config.path} has an MLP that is known; leave it out"
        )


def check_lora(config: ModelConfig, dims: ModelDims) -> None:
    """Refuse a LoRA config that cannot work, before any weight is loaded.

    Raises:
        ConfigError: peft is not installed, or ``model.lora_targets`` names something that is neither a linear layer of the model
            nor its stacked experts, or experts that another code computes.
    """
    if config.lora_rank and importlib.util.find_spec("peft") is None:
        raise ConfigError(f"model.lora_rank={config.lora_rank}: LoRA needs peft: pip install -e '.[lora]'")
    experts = ["experts", *(f"experts.{name}" for name in dims.expert_matrices)] if dims.expert_matrices else []
    if config.lora_rank and dims.stacked and not config.lora_targets:
        how = f"; model.lora_targets=[{','.join([*dims.linear_layers, 'experts'])}] gives them some" if experts else ""
        log.info("LoRA: the experts (%s) are not trained, they have no adapters%s", ", ".join(dims.stacked), how)
    for name in config.lora_targets:
        if name.partition(".")[0] == "experts" and dims.stacked and not experts:
            raise ConfigError(
                f"model.lora_targets: {name!r}: experts of {config.path} get no adapters, as only the model's own code multiplies "
                "with them: leave them out, or train all weights (model.lora_rank=0)"
            )
        if name not in (*dims.linear_layers, *experts):
            raise ConfigError(
                f"model.lora_targets: {name!r} is no linear layer of {config.path}; "
                f"it may be {', '.join([*dims.linear_layers, *experts])}; an empty list means all linear layers"
            )


def check_heads(size: int, dims: ModelDims) -> None:
    """Refuse a number of ranks that the model's heads do not divide over, before any weight is loaded.

    Raises:
        ConfigError: with the numbers that are possible.
    """
    all_heads = (dims.heads, *dims.other_heads)
    if wrong := [heads for heads in all_heads if heads % size]:
        valid = ", ".join(str(n) for n in range(1, min(all_heads) + 1) if not any(heads % n for heads in all_heads))
        where = " of some layers" if dims.other_heads else ""
        raise ConfigError(
            f"model.sequence_parallel_size: {size} does not divide the model's {wrong[0]} attention heads{where}; it may be {valid}"
        )
