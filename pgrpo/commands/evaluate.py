"""``pgrpo eval``: mean rewards and pass@k on the held-out split, greedy and sampled, with 95% confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pgrpo.config import Config, ConfigError, fit_world_size
from pgrpo.distributed.world import World, start, world_size
from pgrpo.early import check_folder_to_write
from pgrpo.process.lock import agree_on_run_dir, run_folder
from pgrpo.tracking.live import showing
from pgrpo.training.build import Parts, build
from pgrpo.training.caller import Given
from pgrpo.training.checkpointing import Checkpoints, find
from pgrpo.training.evaluation import evaluate_held_out, own_folder
from pgrpo.training.progress import Progress


def evaluate(
    config: Config, checkpoint: str | None = None, out: Path | None = None, given: Given = Given()
) -> dict[str, float]:
    """Evaluate the config's model, or a checkpoint of it; print a table and write all completions.

    Args:
        checkpoint: a folder, ``auto`` for the run's newest, ``best`` for the one that ``checkpoint.keep_best`` kept.
        out: folder for samples.jsonl and summary.json. None: ``eval/step_N`` in the run's folder, N = 0 for the model itself.
        given: rows and functions from Python.

    Raises:
        ConfigError: there is no held-out split, or no such checkpoint.
    """
    if not (config.data.eval_path or config.data.eval_split):
        raise ConfigError(
            "evaluation needs held-out rows: set data.eval_path to a file of them, or data.eval_split to a split of data.path"
        )
    if not (config.rewards.functions or given.rewards):
        raise ConfigError("rewards.functions: [] scores nothing; add rewards.functions=[{function: exact_match}], say")
    if out is not None:
        check_folder_to_write(out, "--out ")
    # A run reads the held-out split only if eval.every is set. Reference, teacher and keep_best are for training only.
    config = replace(config, rollout=replace(config.rollout, prompts_per_step=1))  # training rows do not matter
    config = replace(
        fit_world_size(config, world_size()),
        eval=replace(config.eval, every=config.eval.every or 1),
        loss=replace(config.loss, kl_coef=0.0, teacher=None),
        checkpoint=replace(config.checkpoint, keep_best=None),
        train=replace(config.train, steps=0),  # no update needs memory
    )
    progress = Progress()
    with (
        start(config.model.fsdp_size, config.model.sequence_parallel_size) as world,
        showing(console := Console(quiet=not world.is_main)),
        built(config, world, given, checkpoint) as (parts, path),
    ):
        if path:
            root = run_folder(config) / "checkpoints"
            Checkpoints(root, parts.learner, parts.stream, progress).load_weights(path)
        folder = out or own_folder(config, progress.step)
        held_out, was_there = parts.held_out, (folder / "summary.json").exists()
        metrics = evaluate_held_out(
            config, world, parts.episodes, parts.rewards, held_out, progress.step, out, parts.reader
        )
    name = f"{config.model.path} after step {progress.step}" if checkpoint else config.model.path
    console.print(_table(f"{name}: {len(held_out)} prompts x {config.eval.samples}", metrics))
    console.print(f"{'replaced' if was_there else 'wrote'} {folder}/samples.jsonl and summary.json", soft_wrap=True)
    return metrics


@contextmanager
def built(config: Config, world: World, given: Given, checkpoint: str | None) -> Iterator[tuple[Parts, Path | None]]:
    """The parts, and the checkpoint's path, which is found and verified before the model is loaded."""
    agree_on_run_dir(config, world.from_main)
    path = find(checkpoint, run_folder(config) / "checkpoints", world) if checkpoint else None
    if checkpoint and path is None:
        raise ConfigError(f"--checkpoint {checkpoint}: run_dir={config.run_dir} has no checkpoint")
    with build(config, world, given) as parts:
        yield parts, path


def _table(title: str, metrics: Mapping[str, float]) -> Table:
    """One row a metric; a column for sampled completions, and one for greedy completions if there are any."""
    modes = {"sampled": ""} | (
        {"greedy": "greedy/"} if any(name.startswith("eval/greedy/") for name in metrics) else {}
    )
    table = Table(title=title, caption="brackets: 95% confidence interval over prompts")
    table.add_column("metric")
    for mode in modes:
        table.add_column(mode, justify="right")
    names = [name.removeprefix("eval/") for name in metrics]
    for name in [n for n in names if not n.startswith(("ci95_", "greedy/"))]:
        table.add_row(name, *(_cell(metrics, prefix + name) for prefix in modes.values()))
    return table


def _cell(metrics: Mapping[str, float], name: str) -> str:
    value = metrics.get(f"eval/{name}")
    if value is None:  # pass@k of one greedy completion
        return ""
    low, high = (metrics.get(f"eval/{end}/{name}", math.nan) for end in ("ci95_low", "ci95_high"))
    return f"{value:.4g}" if math.isnan(low) else f"{value:.4g} [{low:.4g}, {high:.4g}]"
