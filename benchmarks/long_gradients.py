"""Compares gradients of ranks that compute a long group together with those of one rank, and all of them with float32's.

    python benchmarks/long_gradients.py --shape-of benchmarks/qwen3_4b --layers 4 --together 2 4 --json FILE

All in bfloat16: one rank; one rank with the completions in another order, which changes rounding alone; and as many ranks as
``--together`` says. In float32: a CPU, whose weights all others have too. Prints norms of differences over the norm of the other:
sequence parallelism is right if it is as far from float32 as one rank is, and no further from one rank than another order is. What
fits the GPUs at once runs at once; without GPUs one after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import rows
import torch

FLOAT32, ONE, REVERSED = "float32", "one rank", "one rank, other order"


class Job(NamedTuple):
    """A process that writes gradients. ``gpus``: as many, and ranks; 0: one rank on the CPU."""

    name: str
    gpus: int
    keys: tuple[str, ...] = ()


def begin(job: Job, args: argparse.Namespace, folder: Path, first_gpu: int) -> subprocess.Popen[bytes]:
    ranks = max(1, job.gpus)
    dtype = "float32" if job.name == FLOAT32 else "bfloat16"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    script = [str(Path(__file__).with_name("long_context.py")), "--shape-of", args.shape_of, "--together", str(ranks)]
    script += [
        "--config",
        args.config,
        *(["--layers", str(args.layers)] if args.layers else []),
        "--prompt",
        str(args.prompt),
    ]
    script += ["--completion", str(args.completion), "--group-size", str(args.group_size), *job.keys]
    script += [
        "--gradients",
        str(folder / job.name),
        "--",
        f"model.dtype={dtype}",
        "model.compile=false",
        *args.overrides,
    ]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // (2 if job.gpus == 0 else 2 * ranks)))
    }
    visible = range(first_gpu, first_gpu + job.gpus) if torch.cuda.is_available() else ()
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, visible))
    print(f"begins: {job.name}", flush=True)
    return subprocess.Popen([*(command if ranks > 1 else [sys.executable]), *script], env=environment)


def run(jobs: list[Job], args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Seconds of each job. Those without a GPU run beside all others."""
    gpus, began = torch.cuda.device_count(), time.perf_counter()
    seconds: dict[str, float] = {}
    running: dict[Job, tuple[subprocess.Popen[bytes], int]] = {}
    waiting = list(jobs)
    while waiting or running:
        used = {gpu for job, (_, first) in running.items() for gpu in range(first, first + job.gpus)}
        for job in list(waiting):
            if not gpus:
                first = None if running else 0
            else:
                first = next((i for i in range(gpus - job.gpus + 1) if not used & set(range(i, i + job.gpus))), None)
            if first is not None:
                running[job] = begin(job, args, folder, first), first
                used |= set(range(first, first + job.gpus))
                waiting.remove(job)
        for job, (process, _) in list(running.items()):
            if (status := process.poll()) is not None:
                if status:
                    raise SystemExit(f"{job.name}: the process ended with {status}; its output is above")
                seconds[job.name] = time.perf_counter() - began
                del running[job]
        time.sleep(0.1)
    return seconds


def difference(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm of ``wanted``."""
    assert found.keys() == wanted.keys() and wanted, "gradients of other matrices"
    error = sum((found[name] - g).double().square().sum().item() for name, g in wanted.items())
    return (error / sum(g.double().square().sum().item() for g in wanted.values())) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="qwen3_4b.yaml")
    parser.add_argument("--shape-of", required=True, help="folder with a config.json")
    parser.add_argument("--layers", type=int, help="of the model, in the place of its own number")
    parser.add_argument("--prompt", type=int, default=8192)
    parser.add_argument("--completion", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--together", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--json", type=Path, metavar="FILE", help="a row is added to this file")
    parser.add_argument("--commit", help="for the row, where there is no git")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    if torch.cuda.is_available() and max(args.together) > torch.cuda.device_count():
        raise SystemExit(f"--together {max(args.together)}: there are {torch.cuda.device_count()} GPUs")
    together = {ranks: f"{ranks} ranks" for ranks in args.together}
    jobs = [Job(FLOAT32, 0), Job(ONE, 1), Job(REVERSED, 1, ("--reverse",))]
    jobs += [Job(name, ranks) for ranks, name in together.items()]
    with tempfile.TemporaryDirectory() as folder:
        seconds = run(jobs, args, Path(folder))
        found = {job.name: torch.load(Path(folder) / job.name) for job in jobs}
    names = [job.name for job in jobs]
    row: dict[str, Any] = rows.origin(args.commit) | {"layers": args.layers, "prompt": args.prompt}
    row |= {"completion": args.completion, "group_size": args.group_size, "ended_after_s": seconds}
    row["from_float32"] = {name: difference(found[name], found[FLOAT32]) for name in names[1:]}
    row["from_one_rank"] = {name: difference(found[name], found[ONE]) for name in names[2:]}
    print(json.dumps(row, indent=1), flush=True)
    if args.json:
        rows.add(args.json, row)


if __name__ == "__main__":
    main()
