"""Draw the figure of the method in README.md: repeated prompts beside the packed batch, and who attends to whom in it.

python scripts/make_figure.py           # writes docs/method_light.svg and docs/method_dark.svg
"""

from __future__ import annotations

import sys
from itertools import accumulate
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

DOCS = Path(__file__).resolve().parents[1] / "docs"
INK = {"light": "#1f2328", "dark": "#e6edf3"}
GROUPS = (("A", 12, (4, 6, 3, 5)), ("B", 8, (5, 3, 4, 6)))
"""Name, prompt tokens, tokens of each completion."""
LENGTH = {name: prompt for name, prompt, _ in GROUPS}
PROMPT = {"A": "#2563eb", "B": "#7c3aed"}
COMPLETION = {"A": "#ea8a0c", "B": "#0f9f6e"}
REPEATED = sum(len(completions) * prompt + sum(completions) for _, prompt, completions in GROUPS)
PACKED = sum(prompt + sum(completions) for _, prompt, completions in GROUPS)


def segments() -> list[tuple[str, str, int]]:
    """Label, group and tokens of each segment of the packed batch: all prompts, then all completions."""
    prompts = [(name, name, prompt) for name, prompt, _ in GROUPS]
    return prompts + [(f"{name.lower()}{i}", name, n) for name, _, ns in GROUPS for i, n in enumerate(ns, 1)]


def starts() -> list[int]:
    return [0, *accumulate(tokens for _, _, tokens in segments())]


def draw(theme: str) -> Figure:
    figure = Figure(figsize=(10.4, 4.3))
    grid = figure.add_gridspec(2, 2, width_ratios=(1.62, 1), height_ratios=(1.6, 1), left=0.01, right=0.99, bottom=0.07)
    grid.update(top=0.9, wspace=0.04, hspace=0.32)
    repeated, packed, attention = (figure.add_subplot(part) for part in (grid[0, 0], grid[1, 0], grid[:, 1]))
    for axes, title in (
        (repeated, f"Repeated prompts: {REPEATED} tokens through the policy"),
        (packed, f"pgrpo, each prompt once: {PACKED} tokens, the same log-probs and gradients"),
        (attention, "Who attends to whom in the packed batch"),
    ):
        axes.set_title(title, loc="left", fontsize=10.5, weight="bold", color=INK[theme])
        axes.set_axis_off()
    draw_repeated(repeated)
    draw_packed(packed, theme)
    draw_mask(attention, theme)
    return figure


def box(axes: Axes, x: float, y: float, tokens: int, label: str, color: str) -> None:
    axes.add_patch(Rectangle((x, y), tokens - 0.15, 1, facecolor=color, edgecolor="none"))
    axes.text(x + tokens / 2, y + 0.48, label, ha="center", va="center", fontsize=8.5, color="white", weight="bold")


def draw_repeated(axes: Axes) -> None:
    """One sequence a sample, each with its own copy of the prompt."""
    left = 0.0
    for name, prompt, completions in GROUPS:
        for i, tokens in enumerate(completions):
            y = -1.25 * i
            box(axes, left, y, prompt, f"prompt {name}", PROMPT[name])
            box(axes, left + prompt, y, tokens, f"{name.lower()}{i + 1}", COMPLETION[name])
        left += prompt + max(completions) + 6
    axes.set_xlim(0, PACKED)
    axes.set_ylim(-4, 1.1)


def draw_packed(axes: Axes, theme: str) -> None:
    """One row; an arc from each completion to the prompt that it continues."""
    first = dict(zip((label for label, _, _ in segments()), starts(), strict=False))
    for label, group, tokens in segments():
        is_prompt = label == group
        color = (PROMPT if is_prompt else COMPLETION)[group]
        box(axes, first[label], 0, tokens, f"prompt {label}" if is_prompt else label, color)
        if not is_prompt:
            end = first[group] + LENGTH[group] - 0.7
            arc = FancyArrowPatch(
                (first[label] + tokens / 2, -0.05), (end, -0.05), connectionstyle="arc3,rad=-0.16", color=color,
                arrowstyle="-|>,head_length=3,head_width=2", lw=1.1, shrinkA=0, shrinkB=0,
            )  # fmt: skip
            axes.add_patch(arc)
    text = "every completion reads its prompt's keys and values; position ids go on where the prompt ended"
    axes.text(0, -2.9, text, fontsize=8.5, color=INK[theme], va="bottom")
    axes.set_xlim(0, PACKED)
    axes.set_ylim(-3.0, 1.1)


def mask() -> np.ndarray:
    """[T, T, 4] colours; rows are queries, columns keys, and a cell that is not transparent is a pair that is computed."""
    rgba = np.zeros((PACKED, PACKED, 4))
    prompts = dict(zip("AB", starts(), strict=False))
    for (label, group, tokens), start in zip(segments(), starts(), strict=False):
        own = np.tril(np.ones((tokens, tokens), bool))
        color = to_rgba((PROMPT if label == group else COMPLETION)[group])
        rgba[start : start + tokens, start : start + tokens][own] = color
        if label != group:
            rgba[start : start + tokens, prompts[group] : prompts[group] + LENGTH[group]] = (*color[:3], 0.55)
    return rgba


def draw_mask(axes: Axes, theme: str) -> None:
    for (label, _, tokens), start in zip(segments(), starts(), strict=False):
        middle = start + tokens / 2 - 0.5
        axes.text(-1.2, middle, label, ha="right", va="center", fontsize=7.5, color=INK[theme])
        axes.text(middle, PACKED + 0.4, label, ha="center", va="top", fontsize=7.5, color=INK[theme])
    axes.imshow(mask(), interpolation="nearest", aspect="equal")
    axes.add_patch(Rectangle((-0.5, -0.5), PACKED, PACKED, fill=False, edgecolor="#8b949e", lw=0.8))
    for edge in starts()[1:-1]:
        axes.axhline(edge - 0.5, color="#8b949e", lw=0.3)
    axes.text(PACKED - 1, 1, "row: query\ncolumn: key", ha="right", va="top", fontsize=8, color=INK[theme])


def main(folder: Path = DOCS) -> None:
    matplotlib.rcParams["svg.hashsalt"] = "pgrpo"  # the same file each time
    for theme in INK:
        file = folder / f"method_{theme}.svg"
        draw(theme).savefig(file, transparent=True, metadata={"Date": None})
        print(f"wrote {file}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
