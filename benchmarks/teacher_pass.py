"""Time and memory of an update with a teacher, each prompt computed once or repeated, of random tokens and weights, on any device.

    python benchmarks/teacher_pass.py --student STUDENT --teacher TEACHER [--prompt 2048 --completion 512 --group-size 8 --groups 4]

Both are folders of a config.json. Without them two small models are made, which a CPU can run. A row has the teacher's pass alone
(seconds, packed tokens, FLOPs), and the update without a teacher and with each form of the KL. Peak memory is all that is allocated
on a GPU, and on a CPU what the call allocates at its peak, beside weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config

from pgrpo.admission.compare import tokens_as_groups
from pgrpo.commands.bench import random_model, random_tokens
from pgrpo.commands.bench_report import Shape
from pgrpo.config import Config, load_config
from pgrpo.distributed.fsdp import no_gradient, place
from pgrpo.distributed.world import World, start
from pgrpo.grpo import update_policy
from pgrpo.model.policy import Policy
from pgrpo.placement.choices import compute_dtype, teacher_model
from pgrpo.planning.dims import ModelDims, decoder_layers
from pgrpo.planning.flops import GIB, forward_flops
from pgrpo.planning.recompute import LayerPlan
from pgrpo.training.build import Learner
from pgrpo.training.optim import build_optimizer
from pgrpo.training.place import place_policy, wrap
from pgrpo.training.progress import Progress
from pgrpo.training.update import micro_batches

SMALL = {"student": (256, 4), "teacher": (512, 8)}
"""Width and layers."""


def placed(config: Config, world: World, *, frozen: bool) -> Policy:
    """A model of random weights: frozen in the compute dtype, or trained in float32."""
    if not frozen:
        return place_policy(config, world, partial(random_model, device=world.device))
    model = random_model(config.model, compute_dtype(config), world.device)
    policy = wrap(model, config, world, LayerPlan(["full"] * len(decoder_layers(model)))).requires_grad_(False)
    place(policy, decoder_layers(model), world, compute_dtype(config), methods=("teacher_rows",))
    return policy


def timed(world: World, steps: int, work: Callable[[], Any]) -> dict[str, float]:
    """Median seconds without the first call, and peak GiB."""
    seconds = []
    for step in range(steps + 1):
        if step == 1 and world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        world.synchronize()
        started = time.perf_counter()
        work()
        world.synchronize()
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() if world.device.type == "cuda" else allocated_at_most(work)
    return {"seconds": statistics.median(seconds[1:]), "peak_gib": peak / GIB}


def allocated_at_most(work: Callable[[], Any]) -> int:
    """Bytes that a call holds at its peak on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    results: Any = profile.profiler and profile.profiler.kineto_results
    changes = [event.nbytes() for event in results.events() if event.name() == "[memory]"]
    return max(accumulate(changes, initial=0))


def measure(config: Config, shape: Shape, steps: int, world: World, attention: str) -> dict[str, Any]:
    torch.manual_seed(0)
    config.model.attention = attention  # pyright: ignore[reportAttributeAccessIssue]
    of_teacher = replace(config, model=replace(teacher_model(config), dtype=config.model.dtype))
    policy, teacher = placed(config, world, frozen=False), placed(of_teacher, world, frozen=True)
    dims = [ModelDims.from_config(model.model.config) for model in (policy, teacher)]
    learner = Learner(config, world, policy, None, build_optimizer(policy, config.optim), dims[0], teacher=teacher)
    groups = tokens_as_groups(*random_tokens(shape, dims[0].vocab))
    batches = micro_batches(learner, groups)

    def teach() -> None:
        with no_gradient(teacher):
            for batch in batches:
                teacher(batch)

    shared, completions = attention == "grouped", [shape.completion] * shape.group_size
    row: dict[str, Any] = {
        "attention": attention,
        "packed_tokens": sum(batch.packed_tokens for batch in batches),
        "teacher_tflop": shape.groups * forward_flops(dims[1], shape.prompt, completions, shared=shared) / 1e12,
        "teacher": timed(world, steps, teach),
    }
    for form in (None, "sampled", "full"):
        loss = replace(config.loss, teacher=form and config.loss.teacher, teacher_kl=form or "sampled")
        own = replace(learner, config=replace(config, loss=loss), teacher=teacher if form else None)
        row[f"update, {form or 'no teacher'}"] = timed(
            world, steps, lambda own=own: update_policy(own, Progress(), groups)
        )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student")
    parser.add_argument("--teacher")
    for name, default in (("prompt", 256), ("completion", 64), ("group-size", 8), ("groups", 2), ("steps", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, start() as world:
        paths = {"student": args.student, "teacher": args.teacher}
        for which, (width, layers) in SMALL.items():
            if paths[which] is None:
                paths[which] = str(Path(name) / which)
                Qwen3Config(
                    vocab_size=32768, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
                    num_attention_heads=width // 64, num_key_value_heads=width // 128, head_dim=64,
                ).save_pretrained(paths[which])  # fmt: skip
        shape = Shape(args.prompt, args.completion, args.group_size, args.groups)
        keys = [f"model.path={paths['student']}", f"loss.teacher={paths['teacher']}", "run_dir=runs/unused"]
        keys += [f"model.dtype={'bfloat16' if world.device.type == 'cuda' else 'float32'}"]
        config = load_config("quickstart", keys)
        config.data.max_prompt_tokens, config.rollout.max_completion_tokens = shape.prompt, shape.completion
        config.train.token_budget = max(16384, shape.prompt + shape.completion)
        for attention in ("grouped", "repeated"):
            print(json.dumps(measure(config, shape, args.steps, world, attention)), flush=True)


if __name__ == "__main__":
    main()
