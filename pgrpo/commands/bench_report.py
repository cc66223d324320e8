"""What ``pgrpo bench`` prints and writes."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from pgrpo.config import Config, ConfigError


@dataclass(frozen=True)
class Shape:
    """``groups`` groups of ``group_size`` completions; lengths in tokens."""

    prompt: int
    completion: int
    group_size: int
    groups: int = 1


@dataclass
class Row:
    """One method. Milliseconds; MFU counts each prompt token once and no recomputation, against a measured matrix product."""

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


def print_rows(rows: list[Row], rate: float, config: Config, console: Console) -> None:
    """A table of one shape; ``rate`` is the matrix product's FLOP/s."""
    first, by_method = rows[0], {row.method: row for row in rows}
    table = Table(
        title=f"{config.model.path}, {config.model.dtype}: P={first.prompt} R={first.completion} G={first.group_size} "
        f"groups={first.groups}, checkpointing {first.checkpointing}, rho {first.rho:.2f}, ratio of FLOPs {first.flop_ratio:.2f}"
    )
    for name in (
        "method",
        "old ms",
        "update ms",
        "MFU old",
        "MFU update",
        "peak GiB",
        "max |d logprob|",
        "old / grouped",
        "update / grouped",
    ):
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        grouped = by_method["grouped"]
        table.add_row(
            row.method, f"{row.old_ms:.0f}", f"{row.update_ms:.0f}", f"{row.mfu_old:.2f}", f"{row.mfu_update:.2f}",
            f"{row.peak_gib:.2f}", f"{row.max_dlogprob:.1e}", f"{row.old_ms / grouped.old_ms:.2f}",
            f"{row.update_ms / grouped.update_ms:.2f}",
        )  # fmt: skip
    console.print(table)
    console.print(f"matrix product: {rate / 1e12:.3f} TFLOP/s")


def make_report(rows: list[Row], device: torch.device) -> dict[str, Any]:
    """Where the rows were measured, and the rows."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    for package in ("flash-attn-4", "prefix-grouper"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"device": name, "versions": versions, "rows": [asdict(row) for row in rows]}


def write_report(report: dict[str, Any], file: Path) -> None:
    """Add the rows to those of a file from the same device and versions."""
    if file.exists():
        before = json.loads(file.read_text())
        for key in ("device", "versions"):
            if before[key] != report[key]:
                raise ConfigError(
                    f"--json {file}: has rows of {key} {before[key]}, this is {report[key]}: name another"
                )
        identity = ("prompt", "completion", "group_size", "groups", "method", "checkpointing")
        measured = {tuple(row[name] for name in identity) for row in report["rows"]}
        kept = [row for row in before["rows"] if tuple(row[name] for name in identity) not in measured]
        report = report | {"rows": kept + report["rows"]}
    file.write_text(json.dumps(report, indent=1) + "\n")
