"""Checks values beyond their types: ranges, and keys that must agree with each other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from operator import attrgetter
from typing import Any

from pgrpo.config.fields import PYTHON, ConfigError
from pgrpo.config.functions import is_function
from pgrpo.config.schema import Config, LossConfig
from pgrpo.config.secrets import REDACTED
from pgrpo.types import KEEPS_MLP

NEEDS = {
    "model.lora_alpha": ("model.lora_rank", 0),
    "model.lora_targets": ("model.lora_rank", 0),
    "prompt.answer_column": ("prompt.messages_column", None),
    "loss.kl_estimator": ("loss.kl_coef", 0),
    "loss.ref_refresh_every": ("loss.kl_coef", 0),
    "loss.ref_offload": ("loss.kl_coef", 0),
    "loss.rollout_correction_cap": ("loss.rollout_correction", "none"),
    "loss.rollout_correction_floor": ("loss.rollout_correction", "none"),
    "loss.clip_dual": ("loss.objective", "cispo"),
    "loss.turn_discount": ("loss.turn_advantages", "outcome"),
    "loss.teacher_kl": ("loss.teacher", None),
    "loss.teacher_coef": ("loss.teacher", None),
    "loss.teacher_offload": ("loss.teacher", None),
}
"""Key -> (other key, its value with which the key has no effect)."""
MOST_SAMPLES, MOST_HELD_OUT = 2**20, 2**24
"""Maximum number of completions of a step and of an evaluation, which are held in memory at once."""


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted key and value of everything in a config that is not a container (``rewards.functions[0].weight``, 1.0)."""
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value) if field.name != "secret_keys"}
    if isinstance(value, dict):
        for name, item in value.items():
            yield from leaves(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from leaves(item, f"{key}[{i}]")
    else:
        yield key, value


def check_values(config: Config, *, rewards_from_python: bool, trains: bool = True) -> None:
    """Raise ConfigError for the first value that is out of range or contradicts another. Without ``trains`` it does not matter
    what a run would evaluate between its steps."""
    for key, value in leaves(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key}: {value} is not a finite number; give a finite one")
        if value == "":
            raise ConfigError(f"{key}: '' is empty; give a value, or leave the key out")
        if value == REDACTED:
            raise ConfigError(f"{key}: {value!r} was redacted when this file was written; add {key}=VALUE")
    _check_ranges(config, "")
    for i, beta in enumerate(config.optim.betas):
        if not 0 <= beta < 1:
            raise ConfigError(f"optim.betas[{i}]: {beta} is out of range; it must be at least 0 and below 1")
    _check_needs(config)
    _check_loss(config.loss)
    _check_sizes(config)
    _check_prompt(config)
    _check_environment(config)
    if not (rewards_from_python or config.environment.factory):
        _check_rewards(config)
    if not trains:
        return
    if config.checkpoint.keep_best and not config.eval.every:
        raise ConfigError(
            f"checkpoint.keep_best: {config.checkpoint.keep_best} needs evaluations; set eval.every, or leave it out"
        )
    if config.eval.every and not (config.data.eval_path or config.data.eval_split):
        raise ConfigError(
            f"eval.every: {config.eval.every} needs held-out rows; set data.eval_path or data.eval_split, or eval.every=0"
        )


def _check_ranges(section: Any, prefix: str) -> None:
    """Raise ConfigError for a number outside of its field's range (``schema.number``)."""
    for field in fields(section):
        value, key, limits = getattr(section, field.name), prefix + field.name, field.metadata
        for i, item in enumerate(value if isinstance(value, list) else [value]):
            if is_dataclass(item):
                _check_ranges(item, f"{key}[{i}]." if isinstance(value, list) else f"{key}.")
        if "most" not in limits or value is None:
            continue
        if limits["least"] is not None and value < limits["least"]:
            raise ConfigError(f"{key}: {value} is too small; it must be at least {_plain(limits['least'])}")
        if limits["above"] is not None and value <= limits["above"]:
            why = " (greedy sampling has nothing to learn from)" if key == "rollout.temperature" else ""
            raise ConfigError(f"{key}: {value} is too small; it must be above {limits['above']}{why}")
        if value > limits["most"]:
            raise ConfigError(f"{key}: {value} is too large; it must be at most {_plain(limits['most'])}")


def _plain(limit: float) -> str:
    return f"{limit:.0f}" if limit == round(limit) else f"{limit}"


def _check_needs(config: Config) -> None:
    default = Config()
    for key, (needed, off) in NEEDS.items():
        value = attrgetter(key)(config)
        if value != attrgetter(key)(default) and attrgetter(needed)(config) == off:
            raise ConfigError(f"{key}: {value} has no effect while {needed} is {off}; set {needed}, or leave it out")
    for key in ("loss.ref_refresh_every", "loss.ref_offload"):
        if config.model.lora_rank and (value := attrgetter(key)(config)) != attrgetter(key)(default):
            raise ConfigError(
                f"{key}: {value} has no effect with model.lora_rank {config.model.lora_rank}: the reference is the frozen "
                "model without its adapters; leave it out"
            )


def _check_rewards(config: Config) -> None:
    functions, teacher = config.rewards.functions, config.loss.teacher
    if not functions and teacher is None:
        raise ConfigError(
            "rewards.functions: [] scores nothing; name at least one, such as [{function: exact_match}], or set loss.teacher"
        )
    for key, off in (("eval.every", 0), ("train.target_reward", None)):
        if not functions and (value := attrgetter(key)(config)) != off:
            raise ConfigError(
                f"{key}: {value} needs a reward; name one in rewards.functions, with weight 0 if it is not to train"
            )
    if config.rollout.resample_limit and not any(f.weight for f in functions):
        raise ConfigError(
            f"rollout.resample_limit: {config.rollout.resample_limit} would resample every group, as no reward has a weight; "
            "leave it out, or give one a weight"
        )


def _check_loss(loss: LossConfig) -> None:
    if loss.teacher is not None and loss.teacher_kl == "sampled" and loss.ratio == "sequence":
        raise ConfigError(
            "loss.teacher_kl: sampled gives each token an advantage of its own, which loss.ratio sequence would spread over the "
            "sample; set loss.teacher_kl=full, or loss.ratio=token"
        )
    for key, value in (("ratio", "sequence"), ("combine_rewards", "normalize_then_sum")):
        if loss.turn_advantages == "returns_to_go" and getattr(loss, key) == value:
            raise ConfigError(
                f"loss.turn_advantages: returns_to_go gives each turn an advantage of its own, which loss.{key}={value} does not "
                f"have; set loss.turn_advantages=outcome, or leave loss.{key} out"
            )
    if loss.clip_dual is not None and loss.clip_dual <= 1 + loss.clip_high:
        raise ConfigError(
            f"loss.clip_dual: {loss.clip_dual:g} is not above 1 + loss.clip_high, {1 + loss.clip_high:g}, where positive "
            "advantages are clipped; raise it (3 is usual), or leave it out"
        )


def _check_sizes(config: Config) -> None:
    prompts, updates = config.rollout.prompts_per_step, config.train.updates_per_step
    products = (
        ("rollout.prompts_per_step", "rollout.group_size", MOST_SAMPLES),
        ("eval.rows", "eval.samples", MOST_HELD_OUT),
    )
    for rows, samples, most in products:
        n, m = attrgetter(rows, samples)(config)
        if n * m > most:
            raise ConfigError(
                f"{samples}: {rows} x {samples} is {n} x {m} = {n * m} completions at once; "
                f"lower one of them, the product must be at most {most}"
            )
    if prompts % updates:
        raise ConfigError(
            f"train.updates_per_step: {updates} does not divide rollout.prompts_per_step, {prompts} prompts; "
            f"it may be {_divisors(prompts)}, or set rollout.prompts_per_step to {_multiples(prompts, updates)}"
        )
    together, engine = config.model.sequence_parallel_size, config.tensor_parallel_size
    if engine % together:
        raise ConfigError(
            f"rollout.tensor_parallel_size: {engine} is not a multiple of model.sequence_parallel_size, {together}: ranks with the "
            "same data share an engine; leave it out"
        )
    longest = config.max_sample_tokens
    if longest > config.train.token_budget:
        raise ConfigError(
            f"train.token_budget: {config.train.token_budget} is less than the longest sample, {longest} tokens "
            f"(data.max_prompt_tokens {config.data.max_prompt_tokens} + {config.sampled_limit}); "
            f"set train.token_budget to at least {longest}, or lower those"
        )
    mode, chunks = config.model.activation_checkpointing, config.model.mlp_chunks or 1
    if chunks > 1 and mode in KEEPS_MLP:
        raise ConfigError(
            f"model.mlp_chunks: {chunks} has no effect with model.activation_checkpointing {mode}, which keeps all of the MLP; "
            "set it to attention, full, offload or auto, or leave model.mlp_chunks out"
        )
    if mode == "matmuls" and config.model.lora_rank:
        raise ConfigError(
            f"model.activation_checkpointing: matmuls keeps the products of a matrix and of its adapter (model.lora_rank "
            f"{config.model.lora_rank}), which is more than none keeps; set it to auto, none, attention, full or offload"
        )
    optim, steps = config.optim, config.train.steps
    if optim.schedule != "constant" and optim.warmup_steps >= steps:
        raise ConfigError(
            f"optim.warmup_steps: {optim.warmup_steps} leaves no step of {steps} for the {optim.schedule} decay; "
            f"it must be at most {steps - 1}, or set optim.schedule=constant"
        )


def _check_prompt(config: Config) -> None:
    prompt = config.prompt
    given = [f"prompt.{name}" for name in ("template", "messages", "messages_column") if getattr(prompt, name)]
    if len(given) != 1:
        raise ConfigError(
            f"prompt: {' and '.join(given) or 'nothing'} {'are' if given else 'is'} set; give exactly one of "
            "prompt.template, prompt.messages, prompt.messages_column"
        )
    if prompt.template and prompt.chat_template_kwargs:
        raise ConfigError(
            f"prompt.chat_template_kwargs: {prompt.chat_template_kwargs} has no effect on prompt.template; "
            "remove it, or give prompt.messages instead"
        )


def _check_environment(config: Config) -> None:
    factory = config.environment.factory
    for key, value in {**{f"tools[{i}]": name for i, name in enumerate(config.tools)}, **factories(factory)}.items():
        if value != PYTHON and not (isinstance(value, str) and is_function(value)):
            raise ConfigError(f"{key}: {value!r} is no name of Python code; write file.py:name or module:name")
    if factory == {}:
        raise ConfigError("environment.factory: an empty mapping; name at least one class, or leave the key out")
    if config.has_tools:
        if config.prompt.template:
            raise ConfigError(
                f"prompt.template: {config.prompt.template!r:.80} is a raw prompt, but tools and environments need a chat; "
                "give prompt.messages or prompt.messages_column instead"
            )
        if config.prompt.messages and config.prompt.messages[-1].role == "assistant":
            raise ConfigError(
                "prompt.messages: the last message is the assistant's, which tools and environments cannot continue; "
                "end with a user message"
            )
        if (size := config.model.sequence_parallel_size) > 1:
            raise ConfigError(
                f"model.sequence_parallel_size: {size} ranks that share data are not supported with tools and environments, whose "
                "calls each would make; set it to 1"
            )
    elif config.loss.turn_advantages != "outcome":
        raise ConfigError(
            f"loss.turn_advantages: {config.loss.turn_advantages} has no effect without tools or environment.factory; leave it out"
        )
    elif (changed := _changed(config.environment)) is not None:
        raise ConfigError(
            f"environment.{changed}: {getattr(config.environment, changed)} has no effect without tools or environment.factory; "
            "leave it out"
        )


def factories(factory: Any) -> dict[str, Any]:
    """Key -> name of each class in ``environment.factory``."""
    if isinstance(factory, dict):
        return {f"environment.factory.{name}": value for name, value in factory.items()}
    return {} if factory is None else {"environment.factory": factory}


def _changed(section: Any) -> str | None:
    """The first key of a section that does not have its default."""
    default = type(section)()
    return next((f.name for f in fields(section) if getattr(section, f.name) != getattr(default, f.name)), None)


def check_world_size(config: Config, world_size: int) -> None:
    """Raise ConfigError unless all ranks divide over those that share a micro-batch and over the replicas of the weights, and the
    prompts over the data-parallel ranks."""
    prompts, together = config.rollout.prompts_per_step, config.model.sequence_parallel_size
    if world_size % together:
        raise ConfigError(
            f"model.sequence_parallel_size: {together} does not divide the number of ranks, {world_size}; "
            f"valid: {_divisors(world_size)}, or start with torchrun --nproc-per-node {together}"
        )
    if prompts % (dp_size := world_size // together):
        each = f" of {together} ranks each (model.sequence_parallel_size)" if together > 1 else ""
        raise ConfigError(
            f"rollout.prompts_per_step: {prompts} prompts do not divide over {dp_size} {'shares' if each else 'ranks'}{each}; "
            f"valid numbers of prompts: {_multiples(prompts, dp_size)}"
        )
    if (size := config.model.fsdp_size) and world_size % size:
        raise ConfigError(
            f"model.fsdp_size: {size} does not divide the number of ranks, {world_size}; "
            f"valid: {_divisors(world_size)}, or null (all)"
        )


def fit_world_size(config: Config, world_size: int) -> Config:
    """For commands that do not train: shard over all ranks if ``model.fsdp_size`` does not divide their number, and let each have
    data of its own if ``model.sequence_parallel_size`` does not."""
    model = config.model
    if model.fsdp_size and world_size % model.fsdp_size:
        model = replace(model, fsdp_size=None)
    if world_size % model.sequence_parallel_size:
        model = replace(model, sequence_parallel_size=1)
    return replace(config, model=model)


def _divisors(number: int) -> str:
    """List the divisors, of 12 for example '1, 2, 3, 4, 6, 12'."""
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def _multiples(near: int, divisor: int) -> str:
    """List four multiples of ``divisor`` around ``near``, such as '24, 32, 40, 48'."""
    first = max(1, near // divisor - 1)
    return ", ".join(str(divisor * n) for n in range(first, first + 4))
