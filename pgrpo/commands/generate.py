"""``pgrpo generate``: what a model, a checkpoint or an export writes: in a chat, or for the prompts of a file, with rewards."""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from pgrpo.commands.evaluate import built
from pgrpo.config import PYTHON, Config, ConfigError, PromptConfig, fit_world_size, redact, to_json
from pgrpo.config.sampling import sampling_params
from pgrpo.config.task import EnvironmentConfig
from pgrpo.data import load_prompts
from pgrpo.data.templates import template_columns
from pgrpo.distributed.world import start, world_size
from pgrpo.planning.hub import load_hf_config
from pgrpo.planning.rope import positions
from pgrpo.process.caches import use_caches
from pgrpo.process.lock import run_folder
from pgrpo.rollout.base import sample_seeds
from pgrpo.tracking import printable
from pgrpo.tracking.live import showing
from pgrpo.tracking.record import replacing
from pgrpo.training.build import Parts
from pgrpo.training.caller import Given
from pgrpo.training.checkpointing import Checkpoints
from pgrpo.training.evaluation import result_rows
from pgrpo.training.progress import Progress
from pgrpo.training.prompts import load_tokenizer
from pgrpo.training.rollout import sample_and_score
from pgrpo.types import Messages, Prompt

log = logging.getLogger(__name__)
Row = dict[str, Any]


def generate(
    config: Config,
    checkpoint: str | None = None,
    prompts: Path | None = None,
    *,
    samples: int = 1,
    rewards: bool = True,
    out: Path | None = None,
    may_lower: Collection[str] = (),
) -> None:
    """Print completions, sampled at ``eval.temperature`` (None: the rollout's; 0: greedy).

    Args:
        checkpoint: a folder, ``auto`` or ``best``. None: the config's model itself.
        prompts: rows that the config's prompt is filled with, in any form that ``data.path`` reads, or a .txt file, whose lines
            are values of the only column that the prompt uses. None: a chat on the terminal, or with what is piped in, a line a
            turn, without tools.
        samples: completions of each prompt.
        rewards: score them with the config's rewards, which may need columns.
        out: a JSONL file to write, with one completion a row.
        may_lower: those of ``data.max_prompt_tokens`` and ``rollout.max_completion_tokens`` that are lowered for a model with
            fewer positions.

    Raises:
        ConfigError: there is no such checkpoint, or the rows do not give prompts.
    """
    rows, config = None, fit_world_size(config, world_size())
    if may_lower:
        config = _within_positions(config, may_lower)
    if prompts is None:
        if world_size() > 1:
            raise ConfigError("a chat needs a single process; with torchrun give --prompts FILE")
        rows = [{"text": "1"}]  # what is loaded at the start; turns come later
        line = replace(config.prompt, template="{text}", messages=[], messages_column=None, answer_column=None)
        config = replace(config, prompt=line, tools=[], environment=EnvironmentConfig())
    elif prompts.suffix == ".txt":
        rows = _rows_of_lines(prompts, config.prompt)
    scored = rewards and prompts is not None and bool(config.rewards.functions)
    config = replace(
        config,
        data=replace(config.data, path=str(prompts) if rows is None else PYTHON, name=None, shuffle=False),
        rollout=replace(config.rollout, prompts_per_step=1),
        rewards=config.rewards if scored else replace(config.rewards, functions=[]),
        loss=replace(config.loss, kl_coef=0.0, function=None, teacher=None),
        eval=replace(config.eval, every=0),
        checkpoint=replace(config.checkpoint, keep_best=None),
        train=replace(config.train, steps=0),  # no update needs memory
    )
    given = Given(rewards=[] if scored else [no_reward], dataset=rows)
    with start(config.model.fsdp_size, config.model.sequence_parallel_size) as world:
        console = Console(markup=False, highlight=False, emoji=False, quiet=not world.is_main)
        with showing(console), built(config, world, given, checkpoint) as (parts, path):
            progress = Progress()
            if path:
                root = run_folder(config) / "checkpoints"
                Checkpoints(root, parts.learner, parts.stream, progress).load_weights(path)
            if prompts is None:
                _chat(parts, config, console)
                return
            found = _complete(parts, parts.stream.take(len(parts.stream)), samples, progress.step)
            for row in found:
                _show(row, console)
            if out and world.is_main:
                was_there = out.exists()
                with replacing(out, "{fix}") as file:
                    file.writelines(to_json(row, ensure_ascii=False, allow_nan=False) + "\n" for row in found)
                console.print(f"{'replaced' if was_there else 'wrote'} {out}", soft_wrap=True)


