"""Rows of benchmarks: where and how they were measured goes into them, and they are added to a file one at a time.

python benchmarks/rows.py benchmarks/multi_gpu.json --from FILE ...     # adds the rows of other files
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def origin(commit: str | None) -> dict[str, Any]:
    """The benchmark, its commit (nothing where neither git nor ``commit`` tells it), command, ranks, device and PyTorch."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    head = commit or subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    started = f"torchrun --nproc-per-node {ranks}" if "WORLD_SIZE" in os.environ else "python"
    script = Path(sys.argv[0])
    return {
        "benchmark": script.stem,
        "commit": head,
        "command": " ".join([started, f"benchmarks/{script.name}", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "ranks": ranks,
    }


def read(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text())["rows"] if file.exists() else []


def add(file: Path, *rows: dict[str, Any]) -> None:
    """Add rows at the end of ``{"rows": [...]}``, unless they are there."""
    replace(file, [], list(rows))


def replace(file: Path, old: list[dict[str, Any]], new: list[dict[str, Any]]) -> None:
    """Put new rows in the place of old ones, which are taken out. Whoever reads the file meanwhile sees all of it or none."""
    report = json.loads(file.read_text()) if file.exists() else {"rows": []}
    kept = [row for row in report["rows"] if row not in old]
    report["rows"] = kept + [row for row in new if row not in kept]
    written = file.with_name(f"{file.name}.{os.getpid()}")
    written.write_text(json.dumps(report, indent=1) + "\n")
    written.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("into", type=Path)
    parser.add_argument("--from", dest="sources", type=Path, nargs="+", required=True, metavar="FILE")
    args = parser.parse_args()
    for source in args.sources:
        add(args.into, *read(source))


if __name__ == "__main__":
    main()
