"""Reads a model's config.json, makes models of a config, and says why a model cannot be loaded."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from pgrpo.config import ConfigError, ModelConfig
from pgrpo.vision.families import TOWER_ON_REQUEST, WITHOUT_TOWER, auto_class


def load_hf_config(config: ModelConfig) -> PretrainedConfig:
    """The model's config.json, marked where it has a tower that ``model.load_vision`` does not ask for.

    Raises:
        ConfigError: ``model.path`` has none.
    """
    try:
        found = AutoConfig.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={config.path}: cannot load this model: {load_error(error)}") from error
    if found.model_type in TOWER_ON_REQUEST and not config.load_vision:
        setattr(found, WITHOUT_TOWER, True)
    return found


def new_model(config: PretrainedConfig, attention: Any, **options: Any) -> PreTrainedModel:
    """A model with new weights, on the default device. Code that comes with a model must have been allowed when its config was
    loaded."""
    own = copy.deepcopy(config)  # from_config writes into it
    code = _remote_class(config)
    make = auto_class(own).from_config if code is None else code._from_config
    return make(own, attn_implementation=attention, **options)


def code_folder(config: PretrainedConfig) -> Path | None:
    """Where the code is that comes with a model, as transformers copied it there just now; None for a model of transformers."""
    code = _remote_class(config)
    return None if code is None else Path(str(sys.modules[code.__module__].__file__)).parent


def _remote_class(config: PretrainedConfig) -> Any:
    """The class of a model that comes with code of its own, of the config's revision, as when weights are loaded."""
    name = (getattr(config, "auto_map", None) or {}).get(auto_class(config).__name__)
    if name is None:
        return None
    repository, _, name = name.rpartition("--")
    revision = None if repository else getattr(config, "_commit_hash", None)  # other repositories have their own
    return get_class_from_dynamic_module(name, repository or config._name_or_path, code_revision=revision)


def load_error(error: Exception) -> str:
    """Why ``from_pretrained`` failed, in one line, with the config key that changes it."""
    if "trust_remote_code" in str(error):
        return "it comes with Python code of its own; read that, and set model.trust_remote_code=true to run it"
    reason = str(error).strip().splitlines()[0].removesuffix(".")
    return f"{reason}; give a folder that from_pretrained loads, or a hub name"
