"""Logs a run: always to metrics.jsonl and completions.jsonl, and to terminal, wandb and tensorboard as configured.

Only rank 0 builds ``Trackers``. The JSONL files are the record of the run: an error in writing them ends it. Any other tracker that
fails is dropped with one warning, and training continues.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any, Self

from rich.console import Console

from pgrpo.config import Config, ConfigError, redact, to_json
from pgrpo.tracking.console import HEADLINES, completions_table, metrics_panel, plain, printable
from pgrpo.tracking.live import duration
from pgrpo.tracking.record import appending, replacing, shown, writing
from pgrpo.tracking.services import Service, Tensorboard, Wandb
from pgrpo.tracking.thumbnails import Pictures, Thumbnails, images_of, rows_of
from pgrpo.types import Episode, Group, Prompt

log = logging.getLogger(__name__)

Row = dict[str, Any]
PACE = 10
"""Number of steps whose mean time says how long the rest takes."""


class Trackers:
    """All outputs of a run.

    Args:
        config: the run's configuration; ``track`` chooses the trackers.
        run_dir: the run folder, which exists. Files: metrics.jsonl, completions.jsonl, log.txt, thumbnails/,
            tensorboard/, wandb/.
        resume: ``state_dict()`` from the checkpoint that the run resumes from: drops rows of later steps from the files and
            continues the same wandb run. None starts both JSONL files anew.
        console: the terminal (``track.console``), or None.
        pictures: reads the images of prompts, for thumbnails; None where there are none.
        early: the warnings until now, which log.txt gets too; it keeps no later ones.

    Raises:
        ConfigError: a configured tracker is not installed, or wandb has no login.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        *,
        resume: dict[str, Any] | None = None,
        console: Console | None = None,
        pictures: Pictures | None = None,
        early: EarlyWarnings | None = None,
    ):
        self._track, self._steps = config.track, config.train.steps
        self._state: dict[str, Any] = {"step": -1, "wandb_id": None, **(resume or {})}
        self._console = console
        self.thumbnails = Thumbnails(run_dir, pictures)
        self._log_file = appending(run_dir / "log.txt")
        self._handler = _WarningHandler(self)
        before = early.hand_over() if early else ()
        logging.getLogger("pgrpo").addHandler(self._handler)
        self._files = [self._log_file]
        self._services: dict[str, Service] = {}
        try:
            for record in before:
                self._write_log(redact(_line(record)), record.created)
            if resume is None and (run_dir / "metrics.jsonl").exists():
                log.warning(
                    "%s: an earlier run saved no checkpoint; replacing its metrics, completions and config, appending to "
                    "log.txt",
                    run_dir,
                )
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
            self._times = deque([(max(self._state["step"], 0), time.monotonic())], maxlen=PACE + 1)
        except BaseException:
            self.close()
            raise

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Log one step; call this once a step. Numbers that are not finite are null in metrics.jsonl."""
        metrics = {name: float(value) for name, value in metrics.items()}
        row = {name: _finite(value) for name, value in metrics.items()}
        _write_row(self._metrics_file, {"step": step, **row})
        self._state["step"] = step
        self._tell_services(lambda service: service.log(step, metrics))
        pace = self._pace(step)
        if self._reports(step):
            shown = [name for pattern in HEADLINES for name in metrics if fnmatchcase(name, pattern)]
            numbers = {name: f"{metrics[name]:.4g}" for name in shown}
            title = f"step {step}/{self._steps}{pace}"
            line = f"{title}  " + "  ".join(f"{name} {value}" for name, value in numbers.items())
            self._write_log(line)
            if self._console:
                self._print(metrics_panel(title, numbers) if self._console.is_terminal else line)

    def completions(self, step: int, groups: Sequence[Group]) -> None:
        """Log ``track.completions`` samples of a step, spread evenly over its groups: to completions.jsonl in every step, to the
        terminal, wandb and tensorboard every ``track.console_every`` steps."""
        picked = list(_pick(groups, self._track.completions))
        for prompt, episode in picked:
            first, later = images_of(prompt, episode)
            self.thumbnails.keep([*first, *later])
        rows = redact([{"step": step, **_row(prompt, episode)} for prompt, episode in picked])
        for row in rows:
            _write_row(self._completions_file, row)
        if not rows or not self._reports(step):
            return
        rows = list(map(self.thumbnails.named, rows))
        self._tell_services(lambda service: service.completions(step, rows))
        if self._console and self._console.is_terminal:
            self._print(completions_table(rows, self._console.encoding))
        elif self._console:
            for row in rows:
                self._print(plain(row, self._console.encoding))

    def message(self, text: str) -> None:
        """Write a line to log.txt and, if configured, to the terminal."""
        text = redact(text)
        self._write_log(text)
        if self._console:
            self._print(printable(text, self._console.encoding))

    def state_dict(self) -> dict[str, Any]:
        """The last logged step and the wandb run id, as JSON types. Call this after ``log(N, ...)`` for a checkpoint of step N."""
        return dict(self._state)

    def close(self) -> None:
        """Flush and close everything. A second call does nothing."""
        self._tell_services(lambda service: service.close())
        self._services.clear()
        logging.getLogger("pgrpo").removeHandler(self._handler)
        with ExitStack() as files:  # close all, even if one fails to flush
            for file in self._files:
                files.enter_context(writing(file.name))
                files.callback(file.close)

    def _reports(self, step: int) -> bool:
        return step % self._track.console_every == 0 or step in (1, self._steps)

    def _pace(self, step: int) -> str:
        """``, 12 s a step, about 20 min left``; nothing before the first step is done."""
        self._times.append((step, time.monotonic()))
        (first, began), (_, now) = self._times[0], self._times[-1]
        if step <= first:  # metrics before training, or those that waited for an evaluation when the run was stopped
            self._times = deque([(step, now)], maxlen=PACE + 1)
            return ""
        each = (now - began) / (step - first)
        left = f", about {duration(each * (self._steps - step))} left" if step < self._steps else ""
        return f", {duration(each)} a step{left}"

    def _print(self, renderable: Any) -> None:
        assert self._console
        # soft_wrap keeps log lines whole; tables and panels adapt to the terminal's width.
        self._console.print(renderable, soft_wrap=isinstance(renderable, str))

    def _write_log(self, text: str, seconds: float | None = None) -> None:
        """``seconds``: when it was said, as of ``time.time``; None: now."""
        when = datetime.fromtimestamp(time.time() if seconds is None else seconds)
        with writing(self._log_file.name):
            self._log_file.write(f"{when:%Y-%m-%d %H:%M:%S}  {printable(text)}\n")

    def _start(self, name: str, start: Callable[[], Service]) -> None:
        try:
            self._services[name] = start()
        except ConfigError:
            raise
        except Exception as error:  # no network, a timeout, a bug of its own: not worth losing the run
            log.warning("%s did not start (%s: %s): the run continues without it", name, type(error).__name__, error)

    def _tell_services(self, call: Callable[[Service], None]) -> None:
        for name, service in list(self._services.items()):
            try:
                call(service)
            except Exception as error:  # a tracker may raise anything: not worth losing the run
                del self._services[name]
                log.warning("%s failed (%s: %s): the run continues without it", name, type(error).__name__, error)


class EarlyWarnings(logging.Handler):
    """Inside a ``with`` block, keeps the warnings of all pgrpo modules until ``Trackers`` writes them to log.txt. They are printed
    as if this were not there."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._records: list[logging.LogRecord] = []

    def __enter__(self) -> Self:
        logging.getLogger("pgrpo").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("pgrpo").removeHandler(self)

    def hand_over(self) -> list[logging.LogRecord]:
        """The warnings so far. No more are kept, nor printed by this."""
        self.__exit__()
        return self._records

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(record)
        # logging does so itself where there is no handler at all
        if logging.lastResort and not logging.getLogger().handlers:
            logging.lastResort.handle(record)


