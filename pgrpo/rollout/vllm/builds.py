"""What vLLM builds of a model: code of its own, transformers' classes, or nothing. It is asked, which takes milliseconds.

This file depends on these internals of vLLM (0.26, 0.32): ``EngineArgs.create_model_config`` looks the model's class up, as a start
does, raises where there is none, and seeds this process's generators.
"""

from __future__ import annotations

import re

from transformers import PretrainedConfig

from pgrpo.config import Config, ConfigError
from pgrpo.process.rng import rng_state, set_rng_state
from pgrpo.rollout.vllm.start import inspect_model_here, model_arguments, package

WRONG_BY_TRANSFORMERS = {
    "aria_text": "it does not find how many experts a token takes",
    "diffllama": "it does not see how its layers call attention",
    "jetmoe": "it gives attention heads other keys and values than transformers does",
}
"""Types that vLLM builds of transformers' classes and that then fail, or sample from other distributions -> why (0.32)."""


def what_is_built(config: Config, hf_config: PretrainedConfig) -> str:
    """What vLLM builds of the model, in words.

    Raises:
        ConfigError: nothing, or something that is known to be wrong.
    """
    vllm, state = package(), rng_state()
    inspect_model_here()
    try:
        found = vllm.EngineArgs(**model_arguments(config), language_model_only=True).create_model_config()
        by_transformers = found.using_transformers_backend()
    except Exception as error:
        raise _refusal(config, _reason(error)) from error
    finally:
        set_rng_state(state)
    name = found.architectures[0]
    if not by_transformers:
        return f"vLLM has code for {name}"
    said = f"vLLM has no code for {name} and runs transformers' own (its Transformers backend)"
    if why := WRONG_BY_TRANSFORMERS.get(hf_config.model_type):
        raise _refusal(config, f"{said}, where {why}")
    return said


def _refusal(config: Config, reason: str) -> ConfigError:
    return ConfigError(
        f"rollout.engine={config.rollout.engine}: vLLM {package().__version__} cannot sample from {config.model.path}: {reason}; "
        "set rollout.engine=embedded"
    )


def _reason(error: Exception) -> str:
    """What vLLM says, in one line: without what pydantic adds, and the list of all that it knows."""
    text = " ".join(str(error).split())
    return (
        re.sub(r"^.*?Value error, | Supported architectures:.*| \[type=.*", "", text).rstrip(".")
        or type(error).__name__
    )
