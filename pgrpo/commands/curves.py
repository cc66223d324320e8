"""The panels that ``pgrpo plot`` draws, and how it reads the files of a run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pgrpo.config import ConfigError

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Panel:
    """One plot. ``names`` are patterns of metric names; with several runs only the first matching metric is drawn."""

    title: str
    unit: str
    names: tuple[str, ...]
    stacked: bool = False


PANELS = (
    Panel("Reward", "", ("reward", "rewards/*/mean")),
    Panel("Held-out split", "", ("eval/pass@*", "eval/greedy/pass@1")),
    Panel("Held-out rewards", "", ("eval/reward", "eval/greedy/reward", "eval/rewards/*/mean")),
    Panel("Completion length", "tokens", ("completions/mean_length", "eval/completions/mean_length")),
    Panel("Completions cut at the limit", "fraction", ("completions/clipped_ratio",)),
    Panel("Turns and calls", "per episode", ("episodes/turns/mean", "tools/call_frequency")),
    Panel("Ends of episodes", "fraction", ("episodes/end/*",)),
    Panel("Failed and bad calls", "fraction of calls", ("tools/failure_frequency", "tools/bad_call_frequency")),
    Panel("Entropy", "nats per token", ("entropy",)),
    Panel("KL to the reference model", "nats per token", ("kl",)),
    Panel("Sampler against policy", "mean |Δ log-prob|", ("sampling/sampling_logp_difference/mean",)),
    Panel("Gradient norm", "", ("grad_norm",)),
    Panel("Clipped tokens", "fraction", ("clip_ratio/low_mean", "clip_ratio/high_mean")),
    Panel("Groups without spread", "fraction", ("frac_reward_zero_std",)),
    Panel("Throughput", "tokens/s", ("perf/tokens_per_s",)),
    Panel("Time of a step", "seconds", ("time/step", "time/rollout", "time/reward", "time/*"), stacked=True),
)


def read_metrics(run_dir: Path) -> Rows:
    """The rows of metrics.jsonl in order of steps, one row a step. Ignores a last line that is still being written."""
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir}: no such run folder")
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(f"{run_dir}: not a run folder, it has no metrics.jsonl")
    steps: dict[int, dict[str, Any]] = {}
    for row in read_rows(path):
        steps.setdefault(row["step"], {}).update(row)
    if not any(len(row) > 1 for row in steps.values()):
        raise ConfigError(f"{path}: no step has been logged yet")
    return [steps[step] for step in sorted(steps)]


def read_rows(path: Path, given: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file, each extended by ``given`` and with a ``step``. Ignores a last line that is still being written.

    Raises:
        ConfigError: a line is not such a row.
    """
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                break
            try:
                row = json.loads(line) | (given or {})
                row["step"] = int(row["step"])
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{path}, line {number}: not a row of a run ({error})") from None
            yield row


def names_of(panel: Panel, rows: Iterable[dict[str, Any]]) -> list[str]:
    """The panel's metrics that occur in the rows, in the order of the panel."""
    known = {name for row in rows for name, value in row.items() if value is not None}
    matches = [name for pattern in panel.names for name in sorted(known) if fnmatchcase(name, pattern)]
    return list(dict.fromkeys(matches))


def panels_of(rows: Rows) -> list[tuple[Panel, list[str]]]:
    """The panels that have data, with their metrics. A held-out reward that equals a pass@k, as one of 0 and 1 does, is a name of
    that curve and no second curve."""
    found = {panel: names_of(panel, rows) for panel in PANELS}
    rates, rewards = (names for panel, names in found.items() if panel.title.startswith("Held-out"))
    curves = [[row.get(name) for row in rows] for name in rates]
    for name in [name for name in rewards if [row.get(name) for row in rows] in curves]:
        rewards.remove(name)
        rates.append(name)
    return [(panel, names) for panel, names in found.items() if names]


def interval_names(name: str) -> tuple[str, str] | None:
    """Names of the metrics that hold the bounds of a held-out metric's confidence interval."""
    kind, _, rest = name.partition("/")
    return (f"eval/ci95_low/{rest}", f"eval/ci95_high/{rest}") if kind == "eval" else None