class _WarningHandler(logging.Handler):
    """Writes warnings of all pgrpo modules to log.txt and the terminal."""

    def __init__(self, trackers: Trackers):
        super().__init__(logging.WARNING)
        self.trackers = trackers

    def emit(self, record: logging.LogRecord) -> None:
        text = _line(record)
        self.trackers.message(text)
        if not self.trackers._console:
            print(redact(text), file=sys.stderr)


def _line(record: logging.LogRecord) -> str:
    return f"{record.levelname.lower()}: {record.getMessage()}"


def _pick(groups: Sequence[Group], count: int) -> Iterator[tuple[Prompt, Episode]]:
    episodes = [(group.prompt, episode) for group in groups for episode in group.episodes]
    count = min(count, len(episodes))
    return (episodes[k * len(episodes) // count] for k in range(count))


def _row(prompt: Prompt, episode: Episode) -> Row:
    # Of the first token: the episode's, where the comparison gives all of its tokens the same.
    advantage = next((sample.advantages[0] for sample in episode.samples if sample.advantages), None)
    return {
        **shown(prompt, episode),
        **rows_of(prompt, episode),
        "reward": _finite(episode.reward),
        "parts": {name: _finite(value) for name, value in episode.reward_parts.items()},
        "advantage": _finite(advantage),
        "finish_reason": episode.finish_reason,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _reopen(path: Path, step: int) -> IO[str]:
    """Open a JSONL file to append. First drops rows after ``step`` and lines that are not valid rows, as a kill leaves."""
    if not path.exists():
        return appending(path)
    with path.open(encoding="utf-8", newline="\n") as rows, replacing(path) as kept:
        for line in rows:
            try:
                keep = line.endswith("\n") and json.loads(line)["step"] <= step
            except (ValueError, KeyError, TypeError):
                log.warning("%s: dropped a line that is not a valid row: %.80r", path, line)
                continue
            if keep:
                kept.write(line)
    return appending(path)


def _write_row(file: IO[str], row: Row) -> None:
    with writing(file.name):
        file.write(to_json(row, ensure_ascii=False, allow_nan=False) + "\n")
