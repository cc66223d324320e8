"""Times forests against less sharing, on random weights and tokens.

    python benchmarks/forest.py beginning branches kept --json FILE
    python benchmarks/forest.py flat --against CHECKOUT --json FILE
    python benchmarks/forest.py beginning branches kept --shape-of FOLDER --scale 64 --repeats 2   # on a CPU

Cases:

    beginning   32 prompts that share 4,096 tokens and have 512 of their own, 8 completions of 512 tokens each, budget 32,768: the
                forest against sharing by prompt alone
    branches    a prompt of 4,096 tokens and a conversation of 6 turns of 512 tokens that branches in two at every turn, budget
                73,728: the forest against a packed row of its own for every path
    kept        one prompt of 32,768 tokens, 16 completions of 4,096, budget 49,152: the prompt kept for several passes against
                computed again in every micro-batch
    flat        three shapes of benchmarks/policy.py: this checkout against another one (a folder with its pgrpo/ and benchmarks/),
                two processes that are both alive, and time one update in turn; a time is the median of ``--repeats`` of them.

``--shape-of`` is a folder with a config.json, for a CPU that of a small model with at least 100 tokens. ``--scale`` divides all
lengths. An update is a forward and a backward of all micro-batches; there is no optimizer. Both ways run
in turn, ``--repeats`` times, after two runs of each that compile; times are medians, on a GPU by device events. Prints for each
case but flat rows, FLOPs and their ratio, seconds and their ratio, and MFU against a matrix product timed in the same run. The
rows are written after each case.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pgrpo.attention.layout import unpack_calls
from pgrpo.commands.bench import _matmul_flops, _milliseconds, random_model
from pgrpo.config import Config, load_config
from pgrpo.distributed.world import World
from pgrpo.model.kept import kept_prefix
from pgrpo.model.policy import Policy
from pgrpo.packing.balance import share_out
from pgrpo.packing.batch import GroupedBatch, build_batch
from pgrpo.packing.forest import Work
from pgrpo.placement.choices import compute_dtype
from pgrpo.planning.flops import GIB, ModelDims, forest_update_flops
from pgrpo.training.place import wrap
from pgrpo.training.update import spans
from pgrpo.types import Sample


def sample(prompt: list[int], ids: list[int]) -> Sample:
    return Sample(prompt, ids, [True] * len(ids), [0.0] * len(ids), advantages=[1.0] * len(ids))


def beginning(ids: Any, scale: int) -> tuple[list[Sample], int]:
    system = ids(4096 // scale)
    samples = []
    for _ in range(32):
        prompt = system + ids(512 // scale)
        samples += [sample(prompt, ids(512 // scale)) for _ in range(8)]
    return samples, 32_768 // scale


def branches(ids: Any, scale: int) -> tuple[list[Sample], int]:
    prompt, paths = ids(4096 // scale), [[]]
    for _ in range(6):
        paths = [path + ids(512 // scale) for path in paths for _ in range(2)]
    return [sample(prompt, path) for path in paths], 73_728 // scale


def kept(ids: Any, scale: int) -> tuple[list[Sample], int]:
    prompt = ids(32_768 // scale)
    return [sample(prompt, ids(4096 // scale)) for _ in range(16)], 49_152 // scale


CASES = {"beginning": beginning, "branches": branches, "kept": kept}
FLAT = [(16_384, 1024, 8, 1), (2048, 2048, 8, 1), (8192, 1024, 4, 1)]
"""Prompt, completion, group size and groups, of rows in h100_policy.json."""
IN_TURN = """
import runpy, sys
from pathlib import Path
from pgrpo.commands import bench
timed = bench._milliseconds
def in_turn(*given):
    print("ready", flush=True)
    sys.stdin.readline()
    return timed(*given)
