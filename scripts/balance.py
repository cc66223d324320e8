"""How evenly a step's work is shared out among ranks, on simulated lengths with a long tail; no GPU needed.

    python scripts/balance.py --json benchmarks/balance.json

Prompts and completions are log-normal, cut off at the maximum (a few completions per hundred run into it, as those of a
reasoning model do). Work is what `pgrpo train` shares out by: the FLOPs of a group's forward and backward. Ranks that hold
sharded weights wait for each other in every micro-batch, so two figures count: the busiest rank's work over the mean, and
the time of a step in which every micro-batch takes as long as that of the slowest rank, over the mean.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

from pgrpo.distributed import share_out
from pgrpo.exactness import tokens_as_groups
from pgrpo.flops import ModelDims, update_flops
from pgrpo.types import Group

ROOT = Path(__file__).resolve().parents[1]


def lengths(generator: torch.Generator, count: int, median: int, sigma: float, longest: int) -> list[int]:
    """Log-normal token counts from 1 to ``longest``."""
    drawn = torch.empty(count).log_normal_(generator=generator).log() * sigma  # standard normal, times sigma
    return (median * drawn.exp()).clamp(1, longest).int().tolist()


def draw(generator: torch.Generator, prompts: int, args: argparse.Namespace) -> list[Group]:
    """Groups of tokens that mean nothing."""
    size = args.group_size
    prompt_lengths = lengths(generator, prompts, args.prompt, args.sigma, args.max_prompt)
    completion_lengths = lengths(generator, prompts * size, args.completion, args.sigma, args.max_completion)
    completions = [[[0] * n for n in completion_lengths[i * size : (i + 1) * size]] for i in range(prompts)]
    return tokens_as_groups([[0] * n for n in prompt_lengths], completions)


def measure(dims: ModelDims, ranks: int, args: argparse.Namespace) -> dict[str, float]:
    """Means and the worst of ``args.steps`` steps."""
    generator = torch.Generator().manual_seed(args.seed)

    def cost(group: Group) -> float:
        return update_flops(dims, len(group.prompt.token_ids), [len(c.token_ids) for c in group.completions])

    busiest, waited = [], []
    for _ in range(args.steps):
        groups = draw(generator, ranks * args.prompts_per_rank, args)
        plan = share_out(groups, ranks, args.token_budget, cost)
        work = [[sum(map(cost, batch)) for batch in batches] for batches in plan]
        loads = [sum(batches) for batches in work]
        busiest.append(max(loads) / statistics.mean(loads))
        waited.append(sum(map(max, zip(*work, strict=True))) / statistics.mean(loads))
    return {
        "ranks": ranks,
        "prompts_per_rank": args.prompts_per_rank,
        "busiest_mean": statistics.mean(busiest),
        "busiest_worst": max(busiest),
        "step_mean": statistics.mean(waited),
        "step_worst": max(waited),
    }


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
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    dims = ModelDims.from_config(json.loads((Path(args.shape_of) / "config.json").read_text()))
    rows = []
    for ranks in args.ranks:
        rows.append(measure(dims, ranks, args))
        print(json.dumps(rows[-1]), flush=True)
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key not in ("json", "ranks", "shape_of")}
        args.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
