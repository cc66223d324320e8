"""Times the start of a run by part: from the start of the process to the end of its first step, less the time of a later step.

    python benchmarks/start_time.py --shape-of benchmarks/qwen3_4b --config qwen3_4b.yaml --prompts 32 --prompt 4096 \\
        --completion 1024 --group-size 8 [--runs cold warm] [--caches FOLDER] [--json FILE] [key=value ...]

Each run is a process of its own, with random weights and the steps of full_step.py. ``cold`` empties the folder of compiled code
(``cache_dir``) before; ``warm`` takes what the run before it left there. vLLM's own log of its start is shown with its clock times.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pgrpo.early import early_codes
from pgrpo.process.second import importing_early

PREFIX = "start_time: "
TIMED = (
    ("pgrpo.rollout.vllm.start", "package", "importing vLLM"),
    ("pgrpo.training.build", "check_model", "the proof"),
    ("pgrpo.training.build", "check_on_device", "the check on the device"),
    ("pgrpo.training.prompts", "load_prompts", "reading prompts"),
    ("pgrpo.training.build", "place_policy", "loading the policy"),
    ("pgrpo.training.build", "build_engine", "building the engine"),
    ("pgrpo.rollout.vllm.start", "start", "of that, starting vLLM"),
)
"""Module and function -> the name of its time."""
STEP_PARTS = ("time/wake", "time/weight_sync", "time/offload", "time/rollout", "time/sleep", "time/update")


def run(args: argparse.Namespace, began: float) -> dict[str, float]:
    """Seconds of the parts of this process's start. ``began``: when the process was started (``time.time``)."""
    import full_step
    import torch

    from pgrpo.distributed.world import start
    from pgrpo.grpo import grpo_step
    from pgrpo.planning.flops import mfu
    from pgrpo.process.second import SecondProcess
    from pgrpo.training import build as building
    from pgrpo.training.caller import Given
    from pgrpo.training.compile_ahead import CompileAhead
    from pgrpo.training.progress import Progress

    parts = {"imports": time.time() - began}

    def timed(module: str, name: str, title: str) -> None:
        function = getattr(importlib.import_module(module), name)

        def wrapped(*given: Any, **named: Any) -> Any:
            started = time.perf_counter()
            result = function(*given, **named)
            parts[title] = parts.get(title, 0.0) + time.perf_counter() - started
            return result

        setattr(importlib.import_module(module), name, wrapped)

    for one in TIMED:
        timed(*one)
    wait = SecondProcess.wait

    def waited(self: SecondProcess, seconds: float) -> None:
        started = time.perf_counter()
        wait(self, seconds)
        parts[f"waiting for the process that compiles {self.what}"] = time.perf_counter() - started

    SecondProcess.wait = waited
    config, rows = full_step.settings(args)
    full_step.clear_up(args, config)
    made = time.time()  # the model's folder, which a user has already
    with (
        start() as world,
        CompileAhead(config, world) as ahead,
        building.build(config, world, Given([full_step.spread], rows), ahead) as built,
    ):
        parts["build"] = time.time() - made
        progress, steps = Progress(), []
        for _ in range(args.steps):
            started = time.perf_counter()
            _, metrics = grpo_step(built, progress)
            progress.step += 1
            progress.has_moved = False
            steps.append(metrics | {"step": time.perf_counter() - started})
        first, later = steps[0], steps[-1]
        parts |= {f"first step, {name}": first[name] - later.get(name, 0.0) for name in STEP_PARTS if name in first}
        parts |= {f"a later step, {name}": later[name] for name in (*STEP_PARTS, *full_step.OTHERS) if name in later}
        parts["a later step"] = later["step"]
        rate = full_step.matmul_flops(world.device, config)
        parts["matmul_tflops"] = rate / 1e12
        parts["a later step, mfu_update"] = mfu(later["perf/flops"], later["time/update"], rate)
        parts["start"] = parts["imports"] + parts["build"] + first["step"] - later["step"]
        if world.device.type == "cuda":
            parts["pinning host memory"] = torch.cuda.memory.host_memory_stats()["host_alloc_time.total"] / 1e6
        compiling = torch._dynamo.utils.calculate_time_spent()  # of the policy's layers, and of vLLM's model
        parts |= {f"compiling, {name}": seconds for name, seconds in compiling.items()}
        counters = torch._dynamo.utils.counters
        parts |= {
            name: float(n)
            for group in ("aot_autograd", "inductor")
            for name, n in counters[group].items()
            if "cache" in name
        }
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--shape-of", type=Path, required=True, help="folder with a config.json")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/start_time"))
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--completion", type=int, default=1024)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--runs", nargs="+", choices=["cold", "warm"], default=["cold", "warm"])
    parser.add_argument("--caches", type=Path, default=Path("runs/start_time_caches"), help="emptied before a cold run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows are added to this file")
    parser.add_argument("--commit", help="that is measured; goes into the rows")
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)  # in the processes that this one starts
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.set_defaults(
        attention=["grouped"], steps=2, images=0, image_tokens=0, plain=False, warm_up_prompt=None
    )  # of full_step.py
    args = parser.parse_args()
    args.overrides = [f"cache_dir={args.caches.absolute()}", *args.overrides]
    if args.began:
        with importing_early(early_codes(str(args.caches.absolute()), 1)):  # as ``pgrpo.train`` does
            print(PREFIX + json.dumps(run(args, args.began)), flush=True)
        return
    for kind in args.runs:
        if kind == "cold":
            shutil.rmtree(args.caches, ignore_errors=True)
        environment = os.environ | {"VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "INFO")}
        command = [sys.executable, *sys.argv[:1], "--began", str(time.time()), *sys.argv[1:]]
        row: dict[str, Any] = {"run": kind, "config": args.config, "commit": args.commit}
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or ():
                if line.startswith(PREFIX):
                    row |= {name: round(value, 2) for name, value in json.loads(line.removeprefix(PREFIX)).items()}
                else:
                    print(line, end="", flush=True)
        if process.returncode:
            raise SystemExit(f"the {kind} run ended with {process.returncode}")
        print(json.dumps(row), flush=True)
        if args.json:
            rows = json.loads(args.json.read_text())["rows"] if args.json.exists() else []
            args.json.write_text(json.dumps({"rows": [*rows, row]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
