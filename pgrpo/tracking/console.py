"""Shows a step on the terminal, and escapes text that a model wrote."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pgrpo.config import redact

Row = dict[str, Any]

HEADLINES = (
    "reward",
    "rewards/*/mean",
    "rewards/errors",
    "reward_std",
    "frac_reward_zero_std",
    "completions/mean_length",
    "completions/clipped_ratio",
    "entropy",
    "kl",
    "loss",
    "grad_norm",
    "lr",
    "sampling/sampling_logp_difference/mean",
    "perf/tokens_per_s",
    "perf/peak_memory_gib",
    "time/step",
    "eval/reward",
    "eval/rewards/*/mean",
    "eval/pass@*",
    "eval/greedy/pass@1",
)
"""Patterns of the metrics that the terminal shows. The files have all metrics."""

WIDEST = 600
"""Characters of a prompt (its end) and of a completion (its start) that the terminal shows."""


def printable(text: str, encoding: str = "utf-8") -> str:
    """Escape all but printable characters and newlines, so that a model's text cannot send control sequences to the terminal."""
    shown = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    return shown.encode(encoding, "backslashreplace").decode(encoding)


class Terminal(logging.Handler):
    """Prints warnings to stderr, with secrets redacted. As ``logging.lastResort`` it is used only if there are no ``Trackers``."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        text = redact(f"{record.levelname.lower()}: {record.getMessage()}")
        print(printable(text, sys.stderr.encoding or "utf-8"), file=sys.stderr)


def terminal() -> Console:
    """The console of a run: text is shown as it is, without markup."""
    return Console(markup=False, highlight=False, emoji=False)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def metrics_panel(title: str, numbers: dict[str, str]) -> Panel:
    columns = 3
    grid = Table.grid(padding=(0, 2), expand=True)
    cells = [Text.assemble((f"{name} ", "dim"), (value, "bold")) for name, value in numbers.items()]
    for start in range(0, len(cells), columns):
        grid.add_row(*cells[start : start + columns])
    return Panel(grid, title=title, title_align="left", border_style="cyan")


def completions_table(rows: Sequence[Row], encoding: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, expand=True, show_lines=True)
    table.add_column("prompt", ratio=2, overflow="fold", style="dim")
    table.add_column("completion", ratio=3, overflow="fold")
    for name in ("reward", "advantage"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("finish", no_wrap=True)
    for row in rows:
        # Text instead of str, so that rich never parses a model's text as markup.
        table.add_row(
            Text(printable(_end(row["prompt"]), encoding)),
            Text(printable(_start(row["completion"]), encoding)),
            number(row["reward"]),
            number(row["advantage"]),
            row["finish_reason"],
        )
    return table


def plain(row: Row, encoding: str) -> str:
    prompt, completion = (repr(text) for text in (_end(row["prompt"]), _start(row["completion"])))
    numbers = f"reward {number(row['reward'])}  advantage {number(row['advantage'])}  {row['finish_reason']}"
    return printable(f"  {prompt} -> {completion}  {numbers}", encoding)


def _start(text: str) -> str:
    return text if len(text) <= WIDEST else text[:WIDEST] + "..."


def _end(text: str) -> str:
    return text if len(text) <= WIDEST else "..." + text[-WIDEST:]
