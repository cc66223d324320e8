"""``pgrpo plot``: a run, or several beside each other, as one PNG and (one run) one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import json
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pgrpo.config import ConfigError
from pgrpo.trackers import printable


@dataclass(frozen=True)
class Panel:
    """One plot. ``names`` are patterns of metric names; with several runs only the first that is found is drawn."""

    title: str
    unit: str
    names: tuple[str, ...]
    stacked: bool = False


PANELS = (
    Panel("Reward", "", ("reward", "rewards/*/mean")),
    Panel("Held-out split", "", ("eval/reward", "eval/pass@*", "eval/rewards/*/mean")),
    Panel("Completion length", "tokens", ("completions/mean_length", "eval/completions/mean_length")),
    Panel("Completions cut at the limit", "fraction", ("completions/clipped_ratio",)),
    Panel("Entropy", "nats per token", ("entropy",)),
    Panel("KL to the reference model", "nats per token", ("kl",)),
    Panel("Sampler against policy", "mean |difference of log-probs|", ("sampling/sampling_logp_difference/mean",)),
    Panel("Gradient norm", "", ("grad_norm",)),
    Panel("Throughput", "tokens/s", ("perf/tokens_per_s",)),
    Panel("Time of a step", "seconds", ("time/step", "time/rollout", "time/reward", "time/*"), stacked=True),
)
COLORS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#64748b")
INK, FAINT = "#1f2937", "#9ca3af"
FEW = 40  # points that are drawn themselves, not smoothed
RECENT = 40  # completions in the page

Rows = list[dict[str, Any]]


def plot(run_dirs: Path | Sequence[Path], out: Path | None = None) -> list[Path]:
    """Draw one run or several.

    Args:
        run_dirs: folders with a metrics.jsonl.
        out: folder for plot.png and, for one run, report.html. None: the run's folder; the current one for several.

    Returns:
        The files that were written.

    Raises:
        ConfigError: a folder is missing, or has no metrics to draw.
    """
    folders = [Path(run_dirs)] if isinstance(run_dirs, str | Path) else [Path(run_dir) for run_dir in run_dirs]
    if not folders:
        raise ConfigError("plot: no run folder given")
    runs = {_label(folder, folders): read_metrics(folder) for folder in folders}
    target = out or (folders[0] if len(folders) == 1 else Path())
    target.mkdir(parents=True, exist_ok=True)
    png = target / "plot.png"
    draw(runs).savefig(png, dpi=150)
    if len(folders) > 1:
        return [png]
    report = target / "report.html"
    report.write_text(page(folders[0], png.read_bytes(), next(iter(runs.values()))), encoding="utf-8")
    return [png, report]


def read_metrics(run_dir: Path) -> Rows:
    """The rows of metrics.jsonl by ascending step, each step once, without a last line that is still being written."""
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir}: no such run folder")
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(f"{run_dir}: not a run folder, it has no metrics.jsonl")
    steps: dict[int, dict[str, Any]] = {}
    for row in _read_rows(path):
        steps.setdefault(row["step"], {}).update(row)
    if not any(len(row) > 1 for row in steps.values()):
        raise ConfigError(f"{path}: no step has been logged yet")
    return [steps[step] for step in sorted(steps)]


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over a twentieth of the run; NaN entries take no part."""
    half = len(values) // 40
    kernel = np.ones(2 * half + 1)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), kernel, mode="full")[half : half + len(values)]
    count = np.convolve(known.astype(float), kernel, mode="full")[half : half + len(values)]
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def draw(runs: dict[str, Rows]) -> Figure:
    """A grid of the panels that have data, for runs by label."""
    found = [(panel, names) for panel in PANELS if (names := _names(panel, runs))]
    if not found:
        raise ConfigError(f"{', '.join(runs)}: metrics.jsonl has none of the metrics that plot draws")
    labels = _legend(list(runs))
    colors = dict(zip(dict.fromkeys(labels.values()), _colors(len(runs)), strict=False))
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    steps = [row["step"] for rows in runs.values() for row in rows]
    first, final = min(steps), max(steps)
    margin = max(0.5, 0.03 * (final - first))
    figure = Figure(figsize=(5.2 * columns, 3.1 * lines + 0.6), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # type: ignore[union-attr]
    figure.suptitle(
        next(iter(runs)) if len(runs) == 1 else "", x=0.012, ha="left", fontsize=13, weight="bold", color=INK
    )
    for i, (panel, names) in enumerate(found):
        axes = figure.add_subplot(lines, columns, i + 1)
        _style(axes, panel, last=i + columns >= len(found))
        if len(runs) > 1:
            for label, rows in runs.items():
                _line(axes, rows, names[0], colors[labels[label]], None)
        elif panel.stacked and len(names) > 1:
            _stack(axes, next(iter(runs.values())), names)
        else:
            rows = next(iter(runs.values()))
            # Equal series (a reward that is the only one) are one line under all of their names: none hides another.
            same: dict[tuple, list[str]] = {}
            for name in names:
                same.setdefault(tuple((row["step"], row.get(name)) for row in rows), []).append(name)
            for equal, color in zip(same.values(), _colors(len(same)), strict=True):
                _line(axes, rows, equal[0], color, ",\n".join(equal) if len(names) > 1 else None)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=7.5, labelcolor=INK, handlelength=1.2, framealpha=0.8, edgecolor="none")
        if not panel.stacked:
            axes.margins(y=0.12)
        axes.set_xlim(first - margin, final + margin)
    if len(runs) > 1:
        handles = [figure.axes[0].plot([], [], color=color, lw=2)[0] for color in colors.values()]
        figure.legend(
            handles, list(colors), loc="outside upper left", ncols=min(len(colors), 5), frameon=False, fontsize=10
        )
    return figure


