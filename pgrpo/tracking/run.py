"""Where a run's numbers go: metrics.jsonl and completions.jsonl always; terminal, wandb and tensorboard when asked for.

Only rank 0 builds ``Trackers``. The JSONL files are the record of the run, and failing to write them fails the run; any
other tracker that fails while training is dropped with one warning, and training goes on.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from pgrpo.config import Config, ConfigError, redact, to_json
from pgrpo.tracking.console import HEADLINES, completions_table, metrics_panel, plain, printable
from pgrpo.tracking.record import appending, replacing, writing
from pgrpo.tracking.services import Service, Tensorboard, Wandb
from pgrpo.types import Group

log = logging.getLogger(__name__)

Row = dict[str, Any]


class Trackers:
    """Everything a run logs.

    Args:
        config: the run's configuration; ``track`` says which trackers there are.
        run_dir: the run folder, which exists. Files: metrics.jsonl, completions.jsonl, log.txt, tensorboard/, wandb/.
        resume: ``state_dict()`` of the checkpoint that the run goes on from: rows of later steps are dropped from the
            files, and the wandb run is the same one. None starts both JSONL files anew.

    Raises:
        ConfigError: a tracker that is asked for is not installed, or wandb has no login.
    """

    def __init__(self, config: Config, run_dir: Path, *, resume: dict[str, Any] | None = None):
        self._track, self._steps = config.track, config.train.steps
        self._state: dict[str, Any] = {"step": -1, "wandb_id": None, **(resume or {})}
        self._console = Console(markup=False, highlight=False, emoji=False) if config.track.console else None
        self._log_file = appending(run_dir / "log.txt")
        self._handler = _WarningHandler(self)
        logging.getLogger("pgrpo").addHandler(self._handler)
        self._files = [self._log_file]
        self._services: dict[str, Service] = {}
        if resume is None and (run_dir / "metrics.jsonl").exists():
            log.warning(
                "%s: an earlier try left no checkpoint; its metrics, completions and config are replaced, log.txt goes on",
                run_dir,
            )
        try:
            self._metrics_file = _reopen(run_dir / "metrics.jsonl", self._state["step"])
            self._files.append(self._metrics_file)
            self._completions_file = _reopen(run_dir / "completions.jsonl", self._state["step"])
            self._files.append(self._completions_file)
            if config.track.tensorboard:
                self._start("tensorboard", lambda: Tensorboard(run_dir, self._state["step"]))
            if config.track.wandb:
                self._start("wandb", lambda: Wandb(config, run_dir, self._state["wandb_id"]))
            if isinstance(wandb := self._services.get("wandb"), Wandb):
                self._state["wandb_id"] = wandb.run_id
        except BaseException:
            self.close()
            raise

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record one step; call it once a step. A number that is not finite is null in metrics.jsonl."""
        metrics = {name: float(value) for name, value in metrics.items()}
        row = {name: _finite(value) for name, value in metrics.items()}
        _write_row(self._metrics_file, {"step": step, **row})
        self._state["step"] = step
        self._tell_services(lambda service: service.log(step, metrics))
        if self._reports(step):
            shown = [name for pattern in HEADLINES for name in metrics if fnmatchcase(name, pattern)]
            numbers = {name: f"{metrics[name]:.4g}" for name in shown}
            line = f"step {step}/{self._steps}  " + "  ".join(f"{name} {value}" for name, value in numbers.items())
            self._write_log(line)
            if self._console:
                self._print(metrics_panel(f"step {step}/{self._steps}", numbers) if self._console.is_terminal else line)

    def completions(self, step: int, groups: Sequence[Group]) -> None:
        """Record ``track.completions`` samples of a step, spread evenly over its groups. completions.jsonl has them of every step,
        the terminal, wandb and tensorboard of those that are reported."""
        rows = redact([{"step": step, **row} for row in _pick(groups, self._track.completions)])
        for row in rows:
            _write_row(self._completions_file, row)
        if not rows or not self._reports(step):
            return
        self._tell_services(lambda service: service.completions(step, rows))
        if self._console and self._console.is_terminal:
            self._print(completions_table(rows, self._console.encoding))
        elif self._console:
            for row in rows:
                self._print(plain(row, self._console.encoding))

    def message(self, text: str) -> None:
        """A line for people: to log.txt, and to the terminal if there is one."""
        text = redact(text)
        self._write_log(text)
        if self._console:
            self._print(printable(text, self._console.encoding))

    def state_dict(self) -> dict[str, Any]:
        """JSON: the last logged step and the wandb run id. A checkpoint of step N takes it after ``log(N, ...)``."""
        return dict(self._state)

    def close(self) -> None:
        """Flush and close everything. Calling it again does nothing."""
        self._tell_services(lambda service: service.close())
        self._services.clear()
        logging.getLogger("pgrpo").removeHandler(self._handler)
        with ExitStack() as files:  # all of them, whatever one meets that still has something to write
            for file in self._files:
                files.enter_context(writing(file.name))
                files.callback(file.close)

    def _reports(self, step: int) -> bool:
        return step % self._track.console_every == 0 or step in (1, self._steps)

    def _print(self, renderable: Any) -> None:
        assert self._console
        # soft_wrap leaves the lines of a log whole; tables and panels fit themselves to the terminal.
        self._console.print(renderable, soft_wrap=isinstance(renderable, str))

    def _write_log(self, text: str) -> None:
        with writing(self._log_file.name):
            self._log_file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {printable(text)}\n")

    def _start(self, name: str, start: Callable[[], Service]) -> None:
        try:
            self._services[name] = start()
        except ConfigError:
            raise
        except Exception as error:  # no network, a timeout, a bug of its own: none of it is worth a run
            log.warning("%s did not start (%s: %s): the run goes on without it", name, type(error).__name__, error)

    def _tell_services(self, call: Callable[[Service], None]) -> None:
        for name, service in list(self._services.items()):
            try:
                call(service)
            except Exception as error:  # a tracker may raise anything, and none of it is worth a run
                del self._services[name]
                log.warning("%s failed (%s: %s): the run goes on without it", name, type(error).__name__, error)


