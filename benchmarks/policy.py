"""Times the update of a policy in several ways: prompts once, repeated, copied keys (concat), and the package PrefixGrouper.

    python benchmarks/policy.py --config qwen3_4b.yaml --random-weights --shape 8192,1024,4 --repeats 3 \
        --methods grouped repeated_packed concat prefix_grouper prefix_grouper_ours --checkpointing attention none \
        --json benchmarks/h100_policy.json -- model.path=benchmarks/qwen3_4b

Measures like ``pgrpo bench``, for the methods of methods.py. ``--json`` adds rows to a file, and replaces rows that were measured
again. ``--profile`` writes the time of each kernel of a grouped update. On a CPU, peak memory is the peak resident
memory of one update in a fresh process, over what that process held before it loaded the model.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import subprocess
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from methods import METHODS, make_job, why_not

from pgrpo.admission.compare import tokens_as_samples
from pgrpo.commands.bench import load, random_tokens, time_jobs
from pgrpo.commands.bench_report import Row, Shape, print_rows
from pgrpo.config import Config, load_config
from pgrpo.distributed.world import World, start
from pgrpo.model.policy import Policy
from pgrpo.placement.choices import is_compiled
from pgrpo.planning.flops import GIB
from pgrpo.types import Recompute


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument(
        "--shape", action="append", required=True, type=_shape, metavar="P,R,G[,N]", help="may be repeated"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="without: all that can run here")
    parser.add_argument("--checkpointing", nargs="+", choices=get_args(Recompute), default=["none"])
    parser.add_argument("--random-weights", action="store_true", help="made up from the model's config.json alone")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--repeated-parts", type=int, default=1, help="micro-batches of repeated_packed")
    parser.add_argument("--commit", help="for the rows, where there is no git")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--profile", type=Path, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(arguments)
    for file in filter(None, (args.json, args.profile)):
        if not file.absolute().parent.is_dir():
            parser.error(f"{file}: there is no folder {file.parent}: create it first")
    config = load_config(args.config, args.overrides)
    methods = [m for m in METHODS if m in args.methods or m == "grouped"]  # which the others are compared with
    rows: list[Row] = []
    with start() as world:
        cpu = world.device.type == "cpu"
        # Before this process loads the model itself, as its own memory only grows.
        peaks = _resident_peaks(config, args.shape, methods, args.checkpointing, args.random_weights) if cpu else {}
        policy = load(config, max(s.prompt + s.completion for s in args.shape), world, args.random_weights)
        print(f"attention kernel {policy.attention.kernel}: {policy.attention.reason}")
        for shape in args.shape:
            samples = tokens_as_samples(*random_tokens(shape, policy.model.config.vocab_size))
            makers = {}
            for method in methods:
                if why := why_not(method, world.device, policy.model):
                    print(f"{method} is left out: {why}")
                else:
                    makers[method] = partial(make_job, policy, method, samples, args.repeated_parts)
            for recompute in args.checkpointing:
                timed, rate = time_jobs(makers, policy, shape, recompute, config, args.repeats)
                for row in timed:
                    row.peak_gib = peaks.get((shape, recompute, row.method), row.peak_gib)
                rows += timed
                if timed:
                    print_rows(timed, rate, config)
                if args.json:
                    write_report(make_report(timed, world.device, args.commit or head()), args.json)
        if args.profile:
            _profile(policy, args.shape[-1], args.checkpointing[-1], config, args.profile)
    return rows


def _shape(text: str) -> Shape:
    return Shape(*map(int, text.split(",")))


def _resident_peaks(
    config: Config, shapes: list[Shape], methods: list[str], checkpointing: list[Recompute], random_weights: bool
) -> dict[tuple[Shape, Recompute, str], float]:
    """GiB of each update, one child process at a time."""
    cpu = torch.device("cpu")
    peaks = {}
    for shape in shapes:
        for recompute in checkpointing:
            for method in methods:
                if why_not(method, cpu):
                    continue
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                    future = pool.submit(_peak_resident_gib, config, method, shape, recompute, random_weights)
                    peaks[shape, recompute, method] = future.result()
    return peaks


def _peak_resident_gib(config: Config, method: str, shape: Shape, recompute: Recompute, random_weights: bool) -> float:
    """Of one update, over what this process held before it loaded the model."""
    before, world = _resident_gib("VmRSS"), World(0, 1, torch.device("cpu"))
    policy = load(config, shape.prompt + shape.completion, world, random_weights)
    job = make_job(policy, method, tokens_as_samples(*random_tokens(shape, policy.model.config.vocab_size)))
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    job.update(recompute, is_compiled(config, world.device))
    return _resident_gib("VmHWM") - before


def _resident_gib(field: str) -> float:
    """VmRSS (now) or VmHWM (peak). Not ``ru_maxrss``: in a spawned process that starts from its parent's peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
    return kib * 1024 / GIB


def _profile(policy: Policy, shape: Shape, recompute: Recompute, config: Config, file: Path) -> None:
    job = make_job(policy, "grouped", tokens_as_samples(*random_tokens(shape, policy.model.config.vocab_size)))
    job.update(recompute, is_compiled(config, policy.device))
    with torch.profiler.profile() as profile:
        job.update(recompute, is_compiled(config, policy.device))
        World(0, 1, policy.device).synchronize()
    order = f"self_{policy.device.type}_time_total"
    file.write_text(profile.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=100))


def head() -> str:
    """The commit of this checkout; nothing without git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def make_report(rows: list[Row], device: torch.device, commit: str) -> dict[str, Any]:
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
    return {"device": name, "versions": versions, "rows": [asdict(row) | {"commit": commit} for row in rows]}


def write_report(report: dict[str, Any], file: Path) -> None:
    """Add the rows to those of a file from the same device and versions."""
    if file.exists():
        before = json.loads(file.read_text())
        for key in ("device", "versions"):
            if before[key] != report[key]:
                raise SystemExit(f"--json {file}: has rows of {key} {before[key]}, this is {report[key]}: name another")
        identity = ("prompt", "completion", "group_size", "groups", "method", "checkpointing")
        measured = {tuple(row[name] for name in identity) for row in report["rows"]}
        kept = [row for row in before["rows"] if tuple(row[name] for name in identity) not in measured]
        report = report | {"rows": kept + report["rows"]}
    file.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