def page(run_dir: Path, png: bytes, rows: Rows) -> str:
    """One HTML page without any external resource; everything that a config or a model wrote is escaped."""
    config = run_dir / "config.yaml"
    resolved = config.read_text(encoding="utf-8") if config.is_file() else "config.yaml is missing"
    samples_file = run_dir / "completions.jsonl"
    samples = deque(_read_rows(samples_file), maxlen=RECENT) if samples_file.is_file() else []
    last: dict[str, Any] = {}
    for row in rows:
        last |= {name: value for name, value in row.items() if value is not None}
    numbers = "".join(f"<tr><td>{_html(k)}</td><td>{v:.6g}</td></tr>" for k, v in sorted(last.items()) if k != "step")
    completions = "".join(_sample_row(sample) for sample in reversed(samples))
    return PAGE.format(
        title=_html(run_dir.resolve().name),
        step=rows[-1]["step"],
        image=base64.b64encode(png).decode(),
        completions=completions or '<tr><td colspan="6">none logged</td></tr>',
        numbers=numbers,
        config=_html(resolved),
    )


def _read_rows(path: Path) -> Rows:
    rows = []
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                break
            try:
                row = json.loads(line)
                row["step"] = int(row["step"])
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{path}, line {number}: not a row of a run ({error})") from None
            rows.append(row)
    return rows


def _label(folder: Path, folders: list[Path]) -> str:
    name = folder.resolve().name
    return name if [other.resolve().name for other in folders].count(name) == 1 else str(folder)


def _legend(labels: list[str]) -> dict[str, str]:
    """Name in the legend of each run. Where there are more runs than colors, those whose names differ in a last number only
    (the seed, say) are one: ``grpo_0`` and ``grpo_1`` are ``grpo_*``."""
    if len(labels) <= len(COLORS):
        return {label: label for label in labels}
    return {label: re.sub(r"\d+$", "*", label) for label in labels}


def _names(panel: Panel, runs: dict[str, Rows]) -> list[str]:
    known = {name for rows in runs.values() for row in rows for name, value in row.items() if value is not None}
    matches = [name for pattern in panel.names for name in sorted(known) if fnmatchcase(name, pattern)]
    return list(dict.fromkeys(matches))


