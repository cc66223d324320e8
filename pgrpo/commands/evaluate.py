"""``pgrpo eval``: mean reward and pass@k on the held-out split."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console
from rich.table import Table

from pgrpo.config import Config, ConfigError
from pgrpo.distributed import start
from pgrpo.training.loop import evaluate_run
from pgrpo.training.run import build_run


def evaluate(config: Config, checkpoint: str | None = None) -> dict[str, float]:
    """Evaluate the config's model, or a checkpoint of it (a folder, or ``auto`` for the run's newest), and print a table."""
    if not (config.data.eval_path or config.data.eval_split):
        raise ConfigError("data.eval_split is not set: name the held-out split, or a file in data.eval_path")
    if not config.eval.every:  # building a run reads the held-out split only if it is evaluated
        config = replace(config, eval=replace(config.eval, every=1))
    with start(config.model.fsdp_size) as world, build_run(config, world) as run:
        if checkpoint and run.restore(checkpoint) is None:
            raise ConfigError(f"--checkpoint {checkpoint}: run_dir={config.run_dir} has no checkpoint")
        metrics = evaluate_run(run)
    table = Table(title=f"{checkpoint or config.model.path}: {len(run.held_out)} prompts x {config.eval.samples}")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4g}")
    Console(quiet=not world.is_main).print(table)
    return metrics
