"""``pgrpo plot``: draws one run, or several for comparison, as a PNG; one run also as a self-contained HTML page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pgrpo.commands.curves import Panel, Rows, interval_names, panels_of, read_metrics
from pgrpo.commands.report import page
from pgrpo.config import ConfigError

COLORS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#64748b")
INK, FAINT = "#1f2937", "#9ca3af"
FEW = 40  # a curve with fewer points is drawn without smoothing


def plot(run_dirs: Path | Sequence[Path], out: Path | None = None) -> list[Path]:
    """Draw one run or several.

    Args:
        run_dirs: folders with a metrics.jsonl.
        out: folder for plot.png and, for one run, report.html. None: the run's folder; the current one for several.

    Returns:
        The files that were written.

    Raises:
        ConfigError: a folder does not exist, or has no metrics to draw.
    """
    folders = [Path(run_dirs)] if isinstance(run_dirs, str | Path) else [Path(run_dir) for run_dir in run_dirs]
    if not folders:
        raise ConfigError("plot: no run folder given")
    runs = {_label(folder, folders): read_metrics(folder) for folder in folders}
    target = out or (folders[0] if len(folders) == 1 else Path())
    target.mkdir(parents=True, exist_ok=True)
    png, report = target / "plot.png", target / "report.html"
    files = [png, report] if len(folders) == 1 else [png]
    were_there = [file for file in files if file.exists()]
    for file in files:
        file.unlink(missing_ok=True)  # never written through a symbolic link
    draw(runs).savefig(png, dpi=150)
    if report in files:
        report.write_text(page(folders[0], next(iter(runs.values()))), encoding="utf-8")
    for file in files:
        print(f"{'replaced' if file in were_there else 'wrote'} {file}")
    return files


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over a twentieth of the run; ignores NaN."""
    half = len(values) // 40
    kernel = np.ones(2 * half + 1)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), kernel, mode="full")[half : half + len(values)]
    count = np.convolve(known.astype(float), kernel, mode="full")[half : half + len(values)]
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def draw(runs: dict[str, Rows]) -> Figure:
    """A grid of the panels that have data. ``runs``: rows of metrics by label."""
    every = [row for rows in runs.values() for row in rows]
    found = panels_of(every)
    if not found:
        raise ConfigError(f"{', '.join(runs)}: metrics.jsonl has none of the metrics that plot draws")
    labels = _legend(list(runs))
    colors = dict(zip(dict.fromkeys(labels.values()), _colors(len(runs)), strict=False))
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    steps = [row["step"] for row in every]
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
            # Equal series (the total reward and the only reward function, say) become one line with all names, so that none hides
            # another.
            same: dict[tuple, list[str]] = {}
            for name in names:
                same.setdefault(tuple((row["step"], row.get(name)) for row in rows), []).append(name)
            for equal, color in zip(same.values(), _colors(len(same)), strict=True):
                _line(axes, rows, equal[0], color, ",\n".join(equal) if len(names) > 1 else None)
        if names_shown := axes.get_legend_handles_labels()[1]:  # below the axes, where it hides no data
            axes.legend(
                loc="upper center", bbox_to_anchor=(0.5, -0.24 if axes.get_xlabel() else -0.12), frameon=False, fontsize=7.5,
                labelcolor=INK, handlelength=1.2, ncols=2 if max(map(len, names_shown)) < 40 else 1,
            )  # fmt: skip
        if not panel.stacked:
            axes.margins(y=0.12)
        drawn = [values for rows in runs.values() for name in names if (values := _series(rows, name)[1]).size]
        if min(values.min() for values in drawn) >= 0 > axes.get_ylim()[0]:
            axes.set_ylim(bottom=0)  # a margin is no reason for negative lengths
        axes.set_xlim(first - margin, final + margin)
    if len(runs) > 1:
        handles = [figure.axes[0].plot([], [], color=color, lw=2)[0] for color in colors.values()]
        figure.legend(
            handles, list(colors), loc="outside upper left", ncols=min(len(colors), 5), frameon=False, fontsize=10
        )
    return figure


def _label(folder: Path, folders: list[Path]) -> str:
    name = folder.resolve().name
    return name if [other.resolve().name for other in folders].count(name) == 1 else str(folder)


def _legend(labels: list[str]) -> dict[str, str]:
    """Label in the legend for each run. With more runs than colors, runs whose names differ only in a final number (the seed,
    say) share a label: ``grpo_0`` and ``grpo_1`` become ``grpo_*``."""
    if len(labels) <= len(COLORS):
        return {label: label for label in labels}
    return {label: re.sub(r"\d+$", "*", label) for label in labels}


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
    if ends := interval_names(name):
        (steps, low), (_, high) = (_series(rows, end) for end in ends)
        if len(low) == len(high):
            axes.fill_between(steps, low, high, color=color, alpha=0.15, lw=0)


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
    # The whole number at each tick: a common factor or offset would stand on the title.
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
