"""The tokenizer and the prompts of a run: rows that are rendered, held out, left out or refused."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pgrpo.config import Config, ConfigError
from pgrpo.data import load_prompts
from pgrpo.data.render import ToolsOf
from pgrpo.distributed.world import World
from pgrpo.planning.hub import load_error
from pgrpo.rewards.runner import RewardRunner
from pgrpo.types import Prompt
from pgrpo.vision.reader import ImageReader

log = logging.getLogger(__name__)


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ConfigError: ``model.path`` has none.
    """
    model = config.model
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={model.path}: cannot load a tokenizer: {load_error(error)}") from error
    # transformers makes a tokenizer of special tokens alone for a folder of Qwen or Gemma that has no files of one.
    if not tokenizer.get_vocab().keys() - {*tokenizer.all_special_tokens}:
        raise ConfigError(
            f"model.path={model.path}: there are no tokenizer files; copy those of the model that it comes from (tokenizer.json, "
            "tokenizer_config.json, chat_template.jinja)"
        )
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
        log.warning(
            "model.path=%s: the tokenizer has no pad token; using its eos token %s (training pads nothing)",
            model.path, tokenizer.eos_token,
        )  # fmt: skip
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, config: Config) -> None:
    """Refuse a tokenizer with more ids than the model has embeddings."""
    if len(tokenizer) > vocab_size:
        raise ConfigError(
            f"model.path={config.model.path}: its tokenizer has {len(tokenizer)} tokens, the model only {vocab_size}: "
            "resize the model's embeddings, or use the tokenizer that it was trained with"
        )


def training_prompts(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Iterable[Mapping[str, Any]] | None,
    tools: ToolsOf | None = None,
    reader: ImageReader | None = None,
) -> list[Prompt]:
    """All training prompts."""
    loaded = load_prompts(config.data, config.prompt, tokenizer, dataset=dataset, tools=tools, reader=reader)
    if loaded.dropped or loaded.truncated:
        limit = config.data.max_prompt_tokens
        log.warning("prompts over %d tokens: %d dropped, %d truncated", limit, loaded.dropped, loaded.truncated)
    return loaded.prompts


def check_enough(prompts: Sequence[Prompt], config: Config) -> None:
    """Refuse a data set that is less than a step."""
    if len(prompts) < config.rollout.prompts_per_step:
        raise ConfigError(
            f"rollout.prompts_per_step={config.rollout.prompts_per_step}: the data set has only {len(prompts)} prompt(s): "
            "set rollout.prompts_per_step to at most that, or add rows"
        )


def held_out_prompts(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Iterable[Mapping[str, Any]] | None = None,
    tools: ToolsOf | None = None,
    reader: ImageReader | None = None,
) -> list[Prompt]:
    """Prompts of the first ``eval.rows`` held-out rows. Reads no later rows."""
    return load_prompts(
        config.data,
        config.prompt,
        tokenizer,
        held_out=True,
        first=config.eval.rows,
        dataset=dataset,
        tools=tools,
        reader=reader,
    ).prompts


def with_readable_golds(
    prompts: list[Prompt], config: Config, runner: RewardRunner, world: World, kind: str
) -> list[Prompt]:
    """The prompts whose right answers the rewards can read; ranks divide the reading. A collective call.

    Raises:
        ConfigError: a column is missing, or an answer cannot be read under ``rewards.bad_gold: error``, or none can.
    """
    if not prompts:
        return prompts
    runner.check(prompts[0])
    own = prompts[world.dp_rank :: world.dp_size]
    bad = dict(world.gather(list(world.together(lambda: runner.bad_golds(own)).items())))
    if not bad:
        return prompts
    rows = "; ".join(f"row {row}: {bad[row]}" for row in sorted(bad)[:5]) + ("; ..." if len(bad) > 5 else "")
    said = f"rewards cannot read the answers of {len(bad)} of {len(prompts)} {kind} rows ({rows})"
    if config.rewards.bad_gold == "error" or len(bad) == len(prompts):
        raise ConfigError(f"{said}; correct them, or set rewards.bad_gold=drop to leave such rows out")
    log.warning("%s; they are left out (rewards.bad_gold=drop)", said)
    return [prompt for prompt in prompts if prompt.index not in bad]