bench._milliseconds = in_turn
del sys.argv[0]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script that says when it is about to time something, and waits for a line before it does."""


def by_prompt_alone(policy: Policy, samples: Sequence[Sample], budget: int, dims: ModelDims) -> list[GroupedBatch]:
    """Micro-batches in which prompts share nothing with each other: their first tokens are made to differ."""
    numbers: dict[int, int] = {}
    apart = []
    for s in samples:
        number = numbers.setdefault(id(s.prompt_ids), len(numbers))
        apart.append(replace(s, prompt_ids=[number, *s.prompt_ids[1:]]))
    return micro_batches(policy, apart, budget, dims)


def micro_batches(
    policy: Policy, samples: Sequence[Sample], budget: int, dims: ModelDims, **how: Any
) -> list[GroupedBatch]:
    def cost(each: Work) -> np.ndarray:
        return forest_update_flops(dims, each)

    (plan,) = share_out(samples, 1, budget, cost, policy.attention, **how)
    return [build_batch(forest, device=policy.device, attention=policy.attention) for forest in plan]


def update(policy: Policy, batches: Sequence[GroupedBatch]) -> None:
    for span in spans(batches):
        with kept_prefix(policy, span):
            for batch in span:
                policy(batch).logprobs.sum().backward()
    policy.zero_grad(set_to_none=True)


def measure(case: str, policy: Policy, config: Config, args: argparse.Namespace) -> dict[str, Any]:
    rnd = random.Random(0)
    vocabulary = policy.model.config.vocab_size
    lowest = min(64, vocabulary // 2)  # prompts that are made to differ have smaller first tokens
    samples, budget = CASES[case](lambda n: [rnd.randrange(lowest, vocabulary) for _ in range(n)], args.scale)
    dims = ModelDims.from_config(policy.model.config)
    this: dict[str, Any] = {}
    if case == "kept":
        other, this = micro_batches(policy, samples, budget, dims), {"most_kept": budget}
    elif case == "branches":
        other = micro_batches(policy, samples, budget, dims, is_shared=False)
    else:
        other = by_prompt_alone(policy, samples, budget, dims)
    ways = {"forest": micro_batches(policy, samples, budget, dims, **this), "less shared": other}
    if case == "kept" and not any(batch.kept for batch in ways["forest"]):
        raise SystemExit("kept: at this scale computing the prompt again costs less; choose a smaller --scale")
    on_gpu = policy.device.type == "cuda"
    for batches in ways.values():
        for _ in range(2):
            update(policy, batches)
    rate = _matmul_flops(policy.device, config)
    times: dict[str, list[float]] = {way: [] for way in ways}
    peaks: dict[str, float] = {}
    for _ in range(args.repeats):
        for way, batches in ways.items():
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            times[way].append(_milliseconds(lambda batches=batches: update(policy, batches), policy.device) / 1e3)
            peaks[way] = torch.cuda.max_memory_allocated() / GIB if on_gpu else float("nan")
    rate = max(rate, _matmul_flops(policy.device, config))
    row: dict[str, Any] = {"case": case, "budget": budget, "matmul_tflops": rate / 1e12, "repeats": args.repeats}
    for way, batches in ways.items():
        flops, seconds = (
            int(sum(forest_update_flops(dims, b.work).sum() for b in batches)),
            statistics.median(times[way]),
        )
        print(
            f"{case}, {way}: {len(batches)} micro-batches of {int(sum(b.work.rows.sum() for b in batches))} rows in all, "
            f"{[len(unpack_calls(b.layout.passes(None).table)) for b in batches]} passes, {seconds:.3f} s, {peaks[way]:.1f} GiB, "
            f"MFU {flops / seconds / rate:.2f}",
            flush=True,
        )
        row[way] = {
            "rows": int(sum(b.work.rows.sum() for b in batches)), "micro_batches": len(batches), "flops": flops, "seconds": seconds,
            "all_seconds": times[way], "peak_gib": peaks[way], "mfu": flops / seconds / rate,
        }  # fmt: skip
    row["flop_ratio"] = row["less shared"]["flops"] / row["forest"]["flops"]
    row["time_ratio"] = row["less shared"]["seconds"] / row["forest"]["seconds"]
    row["of_flop_ratio"] = row["time_ratio"] / row["flop_ratio"]
    print(
        f"{case}: ratio of FLOPs {row['flop_ratio']:.2f}, of time {row['time_ratio']:.2f}: {row['of_flop_ratio']:.2f}",
        flush=True,
    )
    return row


def flat(args: argparse.Namespace, keys: Sequence[str]) -> dict[str, Any]:
    """Seconds of an update of each shape, here and in ``--against``. Both read this checkout's config and recipe."""
    here = Path(__file__).resolve().parents[1]
    shapes = [(p // args.scale, r // args.scale, g, n) for p, r, g, n in FLAT]
    sides = {"here": here, "against": args.against.resolve()}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder, running = Path(name), []
        for side, checkout in sides.items():
            command = [sys.executable, "-c", IN_TURN, str(checkout / "benchmarks" / "policy.py"), "--random-weights"]
            command += ["--config", str(here / "configs" / "qwen3_4b.yaml"), "--json", str(folder / f"{side}.json")]
            for shape in shapes:
                command += ["--shape", ",".join(map(str, shape))]
            command += ["--methods", "grouped", "--checkpointing", "attention", "--repeats", str(args.repeats), "--"]
            command += [f"recipe={here / 'recipes' / 'gsm8k.yaml'}", "optim.offload=none", *keys]
            packages = os.pathsep.join([str(checkout), os.environ.get("PYTHONPATH", "")])
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            environment = os.environ | {"PYTHONPATH": packages}
            process = subprocess.Popen(command, cwd=checkout, env=environment, **pipes)
            running.append(stack.enter_context(process))
            stack.callback(process.kill)
        waiting = take_turns(running)
        if any(waiting) or any(process.wait() for process in running):
            raise SystemExit(f"flat: {', '.join(side for side, w in zip(sides, waiting, strict=True) if not w)} failed")
        found = {side: json.loads((folder / f"{side}.json").read_text())["rows"] for side in sides}
    times = {
        side: {(r["prompt"], r["completion"], r["group_size"], r["groups"]): r["update_ms"] / 1e3 for r in rows}
        for side, rows in found.items()
    }
    seconds = {side: [by_shape[shape] for shape in shapes] for side, by_shape in times.items()}
    ratios = [a / b for a, b in zip(seconds["here"], seconds["against"], strict=True)]
    for shape, ratio, *pair in zip(shapes, ratios, *seconds.values(), strict=True):
        print(f"flat {shape}: {pair[0]:.3f} s, {ratio:.3f} of the {pair[1]:.3f} s of {args.against}", flush=True)
    return {"case": "flat", "shapes": shapes, "seconds": seconds, "ratios": ratios, "repeats": args.repeats}


def take_turns(processes: Sequence[subprocess.Popen[str]]) -> list[bool]:
    """Let processes that run ``IN_TURN`` time one thing each, in turn, until one ends: while one runs, the others wait. The order
    turns round each time, so that a device that grows slower favours none. Returns which of them still wait."""
    ready, order = [is_ready(process) for process in processes], list(range(len(processes)))
    while all(ready):
        for i in order:
            print("", file=processes[i].stdin, flush=True)
            ready[i] = is_ready(processes[i])
        order.reverse()
    return ready


def is_ready(process: subprocess.Popen[str]) -> bool:
    """Once it waits for its turn; False if it ended."""
    for line in process.stdout or ():
        if line == "ready\n":
            return True
        print(line, end="", flush=True)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=[*CASES, "flat"], metavar="CASE")
    parser.add_argument("--shape-of", default="benchmarks/qwen3_4b")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout, for the case flat")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if "flat" in args.cases and args.against is None:
        parser.error("flat: name another checkout with --against")
    if args.against and not (args.against / "benchmarks" / "policy.py").is_file():
        parser.error(
            f"--against {args.against}: has no benchmarks/policy.py; give a checkout, or its pgrpo/ and benchmarks/"
        )
    on_gpu = torch.cuda.is_available()
    keys = [f"model.path={Path(args.shape_of).resolve()}", "rollout.engine=embedded"]
    keys += [] if on_gpu else ["model.dtype=float32", "model.compile=false"]
    rows, policy = [], None
    for case in sorted(args.cases, key=lambda case: case != "flat"):  # its processes need the device's memory
        if case == "flat":
            rows.append(flat(args, keys))
        else:
            config = load_config("qwen3_4b.yaml", [*keys, "model.activation_checkpointing=attention"])
            world = World(0, 1, torch.device("cuda", 0) if on_gpu else torch.device("cpu"))
            torch.manual_seed(0)
            policy = policy or wrap(random_model(config.model, compute_dtype(config), world.device), config, world)
            rows.append(measure(case, policy, config, args))
        if args.json:
            device = torch.cuda.get_device_name() if on_gpu else platform.processor() or "CPU"
            args.json.write_text(json.dumps({"device": device, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
