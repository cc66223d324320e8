"""Measures time and memory of complete optimizer steps: float32 masters, AdamW, FSDP2, random tokens and weights.

    python benchmarks/train_step.py --config qwen3_4b.yaml --prompt 4096 --completion 1024 --group-size 8 --groups 8 \
        [--offload none cpu] [--steps 3] [--json FILE] [key=value ...]
    torchrun --nproc-per-node 2 benchmarks/train_step.py ... --offload none

Every rank has ``--groups`` groups, so that tokens a second, relative to one rank, show the scaling. Needs only the model's
config.json. Times everything in a training step after its rollout: packing, forward and backward of every micro-batch, gradient
clipping, AdamW. The first step, which compiles, is not counted.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import rows
import torch

from pgrpo.admission.compare import tokens_as_groups
from pgrpo.commands.bench import random_model, random_tokens
from pgrpo.commands.bench_report import Shape
from pgrpo.config import Config, load_config
from pgrpo.distributed.world import World, start
from pgrpo.grpo import update_policy
from pgrpo.placement.layers import layer_plan
from pgrpo.planning.flops import GIB, ModelDims, forward_flops
from pgrpo.process.caches import use_caches
from pgrpo.training.build import Learner
from pgrpo.training.optim import build_optimizer
from pgrpo.training.place import place_policy
from pgrpo.training.progress import Progress


def measure(config: Config, shape: Shape, steps: int, world: World) -> dict[str, Any]:
    """One row of the table."""
    torch.manual_seed(0)  # the same weights on every rank
    config.rollout.group_size, config.rollout.prompts_per_step = shape.group_size, shape.groups
    config.rollout.max_completion_tokens, config.data.max_prompt_tokens = shape.completion, shape.prompt
    config.train.token_budget = shape.prompt + shape.group_size * shape.completion
    policy = place_policy(config, world, partial(random_model, device=world.device))
    dims = ModelDims.from_config(policy.model.config)
    plan = layer_plan(config, dims, world)
    optimizer = build_optimizer(policy, config.optim)
    learner, progress = Learner(config, world, policy, None, optimizer, dims), Progress()
    groups = tokens_as_groups(*random_tokens(shape, policy.model.config.vocab_size))
    seconds = []
    for step in range(steps + 1):
        if step == 1 and world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        world.synchronize()
        started = time.perf_counter()
        metrics = update_policy(learner, progress, groups)
        world.synchronize()
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds[1:])
    flops = 3 * shape.groups * forward_flops(dims, shape.prompt, [shape.completion] * shape.group_size)
    return {
        "fsdp_size": config.model.fsdp_size,
        "offload": config.optim.offload,
        "checkpointing": config.model.activation_checkpointing,
        "layers": {mode: plan.recompute.count(mode) for mode in plan.recompute},
        "stay_gathered": plan.stay_gathered,
        "seconds": median,
        "tokens_per_s": metrics["tokens/packed"] / median,
        "samples_per_s": shape.groups * shape.group_size / median,
        "useful_tflops_a_rank": flops / median / 1e12 / world.size,
        "grad_norm": metrics["grad_norm"],
    } | ({"peak_gib": torch.cuda.max_memory_allocated() / GIB} if world.device.type == "cuda" else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--completion", type=int, default=1024)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--offload", nargs="+", choices=["none", "cpu"], default=["none", "cpu"])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows are added to this file")
    parser.add_argument("--commit", help="for the rows, where there is no git")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    given = load_config(args.config, args.overrides)
    with start(given.model.fsdp_size) as world:
        use_caches(given.cache_dir)
        shape = Shape(args.prompt, args.completion, args.group_size, args.groups * world.size)
        for offload in args.offload:
            config = load_config(args.config, [*args.overrides, f"optim.offload={offload}"])
            row = (
                rows.origin(args.commit)
                | vars(shape)
                | {"groups_a_rank": args.groups}
                | measure(config, shape, args.steps, world)
            )
            if world.is_main:
                print(json.dumps(row), flush=True)
                if args.json:
                    rows.add(args.json, row)
            gc.collect()
            if world.device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
