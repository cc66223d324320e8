"""Measures updates on one long group a share of data: time, memory and MFU of 1, 2, 4 ranks that compute it together.

    python benchmarks/long_context.py --shape-of benchmarks/qwen3_4b --prompt 131072 262144 524288 --lora 0 16 --json one.json
    torchrun --nproc-per-node 4 benchmarks/long_context.py --shape-of benchmarks/qwen3_4b --together 4 --prompt 131072 ...

Float32 masters, AdamW, random tokens and weights; needs the model's config.json only. All ranks together compute the same group
whatever ``--together`` is, so seconds of 1, 2 and 4 ranks compare. An update with a short prompt, which compiles, is not counted.
``--gradients FILE`` writes some gradients, and ``--compare FILE`` says how far those of this run are from them (relative norm);
``--reverse`` puts the completions into another order, which changes rounding alone: what a difference is to be compared with.
The whole step with its rollout: ``benchmarks/full_step.py`` with ``model.sequence_parallel_size``.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from pgrpo.admission.compare import tokens_as_groups
from pgrpo.commands.bench import random_model, random_tokens
from pgrpo.commands.bench_report import Shape
from pgrpo.config import Config, load_config
from pgrpo.distributed.fsdp import place
from pgrpo.distributed.world import World, start
from pgrpo.grpo import backward, update_policy
from pgrpo.model.lora import add_adapters
from pgrpo.planning.dims import decoder_layers
from pgrpo.planning.flops import GIB, ModelDims, mfu, peak_flops, update_flops
from pgrpo.planning.memory import memory_plan
from pgrpo.planning.placement import adapter_parameters, compute_dtype, layer_plan, plan_sizes
from pgrpo.training.build import Learner
from pgrpo.training.optim import build_optimizer
from pgrpo.training.place import wrap
from pgrpo.training.progress import Progress
from pgrpo.training.update import count, micro_batches

SHORT = 16_384
"""Tokens of the prompt of the update that compiles: long enough for the attention passes of longer ones."""


def configure(args: argparse.Namespace, prompt: int, lora: int) -> Config:
    keys = [f"model.path={args.shape_of}", f"model.sequence_parallel_size={args.together}", f"model.lora_rank={lora}"]
    keys += [f"data.max_prompt_tokens={prompt}", f"rollout.max_completion_tokens={args.completion}"]
    keys += [f"rollout.group_size={args.group_size}", f"model.max_positions={2 * prompt + args.completion}"]
    keys += [f"train.token_budget={prompt + args.group_size * args.completion}", f"optim.offload={args.offload}"]
    return load_config(args.config, [*keys, *args.overrides])


def learner_of(config: Config, world: World) -> Learner:
    torch.manual_seed(0)  # the same weights on every rank
    masters = config.model.dtype if config.model.lora_rank else "float32"
    model = random_model(replace(config, model=replace(config.model, dtype=masters)), world.device)
    if config.model.lora_rank:
        add_adapters(model, config.model, config.seed)
    policy = wrap(model, config, world)
    place(policy, decoder_layers(model), world, compute_dtype(config))
    return Learner(
        config, world, policy, None, build_optimizer(policy, config.optim), ModelDims.from_config(model.config)
    )


def measure(args: argparse.Namespace, prompt: int, lora: int, world: World) -> dict[str, Any]:
    """One row."""
    config = configure(args, prompt, lora)
    shape = Shape(prompt, args.completion, args.group_size, world.dp_size)
    learner = learner_of(config, world)
    dims, layers = learner.dims, layer_plan(config, learner.dims, world)
    plan = memory_plan(
        dims, recompute=layers.recompute, mlp_chunks=layers.mlp_chunks, **plan_sizes(config, dims, world, world.device)
    )
    prompts, completions = random_tokens(shape, learner.policy.model.config.vocab_size)
    groups = tokens_as_groups(prompts, [own[::-1] for own in completions] if args.reverse else completions)
    short = tokens_as_groups([prompt[:SHORT] for prompt in prompts], completions)
    for group, ids in zip(
        [*groups, *short], [*completions, *completions], strict=True
    ):  # of a completion, wherever it is
        for episode in group.episodes:
            for sample in episode.samples:
                place_of = ids.index(sample.token_ids) - (len(ids) - 1) / 2
                sample.advantages = [place_of] * len(sample.token_ids)
    row: dict[str, Any] = {"prompt": prompt, "completion": args.completion, "group_size": args.group_size}
    row |= {"ranks": world.size, "together": args.together, "lora_rank": lora, "offload": config.optim.offload}
    row |= {
        "layers": {mode: layers.recompute.count(mode) for mode in layers.recompute},
        "mlp_chunks": layers.mlp_chunks,
    }
    row |= {"planned_gib": plan.update, "planned_host_gib": plan.host}
    row |= gradients(args, learner, groups, world)
    seconds, metrics = [], {}
    try:
        update_policy(learner, Progress(), short)  # compiles
        for step in range(args.steps):
            if step == 0 and world.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            world.synchronize()
            started = time.perf_counter()
            metrics = update_policy(learner, Progress(), groups)
            world.synchronize()
            seconds.append(time.perf_counter() - started)
    except torch.OutOfMemoryError as error:
        return row | {"error": str(error).splitlines()[0]}
    median = statistics.median(seconds)
    flops = shape.groups * update_flops(
        dims, prompt, [args.completion] * args.group_size, adapters=adapter_parameters(config.model, dims)
    )
    row |= {"seconds": median, "within_limit": median <= args.limit_s, "grad_norm": metrics["grad_norm"]}
    row |= {"tokens_per_s": metrics["tokens/packed"] / median, "tflops_a_rank": flops / median / world.size / 1e12}
    if world.device.type == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        if rate := peak_flops(torch.cuda.get_device_name(world.device)):
            row["mfu"] = mfu(flops / world.size, median, rate)
    return row


def gradients(args: argparse.Namespace, learner: Learner, groups: list[Any], world: World) -> dict[str, float]:
    """Write or compare gradients of one backward: those of some matrices, of the first, a middle and the last layer."""
    if not (args.gradients or args.compare):
        return {}
    last = learner.dims.layers - 1
    own = groups if world.is_main else []
    counts = world.from_main(count(own))
    for batch in micro_batches(learner, own):
        backward(learner, batch, counts)
    found = {}
    for name, parameter in learner.policy.model.named_parameters():
        parts = name.split(".")
        layer = next((int(part) for part in parts if part.isdigit()), None)
        if (
            parameter.grad is not None
            and layer in (0, last // 2, last)
            and ("norm" in name or "k_proj" in name or "down_proj" in name)
        ):
            whole = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            found[name] = whole.float().cpu()
    learner.optimizer.zero_grad()
    if args.gradients and world.is_main:
        torch.save(found, args.gradients)
    if not args.compare:
        return {}
    wanted = torch.load(args.compare)
    error = sum((found[name] - g).square().sum().item() for name, g in wanted.items())
    return {"gradient_difference": (error / sum(g.square().sum().item() for g in wanted.values())) ** 0.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="qwen3_4b.yaml")
    parser.add_argument("--shape-of", required=True, help="folder with a config.json")
    parser.add_argument("--prompt", type=int, nargs="+", default=[131_072])
    parser.add_argument("--completion", type=int, default=1024)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--lora", type=int, nargs="+", default=[0], help="ranks of LoRA; 0 trains all weights")
    parser.add_argument("--together", type=int, default=1, help="model.sequence_parallel_size")
    parser.add_argument("--offload", choices=["none", "cpu"], default="none", help="optim.offload")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--limit-s", type=float, default=480.0, help="an update of more seconds is marked")
    parser.add_argument("--gradients", type=Path, metavar="FILE")
    parser.add_argument("--compare", type=Path, metavar="FILE")
    parser.add_argument("--reverse", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with start(None, args.together) as world:
        name = torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu"
        for lora in args.lora:
            for prompt in args.prompt:
                rows.append(measure(args, prompt, lora, world))
                if world.is_main or "error" in rows[-1]:
                    print(json.dumps(rows[-1]), flush=True)
                if args.json and world.is_main:  # after each, as a later one may not fit
                    report = {"device": name, "torch": torch.__version__, "rows": rows}
                    args.json.write_text(json.dumps(report, indent=1) + "\n")
                gc.collect()
                if world.device.type == "cuda":
                    torch.cuda.empty_cache()
                if "error" in rows[-1]:  # longer ones do not fit either
                    break


if __name__ == "__main__":
    main()