class _WarningHandler(logging.Handler):
    """Brings warnings of any pgrpo file into log.txt and to the terminal."""

    def __init__(self, trackers: Trackers):
        super().__init__(logging.WARNING)
        self.trackers = trackers

    def emit(self, record: logging.LogRecord) -> None:
        text = f"{record.levelname.lower()}: {record.getMessage()}"
        self.trackers.message(text)
        if not self.trackers._console:
            print(redact(text), file=sys.stderr)


def _pick(groups: Sequence[Group], count: int) -> Iterator[Row]:
    episodes = [(group.prompt, episode) for group in groups for episode in group.episodes]
    count = min(count, len(episodes))
    for prompt, episode in (episodes[k * len(episodes) // count] for k in range(count)):
        yield {
            "prompt": prompt.text,
            "completion": episode.text,
            "reward": _finite(episode.reward),
            "parts": {name: _finite(value) for name, value in episode.reward_parts.items()},
            "advantage": _finite(episode.advantage),
            "finish_reason": episode.finish_reason,
        }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _reopen(path: Path, step: int) -> IO[str]:
    """Open a JSONL file to append, without rows after ``step`` and without a last line that a kill cut short."""
    if not path.exists():
        return appending(path)
    with path.open(encoding="utf-8", newline="\n") as rows, replacing(path) as kept:
        for line in rows:
            try:
                keep = line.endswith("\n") and json.loads(line)["step"] <= step
            except (ValueError, KeyError, TypeError):
                log.warning("%s: dropped a line that is not a row of it: %.80r", path, line)
                continue
            if keep:
                kept.write(line)
    return appending(path)


def _write_row(file: IO[str], row: Row) -> None:
    with writing(file.name):
        file.write(to_json(row, ensure_ascii=False, allow_nan=False) + "\n")
