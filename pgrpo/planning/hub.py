"""Reads a model's config.json and its weights, makes models of a config, and says why a model cannot be loaded."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from pgrpo.config import ConfigError, ModelConfig
from pgrpo.config.strict_yaml import one_line
from pgrpo.vision.families import TOWER_ON_REQUEST, WITHOUT_TOWER, auto_class


def load_hf_config(config: ModelConfig) -> PretrainedConfig:
    """The model's config.json, marked where it has a tower that ``model.load_vision`` does not ask for.

    It has an ``auto_map``, which names the model's own code, only if that was allowed to run (``model.trust_remote_code``):
    transformers leaves it in the config of a class of its own.

    Raises:
        ConfigError: ``model.path`` has none.
    """
    try:
        found = AutoConfig.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={config.path}: cannot load this model: {load_error(error)}") from error
    if not config.trust_remote_code:
        without_code(found)
    if found.model_type in TOWER_ON_REQUEST and not config.load_vision:
        setattr(found, WITHOUT_TOWER, True)
    return found


def without_code(config: PretrainedConfig) -> PretrainedConfig:
    """The same object: neither it nor a config in it names code any more."""
    vars(config).pop("auto_map", None)
    vars(config).pop("attribute_map", None)  # one in the file could give another key that name; the class's own stays
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            without_code(value)
    return config


def pretrained_model(hf_config: PretrainedConfig, config: ModelConfig, **options: Any) -> PreTrainedModel:
    """The model with its weights, on the CPU. ``options``: more of ``from_pretrained``.

    Raises:
        ConfigError: there are no weights, or damaged ones, or none for some of the model's tensors, to which transformers gives
            random numbers.
    """
    name = f"model.path={config.path}"
    fix = "give the folder of a complete model, as `save_pretrained` or `pgrpo export` writes it"
    try:
        model, info = auto_class(hf_config).from_pretrained(
            config.path,
            config=hf_config,  # without an auto_map that may not be followed
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            **options,
        )
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{name}: cannot load its weights: {one_line(error).removesuffix('.')}; {fix}") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ConfigError(f"{name}: its weights have other shapes than its config.json says; {fix}") from error
    if missing := sorted(info["missing_keys"]):
        others = sorted(info["unexpected_keys"])
        found = f", but others, such as {others[0]}" if others else ""
        raise ConfigError(
            f"{name}: has no weights for {len(missing)} of the model's tensors, such as {missing[0]}{found}; {fix}"
        )
    return model


def new_model(config: PretrainedConfig, attention: Any, **options: Any) -> PreTrainedModel:
    """A model with new weights, on the default device, of the class that ``from_pretrained`` loads. If the config has an
    ``auto_map``, code of the model runs: it must have been allowed, as ``load_hf_config`` sees to."""
    own = copy.deepcopy(config)  # from_config writes into it
    code = _remote_class(config)
    make = auto_class(own).from_config if code is None else code._from_config
    return make(own, attn_implementation=attention, **options)


def code_folder(config: PretrainedConfig) -> Path | None:
    """Where the code is that comes with a model, as transformers copied it there just now; None for a model of transformers.
    That code runs, as in ``new_model``."""
    code = _remote_class(config)
    return None if code is None else Path(str(sys.modules[code.__module__].__file__)).parent


def _remote_class(config: PretrainedConfig) -> Any:
    """The class of a model that comes with code of its own, of the config's revision, as when weights are loaded: also where
    transformers has a class for the config, but not where a package has registered one."""
    auto = auto_class(config)
    name = (getattr(config, "auto_map", None) or {}).get(auto.__name__)
    if name is None:
        return None
    registered = auto._model_mapping.get(type(config), None)
    if isinstance(registered, type) and not registered.__module__.startswith("transformers."):
        return registered
    repository, _, name = name.rpartition("--")
    revision = None if repository else getattr(config, "_commit_hash", None)  # other repositories have their own
    return get_class_from_dynamic_module(name, repository or config._name_or_path, code_revision=revision)


def load_error(error: Exception) -> str:
    """Why ``from_pretrained`` failed, in one line, with the config key that changes it."""
    if "trust_remote_code" in str(error):
        return "it comes with Python code of its own; read that, and set model.trust_remote_code=true to run it"
    return f"{one_line(error).removesuffix('.')}; give a folder that from_pretrained loads, or a hub name"