def _within_positions(config: Config, may_lower: Collection[str]) -> Config:
    """The config with limits that the model's positions hold. If both may be lowered, a completion has at most half of them."""
    use_caches(config.cache_dir)
    most = config.model.max_positions or positions(load_hf_config(config.model))
    if most is None or config.has_tools or config.max_sample_tokens <= most:
        return config
    prompt, completion = config.data.max_prompt_tokens, config.rollout.max_completion_tokens
    if "rollout.max_completion_tokens" in may_lower:
        completion = min(completion, most // 2 if "data.max_prompt_tokens" in may_lower else most - prompt)
    if "data.max_prompt_tokens" in may_lower:
        prompt = min(prompt, most - completion)
    if min(prompt, completion) < 1:
        return config  # refused later, as what the user set has no place
    log.warning(
        "the model has %d positions: data.max_prompt_tokens=%d, rollout.max_completion_tokens=%d",
        most,
        prompt,
        completion,
    )
    return replace(
        config,
        data=replace(config.data, max_prompt_tokens=prompt),
        rollout=replace(config.rollout, max_completion_tokens=completion),
    )


def _rows_of_lines(file: Path, prompt: PromptConfig) -> list[Row]:
    """A row a line, with the one column that the prompt uses."""
    columns = template_columns(prompt)
    if prompt.messages_column or len(columns) != 1:
        names = " and ".join(f"`{name}`" for name in columns)
        fix = f"give rows with {names} (.jsonl)" if columns else "write a column into it, such as {prompt}"
        raise ConfigError(
            f"--prompts {file}: a line is text for one column, and the prompt uses {names or 'none'}; {fix}"
        )
    rows = [{columns[0]: line} for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not rows:
        raise ConfigError(f"--prompts {file}: has no line of text; write a prompt a line")
    return rows


def no_reward(completions: list[str]) -> list[None]:
    """Where texts are all that is wanted."""
    return [None] * len(completions)


def _complete(parts: Parts, prompts: Sequence[Prompt], samples: int, step: int, turn: int = 0) -> list[Row]:
    config = parts.config
    seeds = [sample_seeds(config.seed, "generate", turn, prompt.index, group_size=samples) for prompt in prompts]
    params = sampling_params(config, config.eval.temperature)
    with parts.engine.awake(step):
        scored = sample_and_score(parts.episodes, parts.rewards, parts.world, prompts, params, seeds, "generating")
    return list(
        result_rows("sampled" if params.temperature else "greedy", parts.world.gather(scored.groups), parts.rewards)
    )


def _show(row: Row, console: Console) -> None:
    known = {name: value for name, value in row["parts"].items() if value is not None}
    rewards = f"  reward {row['reward']:.4g} ({', '.join(f'{n} {v:.4g}' for n, v in known.items())})" if known else ""
    head = f"--- row {row['index']}, sample {row['sample']}: {row['tokens']} tokens, {row['finish_reason']}{rewards}"
    console.print(f"{head}\n{_clean(row['prompt'])}\n>>> {_clean(row['completion'])}\n", soft_wrap=True)


def _chat(parts: Parts, config: Config, console: Console) -> None:
    """Every line is a turn. A model without a chat template continues each line by itself."""
    tokenizer = load_tokenizer(config)
    kwargs = config.prompt.chat_template_kwargs
    is_chat = bool(tokenizer.chat_template or kwargs.get("chat_template"))
    prompt = PromptConfig(messages_column="chat", chat_template_kwargs=kwargs) if is_chat else config.prompt
    history: Messages = []
    console.print(
        "/new begins a new chat, Ctrl-D ends" if is_chat else "no chat template: each line is continued; Ctrl-D ends"
    )
    for turn, line in enumerate(_lines()):
        if line == "/new":
            history = []
            continue
        rows = [{"chat": [*history, {"role": "user", "content": line}], "text": line}]
        try:
            loaded = load_prompts(config.data, prompt, tokenizer, dataset=rows)
        except ConfigError as error:
            console.print(f"{error}; /new begins a new chat", soft_wrap=True)
            continue
        reply = _complete(parts, loaded.prompts, 1, 0, turn)[0]["completion"]
        history = [*rows[0]["chat"], {"role": "assistant", "content": reply}]
        console.print(_clean(reply), soft_wrap=True)


def _lines() -> Iterator[str]:
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line


def _clean(text: str) -> str:
    return printable(redact(text))
