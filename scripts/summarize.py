"""Print in three lines what a run learned: its reward over the first and the last steps. With --json write more, for several
runs.

python scripts/summarize.py RUN_DIR ... [--steps 20] [--json FILE [--device NAME]]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean, median
from typing import Any

import yaml

Row = dict[str, Any]
KEYS = {
    "model": ("dtype", "attention"), "rollout": ("prompts_per_step", "group_size", "max_completion_tokens"),
    "optim": ("lr",), "train": ("steps", "token_budget"),
}  # fmt: skip
"""Keys of the config that are written for each run."""
NOISE = "sampling/sampling_logp_difference/"


def read(run_dir: Path) -> list[Row]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    if not any(row.get("reward") is not None for row in rows):
        raise SystemExit(f"{run_dir}: no step has been logged yet")
    return rows


def ends(rows: list[Row], name: str, steps: int) -> tuple[float, float]:
    """Means of a metric over the first and the last ``steps`` rows; rows without it are ignored."""
    begin, end = ([row[name] for row in part if row.get(name) is not None] for part in (rows[:steps], rows[-steps:]))
    return fmean(begin), fmean(end)


def summarize(run_dir: Path, steps: int = 20) -> str:
    """Mean of every reward over the first and the last ``steps`` steps of a run, and where its files are."""
    rows = [row for row in read(run_dir) if row.get("reward") is not None]
    steps = min(steps, len(rows))
    names = [name for name in rows[0] if name.startswith("rewards/") and name.endswith("/mean")] or ["reward"]
    report = [f"{len(rows)} steps of {run_dir}; means over the first and the last {steps}:"]
    for name in names:
        begin, end = ends(rows, name, steps)
        report.append(f"  {name.removeprefix('rewards/').removesuffix('/mean')}: {begin:.3f} -> {end:.3f}")
    report += [f"  plot: {plot}" for plot in sorted([*run_dir.glob("*.png"), *run_dir.glob("*.html")])]
    return "\n".join(report)


def figures(run_dir: Path, steps: int) -> dict[str, Any]:
    """All evaluations, rewards, medians of the times of a step, and differences between the sampler's and the trainer's
    log-probs."""
    everything, config = read(run_dir), yaml.safe_load((run_dir / "config.yaml").read_text())
    rows = [row for row in everything if row.get("reward") is not None]
    steps = min(steps, len(rows))
    times = [name for name in rows[-1] if name.startswith("time/")]

    def all_of(name: str, rows: list[Row]) -> list[float]:  # a metric that was not finite is null in the file
        return [row[name] for row in rows if row.get(name) is not None]

    thirds = [rows[i * len(rows) // 3 : (i + 1) * len(rows) // 3] for i in range(3)]
    canary = [row for row in rows if row.get("canary/slope") is not None]
    return {
        "config": {f"{part}.{key}": config[part][key] for part, keys in KEYS.items() for key in keys}
        | {"seed": config["seed"]},
        "evaluations": [
            {"step": row["step"]}
            | {key: row[key] for key in row if key.startswith("eval/") and key.endswith(("/reward", "pass@1"))}
            for row in everything
            if row.get("eval/reward") is not None
        ],
        f"reward_first_and_last_{steps}": ends(rows, "reward", steps),
        "logp_difference_mean_of_each_third": [
            fmean(values) if (values := all_of(NOISE + "mean", third)) else None for third in thirds
        ],
        "logp_difference_max": max(all_of(NOISE + "max", rows), default=None),
        "median": {name: median(all_of(name, rows[1:] or rows)) for name in [*times, "perf/peak_memory_gib"]},
        "first_step_s": rows[0]["time/step"],
        "canary": {
            "checks": len(canary),
            "largest_slope": max((row["canary/slope"] for row in canary), default=None),
            "logp_difference_first_and_last": [row["canary/logp_difference"] for row in (canary[:1] + canary[-1:])],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--device", help="name of the device, for the JSON")
    args = parser.parse_args()
    for run_dir in args.run_dirs:
        print(summarize(run_dir, args.steps))
    if args.json:
        runs = [{"run": run_dir.name} | figures(run_dir, args.steps) for run_dir in args.run_dirs]
        args.json.write_text(json.dumps({"device": args.device, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
