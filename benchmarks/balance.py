"""Measures how evenly a step's work is divided among ranks, on simulated lengths with a long tail.

    python benchmarks/balance.py --json benchmarks/balance.json                # needs no GPU
    python benchmarks/balance.py --on-gpu --ranks 2 4 --steps 3 --json FILE

Lengths of prompts and completions are log-normal, cut off at the maximum (which a few completions in a hundred reach, as with a
reasoning model). Work is the quantity by which `pgrpo train` divides groups: the FLOPs of a group's forward and backward. Ranks
with sharded weights wait for each other in every micro-batch, so there are two figures: the busiest rank's work over the mean,
and the time of a step in which every micro-batch takes as long as that of the slowest rank, over the mean. ``--on-gpu`` adds the
same figures in seconds: forward and backward of each rank's micro-batches, one rank after the other on this GPU, with random
weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from pgrpo.admission.compare import tokens_as_samples
from pgrpo.commands.bench import random_model
from pgrpo.config import load_config
from pgrpo.distributed.world import World
from pgrpo.packing.balance import share_out
from pgrpo.packing.batch import build_batch
from pgrpo.packing.forest import Forest, Work
from pgrpo.placement.choices import compute_dtype
from pgrpo.planning.flops import ModelDims, forest_update_flops
from pgrpo.training.place import wrap
from pgrpo.types import Sample

ROOT = Path(__file__).resolve().parents[1]


def lengths(generator: torch.Generator, count: int, median: int, sigma: float, longest: int) -> list[int]:
    """Log-normal token counts from 1 to ``longest``."""
    drawn = torch.empty(count).log_normal_(generator=generator).log() * sigma  # standard normal, times sigma
    return (median * drawn.exp()).clamp(1, longest).int().tolist()


def draw(generator: torch.Generator, prompts: int, args: argparse.Namespace) -> list[Sample]:
    """Groups of tokens that mean nothing."""
    size = args.group_size
    prompt_lengths = lengths(generator, prompts, args.prompt, args.sigma, args.max_prompt)
    completion_lengths = lengths(generator, prompts * size, args.completion, args.sigma, args.max_completion)
    tokens = iter(range(1, 2**20))  # none is shared but the prompts'
    completions = [[[next(tokens)] * n for n in completion_lengths[i * size : (i + 1) * size]] for i in range(prompts)]
    return tokens_as_samples([[next(tokens)] * n for n in prompt_lengths], completions)


def seconds_on_gpu(args: argparse.Namespace) -> Callable[[Forest], float]:
    """Times a micro-batch's forward and backward, on random weights in bfloat16: the second of two, as the first may compile."""
    keys = [f"model.path={args.shape_of}", "model.activation_checkpointing=attention", "rollout.engine=embedded"]
    config = load_config("qwen3_4b.yaml", keys)
    world = World(0, 1, torch.device("cuda", 0))
    torch.manual_seed(0)
    policy = wrap(random_model(config.model, compute_dtype(config), world.device), config, world)

    def seconds(forest: Forest) -> float:
        taken = 0.0
        for _ in range(2):
            batch = build_batch(forest, device=world.device, attention=policy.attention)
            world.synchronize()
            started = time.perf_counter()
            policy(batch).logprobs.sum().backward()
            world.synchronize()
            taken = time.perf_counter() - started
        return taken

    return seconds


def measure(
    dims: ModelDims, ranks: int, args: argparse.Namespace, seconds: Callable[[Forest], float] | None
) -> dict[str, float]:
    """Means and the worst of ``args.steps`` steps, by FLOPs and, where ``seconds`` times a micro-batch, by the clock."""
    generator = torch.Generator().manual_seed(args.seed)

    def cost(each: Work) -> np.ndarray:
        return forest_update_flops(dims, each)

    def flops(forest: Forest) -> float:
        return int(forest_update_flops(dims, build_batch(forest).work).sum())

    kinds = {"": flops} | ({"seconds_": seconds} if seconds else {})
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for _ in range(args.steps):
        plan = share_out(draw(generator, ranks * args.prompts_per_rank, args), ranks, args.token_budget, cost)
        for kind, function in kinds.items():
            work = [[function(batch) for batch in batches] for batches in plan]
            loads = [sum(batches) for batches in work]
            mean = statistics.mean(loads)
            found[kind].append((max(loads) / mean, sum(map(max, zip(*work, strict=True))) / mean))
    row: dict[str, float] = {"ranks": ranks, "prompts_per_rank": args.prompts_per_rank}
    for kind, pairs in found.items():
        busiest, waited = zip(*pairs, strict=True)
        row |= {
            f"{kind}busiest_mean": statistics.mean(busiest),
            f"{kind}busiest_worst": max(busiest),
            f"{kind}step_mean": statistics.mean(waited),
            f"{kind}step_worst": max(waited),
        }
    return row


def main() -> None:
    """Print a row for each number of ranks, and write them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape-of", default=str(ROOT / "benchmarks" / "qwen3_4b"), help="folder of a config.json")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--prompts-per-rank", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--token-budget", type=int, default=16384)
    parser.add_argument("--prompt", type=int, default=1024, help="median length")
    parser.add_argument("--completion", type=int, default=1024, help="median length")
    parser.add_argument("--max-prompt", type=int, default=4096)
    parser.add_argument("--max-completion", type=int, default=8192)
    parser.add_argument("--sigma", type=float, default=1.0, help="of the logarithms of the lengths")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--on-gpu", action="store_true", help="also time the micro-batches, on this machine's GPU")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    dims = ModelDims.from_config(json.loads((Path(args.shape_of) / "config.json").read_text()))
    seconds = seconds_on_gpu(args) if args.on_gpu else None
    rows = []
    for ranks in args.ranks:
        rows.append(measure(dims, ranks, args, seconds))
        print(json.dumps(rows[-1]), flush=True)
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key not in ("json", "ranks", "shape_of")}
        device = {"device": torch.cuda.get_device_name()} if args.on_gpu else {}
        args.json.write_text(json.dumps({**device, "settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
