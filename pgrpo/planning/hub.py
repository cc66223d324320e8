"""Reads a model's config.json, and says why a model cannot be loaded."""

from __future__ import annotations

from transformers import AutoConfig, PretrainedConfig

from pgrpo.config import ConfigError, ModelConfig


def load_hf_config(config: ModelConfig) -> PretrainedConfig:
    """The model's config.json.

    Raises:
        ConfigError: ``model.path`` has none.
    """
    try:
        return AutoConfig.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={config.path}: cannot load this model: {load_error(error)}") from error


def load_error(error: Exception) -> str:
    """Why ``from_pretrained`` failed, in one line, with the config key that changes it."""
    if "trust_remote_code" in str(error):
        return "it comes with Python code of its own; read that, and set model.trust_remote_code=true to run it"
    reason = str(error).strip().splitlines()[0].removesuffix(".")
    return f"{reason}; give a folder that from_pretrained loads, or a hub name"
