"""Trains the quick start under random faults, restarted by a shell loop, and compares the run with an undisturbed one.

    python benchmarks/soak.py [--steps 1000] [--seed 0] [--json soak.json] [--log soak.log]

Three runs of ``pgrpo train --config quickstart.yaml`` on the CPU, one thread each:

1. undisturbed;
2. under faults that stop the run and do not change its data (kill -9, SIGTERM, a reward that raises or hangs, NaN with
   ``train.max_skipped_updates=0``, a full disk), restarted by scripts/keep_running.sh: its last checkpoint (weights, optimizer,
   generators, prompt order) and each row of metrics.jsonl must equal the undisturbed run's, bit for bit;
3. under the same kinds of faults, configured so that they change the training (samples of a failed reward are masked, updates with
   NaN are skipped): it must finish.

The disk is a small tmpfs in its own mount namespace (``unshare``); where there is none, a limit on the size of files. Exits with 1
if a run does not finish or is not equal. The faults are in soak_faults.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from pgrpo import checkpoint

ROOT = Path(__file__).resolve().parents[1]
FAULTS = Path(__file__).with_name("soak_faults.py")
KINDS = ("sigkill", "sigterm", "reward_raise", "reward_hang", "nan_loss", "nan_gradient", "full_disk")
STARTING_S = 8.0
"""A process is at its first step after about that long."""
VOLATILE = ("time/", "perf/")
NAMESPACE = "SOAK_NAMESPACE"


def main() -> None:
    """Run, compare, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the faults' kinds and moments")
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument(
        "--faults", type=int, help="in each disturbed run (default: one in 33 steps, each kind at least once)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, of the three (default %(default)s)")
    parser.add_argument("--json", type=Path, help="write the summary there as well")
    parser.add_argument("--log", type=Path, help="what the runs print, and each fault (default: in a temporary folder)")
    args = parser.parse_args()
    _enter_namespace()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    log = args.log or folder / "soak.log"
    log.write_text("")
    print(f"soak: folder {folder} (logs of the runs: NAME/log), log of all {log}", flush=True)
    make = [sys.executable, str(ROOT / "scripts" / "make_tiny_model.py"), "--out", str(folder / "model")]
    subprocess.run(make, env=_environment(folder), check=True, capture_output=True)

    random_faults = random.Random(args.seed)
    count = args.faults or max(len(KINDS), args.steps // 33)
    keys = [f"model.path={folder / 'model'}", f"train.steps={args.steps}", f"checkpoint.every={args.every}"]
    keys += [
        "track.console=false",
        f"rewards.functions[0].function={FAULTS}:reward",
        "rewards.functions[0].timeout_s=4",
    ]
    stop, go_on = ["train.max_skipped_updates=0"], ["rewards.on_error=mask"]
    wanted = {"undisturbed": (stop, 0), "stopped": (stop, count), "changed": (go_on, count)}
    begun = time.monotonic()
    with ThreadPoolExecutor(args.jobs) as pool:
        running = {
            name: pool.submit(
                _run, folder / name, [*keys, *more], _plan(random_faults, args.steps, args.every, n), args.steps
            )
            for name, (more, n) in wanted.items()
        }
        runs = {name: future.result() for name, future in running.items()}
    log.write_text("".join(f"soak: {name}\n{(folder / name / 'log').read_text(errors='replace')}" for name in runs))
    differences = _differences(folder / "undisturbed" / "disk" / "run", folder / "stopped" / "disk" / "run", args.steps)
    runs["stopped"]["bit_equal_to_undisturbed"] = not differences
    summary = {
        "command": f"python benchmarks/soak.py --steps {args.steps} --seed {args.seed}",
        "versions": {name: version(name) for name in ("pgrpo", "torch", "transformers", "safetensors")}
        | {"python": platform.python_version()},
        "full_disk": "tmpfs" if os.environ.get(NAMESPACE) == "own" else "limit on the size of files",
        "steps": args.steps,
        "jobs": args.jobs,
        "seconds": round(time.monotonic() - begun),
        **runs,
        "differences": differences,
    }
    print(json.dumps(summary, indent=1))
    if args.json:
        args.json.write_text(json.dumps(summary, indent=1) + "\n")
    sys.exit(0 if not differences and all(run["finished"] for run in runs.values()) else 1)


def _enter_namespace() -> None:
    """Start again in a mount namespace of its own, if the system lets us: its mounts go when this process does."""
    if NAMESPACE in os.environ:
        return
    may = subprocess.run(["unshare", "--map-root-user", "--mount", "true"], capture_output=True, check=False)
    os.environ[NAMESPACE] = "own" if may.returncode == 0 else "none"
    if may.returncode == 0:
        os.execvp("unshare", ["unshare", "--map-root-user", "--mount", sys.executable, *sys.argv])


def _plan(rng: random.Random, steps: int, every: int, count: int) -> list[dict[str, Any]]:
    """Faults in the order of their steps, each kind as often as the others. Half of the kills hit while a checkpoint is written."""
    kinds = [KINDS[i % len(KINDS)] for i in range(count)]
    rng.shuffle(kinds)
    plan: list[dict[str, Any]] = []
    for kind, step in zip(kinds, sorted(rng.choices(range(1, steps), k=count)), strict=True):
        fault: dict[str, Any] = {"kind": kind, "step": step}
        if kind in ("sigkill", "sigterm"):
            fault["delay"] = rng.uniform(0, 0.12)
            where = rng.choice(("step", "step", "save", "save", "save", "starting"))
            if where == "save":
                fault |= {"step": min(-(-step // every) * every, steps - 1), "delay": rng.uniform(0, 0.03)}
            elif where == "starting":
                fault |= {"starting": True, "delay": rng.uniform(0, STARTING_S)}
        elif kind.startswith("reward"):
            fault["count"] = rng.randint(1, 5)
        elif kind == "full_disk":
            fault["leave"] = rng.randrange(1_000_000)
        plan.append(fault)
    plan.sort(key=lambda fault: fault["step"])
    return [{"fault": i, **fault} for i, fault in enumerate(plan)]


def _run(folder: Path, keys: list[str], plan: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """One run to its end, by the shell loop. Returns what happened."""
    disk = folder / "disk"
    disk.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps(plan, indent=1))
    if os.environ[NAMESPACE] == "own":
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(disk)], check=True)
    run_dir, begun = disk / "run", time.monotonic()
    command = [str(ROOT / "scripts" / "keep_running.sh"), str(run_dir), "--config", "quickstart.yaml", *keys]
    environment = _environment(folder) | {"PGRPO": f"{sys.executable} {FAULTS}", "TRIES": "10"}
    with (folder / "log").open("a") as out:
        code = subprocess.run(command, env=environment, stdout=out, stderr=out, check=False).returncode
    text = (folder / "log").read_text(errors="replace")
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    injected = Counter(event["kind"] for event in events if event["event"] == "fault")
    restored = [event["step"] for event in events if event["event"] == "restored"]
    pairs = pairwise(events)
    answers = [b["time"] - a["time"] for a, b in pairs if (a["event"], b["event"]) == ("sigterm sent", "exit")]
    rows = _rows(run_dir)
    whole = [row["step"] for row in rows] == list(range(steps + 1)) and (
        run_dir / "checkpoints" / f"step_{steps}"
    ).is_dir()
    result = {
        "finished": code == 0 and whole and sum(injected.values()) == len(plan),
        "exit_code": code,
        "seconds": round(time.monotonic() - begun),
        "faults": dict(sorted(injected.items())),
        "faults_total": sum(injected.values()),
        "resumes": sum(event["event"] == "start" for event in events) - 1,
        "resumed_at_steps": restored[1:],
        "exit_codes": dict(sorted(Counter(re.findall(r"keep_running: exit code (\d+)", text)).items())),
        "messages": dict(Counter(_kind_of(line) for line in re.findall(r"^pgrpo: (.*)", text, re.MULTILINE))),
        "half_written_checkpoints_removed": text.count("removed, left by a killed run"),
        "slowest_answer_to_sigterm_s": round(max(answers), 2) if answers else None,
        "skipped_updates": sum(row.get("skipped_updates") or 0 for row in rows),
        "samples_with_reward_errors": sum(row.get("rewards/errors") or 0 for row in rows),
    }
    print(f"soak: {folder.name}: {json.dumps(result)}", flush=True)
    return result


def _environment(folder: Path) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"OMP_NUM_THREADS": "1", "SOAK_DIR": str(folder), "PYTHONPATH": paths}


def _kind_of(message: str) -> str:
    """A message without what differs between two of its kind: folders and numbers."""
    return re.sub(r"\d[\d.e+-]*", "N", re.sub(r"/\S*/", "", message))[:160]


def _rows(run_dir: Path) -> list[dict[str, Any]]:
    file = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _differences(one: Path, other: Path, steps: int) -> list[str]:
    """What is not equal in the last checkpoints and the rows of two runs; empty if all of it is."""
    found = []
    try:
        (want, scalars), (got, other_scalars) = (
            checkpoint.load(run / "checkpoints" / f"step_{steps}") for run in (one, other)
        )
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    for name in want.keys() | got.keys():
        a, b = want.get(name, {}), got.get(name, {})
        found += [
            f"{name}: {key}"
            for key in a.keys() | b.keys()
            if key not in a or key not in b or not torch.equal(a[key], b[key])
        ]
    found += [key for key in scalars if key not in ("config", "trackers") and scalars[key] != other_scalars[key]]
    for file in ("metrics.jsonl", "completions.jsonl"):
        rows = [[json.loads(line) for line in (run / file).read_text().splitlines()] for run in (one, other)]
        stable = [[{k: v for k, v in row.items() if not k.startswith(VOLATILE)} for row in part] for part in rows]
        if stable[0] != stable[1]:
            found.append(file)
    return found


if __name__ == "__main__":
    main()