def _colors(count: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(count)]


def _series(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return np.array([step for step, _ in points]), np.array([value for _, value in points], dtype=float)


def _line(axes: Axes, rows: Rows, name: str, color: str, label: str | None) -> None:
    steps, values = _series(rows, name)
    if len(steps) < FEW:
        axes.plot(steps, values, color=color, lw=1.6, marker="o", ms=2.8, label=label)
    else:
        axes.plot(steps, values, color=color, lw=0.8, alpha=0.25)
        axes.plot(steps, smooth(values), color=color, lw=1.9, label=label)


def _stack(axes: Axes, rows: Rows, names: list[str]) -> None:
    parts = [name for name in names if name != "time/step"]
    rows = [row for row in rows if any(row.get(name) is not None for name in names)]
    steps = np.array([row["step"] for row in rows])
    heights = [smooth(np.array([row.get(name) or 0.0 for row in rows], dtype=float)) for name in parts]
    axes.stackplot(
        steps,
        heights,
        colors=_colors(len(parts)),
        labels=[name.removeprefix("time/") for name in parts],
        alpha=0.75,
        lw=0,
    )
    if "time/step" in names:
        steps, values = _series(rows, "time/step")
        axes.plot(
            steps, smooth(values), color=INK, lw=1.4, marker="o" if len(steps) < FEW else "", ms=2.8, label="step"
        )
    axes.set_ylim(bottom=0)


def _style(axes: Axes, panel: Panel, last: bool) -> None:
    axes.set_title(panel.title, loc="left", fontsize=10.5, weight="bold", color=INK)
    axes.set_ylabel(panel.unit, fontsize=8.5, color=INK)
    axes.set_xlabel("step" if last else "", fontsize=8.5, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(labelsize=8, color=FAINT, labelcolor=INK)
    axes.grid(axis="y", color="#e5e7eb", lw=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _html(text: Any) -> str:
    return html.escape(printable(str(text)))


def _sample_row(sample: dict[str, Any]) -> str:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3g}"

    parts = ", ".join(f"{name} {number(value)}" for name, value in sample.get("parts", {}).items())
    cells = [
        f"<td>{sample['step']}</td>",
        f"<td class=text>{_html(sample.get('prompt', ''))}</td>",
        f"<td class=text>{_html(sample.get('completion', ''))}</td>",
        f"<td title='{_html(parts)}'>{number(sample.get('reward'))}</td>",
        f"<td>{number(sample.get('advantage'))}</td>",
        f"<td>{_html(sample.get('finish_reason', ''))}</td>",
    ]
    return f"<tr>{''.join(cells)}</tr>\n"


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; color: #1f2937; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ margin: 0; }} h2 {{ margin: 2rem 0 .5rem; font-size: 1.1rem; }} p {{ margin: .2rem 0 1rem; color: #6b7280; }}
img {{ width: 100%; border: 1px solid #e5e7eb; border-radius: 8px; }}
table {{ border-collapse: collapse; font-size: 13px; }} #completions {{ width: 100%; }}
th {{ text-align: left; border-bottom: 2px solid #d1d5db; padding: .3rem .6rem; }}
td {{ vertical-align: top; border-bottom: 1px solid #eee; padding: .3rem .6rem; font-variant-numeric: tabular-nums; }}
.text {{ white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace; font-size: 12px; }}
pre {{ background: #f3f4f6; padding: 1rem; border-radius: 8px; overflow-x: auto; font-size: 12px; }}
summary {{ cursor: pointer; font-weight: 600; margin: 2rem 0 .5rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>step {step}</p>
<img alt="metrics by step" src="data:image/png;base64,{image}">
<h2>Completions, newest first</h2>
<table id="completions">
<tr><th>step</th><th>prompt</th><th>completion</th><th>reward</th><th>advantage</th><th>finish</th></tr>
{completions}</table>
<details open><summary>Last value of each metric</summary><table>{numbers}</table></details>
<details><summary>Configuration</summary><pre>{config}</pre></details>
</body>
</html>
"""
