"""The table that ``pgrpo bench`` prints."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from pgrpo.config import Config


@dataclass(frozen=True)
class Shape:
    """``groups`` groups of ``group_size`` completions; lengths in tokens."""

    prompt: int
    completion: int
    group_size: int
    groups: int = 1


@dataclass
class Row:
    """Results of one method. MFU counts each prompt token once and no recomputation, and is relative to a measured matrix
    product."""

    prompt: int
    completion: int
    group_size: int
    groups: int
    method: str
    checkpointing: str
    old_ms: float
    update_ms: float
    mfu_old: float
    mfu_update: float
    peak_gib: float
    rho: float
    flop_ratio: float
    max_dlogprob: float


def print_rows(rows: list[Row], rate: float, config: Config) -> None:
    """Print a table of one shape, with times relative to those of the first row. ``rate``: FLOP/s of the matrix product."""
    first = rows[0]
    table = Table(
        title=f"{config.model.path}, {config.model.dtype}: P={first.prompt} R={first.completion} G={first.group_size} "
        f"groups={first.groups}, checkpointing {first.checkpointing}, rho {first.rho:.2f}, ratio of FLOPs {first.flop_ratio:.2f}"
    )
    numbers = ("old ms", "update ms", "MFU old", "MFU update", "peak GiB", "max |d logprob|")
    table.add_column("method")
    for name in (*numbers, f"old / {first.method}", f"update / {first.method}"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.method, f"{row.old_ms:.0f}", f"{row.update_ms:.0f}", f"{row.mfu_old:.2f}", f"{row.mfu_update:.2f}",
            f"{row.peak_gib:.2f}", f"{row.max_dlogprob:.1e}", f"{row.old_ms / first.old_ms:.2f}",
            f"{row.update_ms / first.update_ms:.2f}",
        )  # fmt: skip
    console = Console()
    console.width = max(console.width, 110)  # a pipe or a narrow terminal must not cut the methods' names
    console.print(table)
    console.print(f"matrix product: {rate / 1e12:.3f} TFLOP/s")
