"""Say in three lines what a run learned: reward over its first and its last steps.

python scripts/summarize.py RUN_DIR [--steps 20]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean


def summarize(run_dir: Path, steps: int = 20) -> str:
    """Mean of every reward over the first and the last ``steps`` steps of a run, and where its files are."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row.get("reward") is not None]
    if not rows:
        raise SystemExit(f"{run_dir}: no step has been logged yet")
    steps = min(steps, len(rows))
    names = [name for name in rows[0] if name.startswith("rewards/") and name.endswith("/mean")] or ["reward"]
    report = [f"{len(rows)} steps of {run_dir}; means over the first and the last {steps}:"]
    for name in names:
        begin, end = (
            [row[name] for row in part if row.get(name) is not None] for part in (rows[:steps], rows[-steps:])
        )
        report.append(
            f"  {name.removeprefix('rewards/').removesuffix('/mean')}: {fmean(begin):.3f} -> {fmean(end):.3f}"
        )
    report += [f"  plot: {plot}" for plot in sorted([*run_dir.glob("*.png"), *run_dir.glob("*.html")])]
    return "\n".join(report)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    print(summarize(arguments.run_dir, arguments.steps))
