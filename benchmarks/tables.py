"""Prints the tables of docs/figures.md from rows of several GPUs, in Markdown.

python benchmarks/tables.py benchmarks/multi_gpu.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SAME_WORK = (
    "config",
    "shape",
    "shape_layers",
    "offload",
    "overrides",
    "lora_rank",
    "prompt",
    "completion",
    "group_size",
)
"""Keys of rows of ``long_context.py`` that are equal where the same work was done in the same way, by however many GPUs."""
SAME_STEP = ("shape", "layers", "offload", "checkpointing", "prompt", "completion", "group_size")
"""The same of rows of optimizer steps."""
STEP_PARTS = ("time/rollout", "time/update", "time/weight_sync", "time/step")


def gpus(row: Row) -> str:
    """``4 H100`` of a row of four ``NVIDIA H100 80GB HBM3``."""
    return f"{row['ranks']} {row['device'].removeprefix('NVIDIA ').split()[0]}"


def times_one(row: Row, rows: list[Row], same: tuple[str, ...], rate: str) -> str:
    """How many times the rate of one GPU of the same kind, with the same settings."""
    ones = [one for one in rows if one["ranks"] == 1 and all(one.get(key) == row.get(key) for key in ("device", *same))]
    return f"{row[rate] / ones[-1][rate]:.2f}" if ones and row["ranks"] > 1 else "1" if row["ranks"] == 1 else ""


def optimizer_steps(rows: list[Row]) -> list[str]:
    lines = ["| GPUs | `model.fsdp_size` | seconds a step | packed tokens/s | times one GPU | peak GiB a GPU |"]
    for row in rows:
        cells = [gpus(row), str(row["fsdp_size"] or ""), f"{row['seconds']:.2f}", f"{row['tokens_per_s']:,.0f}"]
        cells += [times_one(row, rows, SAME_STEP, "tokens_per_s"), f"{row['peak_gib']:.1f}"]
        lines.append(line(cells))
    return lines


def complete_steps(rows: list[Row]) -> list[str]:
    lines = [
        "| GPUs | prompts, P, R, G | settings | rollout, tokens/s | update, MFU | weight push | step | peak GiB, whole card |"
    ]
    for row in rows:
        rollout, update, push, step = (f"{row[part]:.1f} s" for part in STEP_PARTS)
        shape = ", ".join(f"{row[name]:,}" for name in ("prompts", "prompt", "completion", "group_size"))
        settings = " ".join(f"`{key}`" for key in row["overrides"])
        cells = [gpus(row), shape, settings, f"{rollout}, {row['rollout_tokens_per_s']:,.0f}"]
        cells += [f"{update}, {row['mfu_update']:.2f}", push, step, f"{row['device_peak_gib']:.1f}"]
        lines.append(line(cells))
    return lines


def long_updates(rows: list[Row]) -> list[str]:
    lines = [
        "| GPUs, `model.sequence_parallel_size` | LoRA | P, R, G | seconds | times one GPU | MFU | peak GiB a GPU | layers |"
    ]
    fast = [row | {"rate": 1 / row["seconds"]} for row in rows if "seconds" in row]
    for row in rows:
        shape = ", ".join(f"{row[name]:,}" for name in ("prompt", "completion", "group_size"))
        cells = [f"{gpus(row)}, {row['together']}", str(row["lora_rank"] or ""), shape]
        if "seconds" in row:
            times = times_one(row | {"rate": 1 / row["seconds"]}, fast, SAME_WORK, "rate")
            cells += [f"{row['seconds']:.1f}", times, f"{row['mfu']:.2f}", f"{row.get('peak_gib', 0):.1f}"]
        else:
            cells += [row["error"], "", "", ""]
        layers = ", ".join(f"{mode} {count}" for mode, count in row.get("layers", {}).items())
        parts = f", MLPs in {row['mlp_chunks']} parts" if row.get("mlp_chunks", 1) > 1 else ""
        lines.append(line([*cells, layers + parts]))
    return lines


def long_gradients(rows: list[Row]) -> list[str]:
    lines = ["| gradients of, in bfloat16 | from float32 | from one rank |"]
    for row in rows:
        for name, error in row["from_float32"].items():
            one = row["from_one_rank"].get(name)
            lines.append(line([name, f"{error:.4f}", "" if one is None else f"{one:.4f}"]))
    return lines


def line(cells: list[str]) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


TABLES = {
    "train_step": optimizer_steps,
    "full_step": complete_steps,
    "long_context": long_updates,
    "long_gradients": long_gradients,
}


def tables(rows: list[Row]) -> dict[str, list[str]]:
    """Lines of the table of each benchmark that has rows, the head first. Rows that do not name theirs are of optimizer steps.

    Raises:
        ValueError: a row is of another benchmark, or does not say how many GPUs it is of.
    """
    found: dict[str, list[Row]] = {}
    for row in rows:
        name = row.get("benchmark", "train_step")
        if name not in TABLES or ("ranks" not in row and name != "long_gradients"):
            what = f"of {name}" if name not in TABLES else "without ranks"
            raise ValueError(f"a row {what}: there are tables of {', '.join(TABLES)}, with ranks, as in multi_gpu.json")
        found.setdefault(name, []).append(row)
    return {name: TABLES[name](own) for name, own in found.items()}


def main() -> None:
    try:
        found = tables(json.loads(Path(sys.argv[1]).read_text())["rows"])
    except ValueError as error:
        sys.exit(f"{sys.argv[1]}: {error}")
    for lines in found.values():
        rule = "|" + "---|" * (lines[0].count("|") - 1)
        print("\n".join([lines[0], rule, *lines[1:]]), end="\n\n")


if __name__ == "__main__":
    main()
