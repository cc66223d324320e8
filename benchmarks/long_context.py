"""Measures updates on one long group a share of data: time, memory and MFU of 1, 2, 4 ranks that compute it together.

    python benchmarks/long_context.py --shape-of benchmarks/qwen3_4b --offload cpu --prompt 131072 262144 --json FILE
    torchrun --nproc-per-node 4 benchmarks/long_context.py --shape-of benchmarks/qwen3_4b --together 4 --lora 0 16 --json FILE

Float32 masters, AdamW, random tokens and weights; needs the model's config.json only. All ranks together compute the same group
whatever ``--together`` is, so seconds of 1, 2 and 4 ranks compare. An update with a short prompt compiles, and a second one tells
how long the long one will take, unless a long one of the same kind of training was timed before, which tells more: if that is
more than ``--limit-s``, it is not begun. Then one long update is timed. MFU divides by the rate of a matrix product that is timed
before and after it.

Each row is written when it is known, also one that says why a length failed. One rank goes on after a length that does not fit,
at first with the plan that takes least memory. Of several ranks all stop, because they may have stopped at different collective
calls, and so does an update that outlasts its limit. ``--skip-done`` goes on behind the rows of the file, so that a loop tries all:

    for try in 1 2 3; do torchrun ... --json FILE --skip-done && break; done

``--gradients FILE`` writes gradients of one backward and measures nothing: ``benchmarks/long_gradients.py`` compares those of
several ways. The whole step with its rollout: ``benchmarks/full_step.py``.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import rows
import torch
from tables import SAME_WORK
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from pgrpo.admission.compare import tokens_as_groups
from pgrpo.commands.bench import _matmul_flops, random_model, random_tokens
from pgrpo.commands.bench_report import Shape
from pgrpo.config import Config, load_config
from pgrpo.distributed.world import World, start
from pgrpo.grpo import backward, update_policy
from pgrpo.placement.layers import layer_plan
from pgrpo.placement.sizes import plan_sizes
from pgrpo.planning.flops import GIB, ModelDims, active_adapters, mfu, peak_flops, update_flops
from pgrpo.planning.hub import load_hf_config
from pgrpo.planning.memory import memory_plan
from pgrpo.process.caches import use_caches
from pgrpo.training.build import Learner
from pgrpo.training.optim import build_optimizer
from pgrpo.training.place import place_policy
from pgrpo.training.progress import Progress
from pgrpo.training.update import count, micro_batches
from pgrpo.types import Group

LEAST_MEMORY = ("model.activation_checkpointing=offload", "model.mlp_chunks=16")
"""What is tried where the plan that ``auto`` made does not fit after all."""
BEGAN = time.perf_counter()
KEY = ("device", "ranks", "together", *SAME_WORK, "settings")
"""What a row is of: it was measured if a row has the same values."""


@dataclass
class Watch:
    """Seconds of each part of a row, shown as it ends. A part that outlasts its limit ends the process."""

    args: argparse.Namespace
    world: World
    row: dict[str, Any]

    def say(self, text: str) -> None:
        if self.world.is_main:
            print(f"[{time.perf_counter() - BEGAN:7.1f} s] {text}", flush=True)

    @contextmanager
    def part(self, name: str, limit_s: float) -> Iterator[None]:
        timer = threading.Timer(limit_s, self._late, (name, limit_s))
        timer.daemon = True
        timer.start()
        started = time.perf_counter()
        try:
            yield
            self.world.synchronize()
        finally:
            timer.cancel()
        taken = self.row.setdefault("parts_s", {})[name] = time.perf_counter() - started
        self.say(f"{name}: {taken:.2f} s{self._memory()}")

    def _memory(self) -> str:
        if self.world.device.type != "cuda":
            return ""
        return f", at most {torch.cuda.max_memory_allocated() / GIB:.1f} GiB so far"

    def _late(self, name: str, limit_s: float) -> None:
        """On every rank, in a thread: the first one writes, all leave."""
        if self.world.is_main:
            self.failed(f"{name} took more than {limit_s:g} s")
        else:
            time.sleep(2)
        os._exit(3)

    def failed(self, error: str) -> None:
        self.row["error"] = error
        print(self.row, flush=True)
        if self.args.json:
            rows.add(self.args.json, self.row)


def configure(args: argparse.Namespace, prompt: int, lora: int, world: World, more: tuple[str, ...] = ()) -> Config:
    keys = [f"model.path={args.shape_of}", f"model.sequence_parallel_size={args.together}", f"model.lora_rank={lora}"]
    keys += [f"data.max_prompt_tokens={prompt}", f"rollout.max_completion_tokens={args.completion}"]
    keys += [f"rollout.group_size={args.group_size}", f"model.max_positions={2 * prompt + args.completion}"]
    keys += [
        f"rollout.prompts_per_step={world.dp_size}"
    ]  # a step is one micro-batch: memory for kept prefixes is not planned
    keys += [f"train.token_budget={prompt + args.group_size * args.completion}", f"optim.offload={args.offload}"]
    return load_config(args.config, [*keys, *args.overrides, *more])


def few_layers(args: argparse.Namespace, config: Config, folder: str) -> None:
    """Write the shape with ``--layers`` layers to a folder."""
    hf_config: Any = copy.deepcopy(load_hf_config(config.model))
    hf_config.num_hidden_layers = args.layers
    if getattr(hf_config, "layer_types", None):
        hf_config.layer_types = hf_config.layer_types[: args.layers]
    hf_config.save_pretrained(folder)


def learner_of(args: argparse.Namespace, config: Config, world: World) -> Learner:
    torch.manual_seed(0)  # the same weights on every rank
    # Random numbers of a GPU are not those of a CPU, and gradients are compared with a CPU's.
    made_on = torch.device("cpu") if args.gradients else world.device
    policy = place_policy(config, world, partial(random_model, device=made_on))
    dims = ModelDims.from_config(policy.model.config)
    return Learner(config, world, policy, None, build_optimizer(policy, config.optim), dims)


def groups_of(args: argparse.Namespace, prompt: int, learner: Learner) -> list[Group]:
    """One group a share of data, with advantages that belong to the completions wherever they are."""
    shape = Shape(prompt, args.completion, args.group_size, learner.world.dp_size)
    prompts, completions = random_tokens(shape, learner.policy.model.config.vocab_size)
    groups = tokens_as_groups(prompts, [own[::-1] for own in completions] if args.reverse else completions)
    for group, ids in zip(groups, completions, strict=True):
        for episode in group.episodes:
            for sample in episode.samples:
                place_of = ids.index(sample.token_ids) - (len(ids) - 1) / 2
                sample.advantages = [place_of] * len(sample.token_ids)
    return groups


def work_of(args: argparse.Namespace, prompt: int, learner: Learner) -> float:
    """FLOPs of an update, those of recomputation not among them."""
    adapters = active_adapters(learner.config.model, learner.dims)
    one = update_flops(learner.dims, prompt, [args.completion] * args.group_size, adapters=adapters)
    return learner.world.dp_size * one


def measure(args: argparse.Namespace, config: Config, watch: Watch, paces: dict[int, float]) -> None:
    """One row. ``paces``: seconds a FLOP of the last long update, by the rank of LoRA, which this one adds to."""
    world, row, prompt = watch.world, watch.row, config.data.max_prompt_tokens
    with watch.part("model", args.start_limit_s):
        learner = learner_of(args, config, world)
    dims, layers = learner.dims, layer_plan(config, learner.dims, world)
    plan = memory_plan(dims, **layers._asdict(), **plan_sizes(config, dims, world, world.device))
    row["layers"] = {mode: layers.recompute.count(mode) for mode in layers.recompute}
    row |= {"mlp_chunks": layers.mlp_chunks, "stay_gathered": layers.stay_gathered}
    row |= {"planned_gib": plan.update, "planned_host_gib": plan.host}
    watch.say(f"plan: {row['layers']}, MLPs in {layers.mlp_chunks} parts, {plan.update:.1f} GiB")
    if args.gradients:
        write_gradients(args, learner, groups_of(args, prompt, learner), watch)
        return
    short = min(args.warm_up, prompt)
    groups = groups_of(args, short, learner)
    with watch.part("first short update, which compiles", args.start_limit_s):
        update_policy(learner, Progress(), groups)
    with watch.part("short update", args.start_limit_s):
        update_policy(learner, Progress(), groups)
    row |= {"short_prompt": short, "short_seconds": row["parts_s"]["short update"]}
    pace: float = paces.get(row["lora_rank"]) or row["short_seconds"] / work_of(args, short, learner)
    expected = world.from_main(pace * work_of(args, prompt, learner))
    watch.say(f"{expected:.0f} s are expected for {prompt} tokens")
    if expected > args.limit_s:
        row["error"] = f"not begun: {expected:.0f} s are expected, more than {args.limit_s:g}"
        return
    rate = _matmul_flops(world.device, config)
    with watch.part("long group", args.start_limit_s):
        groups = groups_of(args, prompt, learner)
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = compiled_graphs()
    with watch.part("long update", args.limit_s):
        metrics = update_policy(learner, Progress(), groups)
    seconds = row["parts_s"]["long update"]
    rate, flops = max(rate, _matmul_flops(world.device, config)), work_of(args, prompt, learner)
    paces[row["lora_rank"]] = seconds / flops
    row |= {"seconds": seconds, "grad_norm": metrics["grad_norm"], "compiled_in_it": compiled_graphs() - before}
    row |= {"tokens_per_s": metrics["tokens/packed"] / seconds, "tflops_a_rank": flops / seconds / world.size / 1e12}
    row |= {"matmul_tflops": rate / 1e12, "mfu": mfu(flops / world.size, seconds, rate)}
    if world.device.type == "cuda":
        peak = torch.tensor([torch.cuda.max_memory_allocated() / GIB], device=world.device)
        row["peak_gib"] = world.max(peak).item()  # the first rank may have no logits
        if data_sheet := peak_flops(torch.cuda.get_device_name(world.device)):
            row["mfu_of_data_sheet"] = mfu(flops / world.size, seconds, data_sheet)


def compiled_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def write_gradients(args: argparse.Namespace, learner: Learner, groups: list[Group], watch: Watch) -> None:
    """Write gradients of one backward: those of some matrices, of the first, a middle and the last layer."""
    world, last = watch.world, learner.dims.layers - 1
    own = groups if world.is_main else []
    counts = world.from_main(count(own))
    with watch.part("forward and backward", args.start_limit_s):
        for batch in micro_batches(learner, own):
            backward(learner, batch, counts)
    found = {}
    for name, parameter in learner.policy.model.named_parameters():
        layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
        wanted = any(part in name for part in ("norm", "q_proj", "k_proj", "down_proj"))
        if parameter.grad is not None and layer in (0, last // 2, last) and wanted:
            whole = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            found[name] = whole.float().cpu()
    if world.is_main:
        torch.save(found, args.gradients)


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(str(row.get(name)) for name in KEY)


def one_length(
    args: argparse.Namespace, prompt: int, lora: int, world: World, done: set[tuple[Any, ...]], paces: dict[int, float]
) -> None:
    """Rows of one length: with the plan that ``auto`` makes, and if that does not fit with the one that takes least memory."""
    for settings in ("auto", "least memory"):
        more = LEAST_MEMORY if settings != "auto" else ()
        row = {**rows.origin(args.commit), "together": args.together, "lora_rank": lora, "offload": args.offload}
        row |= {"shape": args.shape, "shape_layers": args.layers, "config": args.config, "overrides": args.overrides}
        row |= {"prompt": prompt, "completion": args.completion, "group_size": args.group_size, "settings": settings}
        key = key_of(row)
        if key in done:
            if (*key, "fits") in done:
                return
            continue
        watch = Watch(args, world, row)
        watch.say(f"{prompt} tokens and {args.group_size} x {args.completion}, LoRA {lora}, {settings}")
        try:
            measure(args, configure(args, prompt, lora, world, more), watch, paces)
        except torch.OutOfMemoryError as error:
            if world.size > 1:
                row["fits"] = False
                watch.failed(f"rank {world.rank}: {str(error).splitlines()[0]}")
                os._exit(3)
            row |= {"fits": False, "error": str(error).splitlines()[0]}
        gc.collect()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
        if world.is_main:
            print(row, flush=True)
            if args.json:
                rows.add(args.json, row)  # after each, as a later one may not end
        if row.get("fits", True):
            return


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="qwen3_4b.yaml")
    parser.add_argument("--shape-of", required=True, help="folder with a config.json")
    parser.add_argument("--layers", type=int, help="of the model, in the place of its own number")
    parser.add_argument("--prompt", type=int, nargs="+", default=[131_072])
    parser.add_argument("--warm-up", type=int, default=16_384, help="prompt of the updates that compile")
    parser.add_argument("--completion", type=int, default=1024)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--lora", type=int, nargs="+", default=[0], help="ranks of LoRA; 0 trains all weights")
    parser.add_argument("--together", type=int, default=1, help="model.sequence_parallel_size")
    parser.add_argument("--offload", choices=["none", "cpu"], default="none", help="optim.offload")
    parser.add_argument("--limit-s", type=float, default=480.0, help="for the long update")
    parser.add_argument("--start-limit-s", type=float, default=300.0, help="for each part before it")
    parser.add_argument("--gradients", type=Path, metavar="FILE", help="only write gradients of one backward")
    parser.add_argument(
        "--reverse", action="store_true", help="completions in another order, which changes rounding alone"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows are added to this file")
    parser.add_argument("--skip-done", action="store_true", help="lengths that FILE has times of, or that did not fit")
    parser.add_argument("--commit", help="for the rows, where there is no git")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    with start(None, args.together) as world:
        config = configure(args, args.prompt[0], args.lora[0], world)
        use_caches(config.cache_dir)
        args.shape = Path(args.shape_of).name
        if args.layers:
            folder = f"runs/{Path(args.shape_of).name}_{args.layers}_layers"
            world.together(lambda: few_layers(args, config, folder) if world.is_main else None)
            args.shape_of = folder
        done: set[tuple[Any, ...]] = set()
        for row in rows.read(args.json) if args.skip_done and args.json else ():
            if not row.get("fits", True):
                done.add(key_of(row))
            elif "seconds" in row:  # others took too long or were not begun, which another limit may change
                done |= {key_of(row), (*key_of(row), "fits")}
        done = world.from_main(done)
        paces: dict[int, float] = {}
        for lora in args.lora:
            for prompt in args.prompt:
                one_length(args, prompt, lora, world, done, paces)


if __name__ == "__main__":
    main()
