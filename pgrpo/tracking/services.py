"""wandb and tensorboard: metrics of every step, and completions as a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from omegaconf import OmegaConf

from pgrpo.config import Config, ConfigError, to_yaml
from pgrpo.tracking.console import number, printable
from pgrpo.tracking.thumbnails import paths_of, sheet

Row = dict[str, Any]


class Service(Protocol):
    """A tracker outside of pgrpo. After an error it is dropped, and the run continues."""

    def log(self, step: int, metrics: dict[str, float]) -> None: ...
    def completions(self, step: int, rows: Sequence[Row]) -> None:
        """``rows``: as in completions.jsonl."""
        ...

    def close(self) -> None: ...


def check_services(config: Config) -> None:
    """Refuse a service that is not installed, and wandb without a login. Sends nothing; runs before a model is loaded.

    Raises:
        ConfigError: the message has what to install or set.
    """
    if config.track.tensorboard:
        _summary_writer()
    if config.track.wandb:
        wandb = _wandb()
        can_start = wandb.setup().settings.mode != "online" or wandb.login(prompt=False, verify=False)
        wandb.teardown()  # so that the run reads its settings again
        if not can_start:
            raise ConfigError("track.wandb=true: wandb has no login; run `wandb login`, or set WANDB_MODE=offline")


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "track.tensorboard=true: tensorboard is not installed; pip install -e '.[tensorboard]'"
        ) from None
    return SummaryWriter


def _wandb() -> Any:
    try:
        import wandb
    except ImportError:
        raise ConfigError("track.wandb=true: wandb is not installed; pip install -e '.[wandb]'") from None
    return wandb


class Tensorboard:
    """Event files in ``run_dir/tensorboard``. Hides events that were logged there after ``step`` (-1: all).

    Raises:
        ConfigError: tensorboard is not installed.
    """

    def __init__(self, run_dir: Path, step: int):
        self._writer = _summary_writer()(str(run_dir / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def completions(self, step: int, rows: Sequence[Row]) -> None:
        self._writer.add_text("completions", "\n\n---\n\n".join(map(_markdown, rows)), step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A new wandb run, or the run ``run_id`` continued. Respects WANDB_MODE=offline.

    Raises:
        ConfigError: wandb is not installed.
        Exception: anything else that ``wandb.init`` raises.
    """

    def __init__(self, config: Config, run_dir: Path, run_id: str | None):
        wandb = _wandb()
        self._run = wandb.init(
            project=config.track.wandb_project,
            name=run_dir.resolve().name,
            dir=run_dir,
            id=run_id,
            resume="allow",
            config=OmegaConf.to_container(OmegaConf.create(to_yaml(config))),  # type: ignore[arg-type]
            allow_val_change=True,
            settings=wandb.Settings(console="off"),
        )
        self._table, self._image, self.run_id = wandb.Table, wandb.Image, self._run.id
        self._thumbnails = run_dir / "thumbnails"
        # A step axis of our own: wandb's drops rows that a resumed run logs again.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def completions(self, step: int, rows: Sequence[Row]) -> None:
        table = [_flat(step, row) for row in rows]
        sheets = [sheet(paths_of(self._thumbnails, row)) for row in rows]
        if any(sheets):  # one picture a row, of all its images
            for flat, made in zip(table, sheets, strict=True):
                flat["images"] = self._image(made) if made else None
        data = [list(row.values()) for row in table]
        self._run.log({"step": step, "completions": self._table(columns=list(table[0]), data=data)})

    def close(self) -> None:
        self._run.finish()


def _flat(step: int, row: Row) -> Row:
    """One row of the table, by column."""
    texts = {name: row[name].encode("utf-8", "backslashreplace").decode() for name in ("prompt", "completion")}
    parts = {f"rewards/{name}": value for name, value in row["parts"].items()}
    numbers = {"reward": row["reward"], **parts, "advantage": row["advantage"]}
    return {"step": step, **texts, **numbers, "finish_reason": row["finish_reason"]}


def _markdown(row: Row) -> str:
    """A sample as markdown. Texts are indented as code, so that a model's text is not rendered as markdown or HTML."""
    numbers = {"reward": row["reward"], **row["parts"], "advantage": row["advantage"]}
    head = "  ".join(f"{name} {number(value)}" for name, value in numbers.items()) + f"  {row['finish_reason']}"
    texts = [("prompt", row["prompt"]), ("completion", row["completion"]), ("rewards", head)]
    return "\n\n".join(
        f"{name}\n\n" + "\n".join(f"    {line}" for line in printable(t).split("\n")) for name, t in texts
    )
