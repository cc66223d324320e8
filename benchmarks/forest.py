"""Times forests against less sharing, on random weights and tokens. Needs a GPU.

    python benchmarks/forest.py CASE ... [--shape-of benchmarks/qwen3_4b] [--repeats 5] [--json FILE]

Cases:

    beginning   32 prompts that share 4,096 tokens and have 512 of their own, 8 completions of 512 tokens each, budget 32,768: the
                forest against sharing by prompt alone
    branches    a prompt of 4,096 tokens and a conversation of 6 turns of 512 tokens that branches in two at every turn, budget
                73,728: the forest against a packed row of its own for every path


An update is a forward and a backward of all micro-batches; there is no optimizer. Both ways run in turn, ``--repeats`` times, after
two runs of each that compile; times are medians by device events. Prints for each case rows, FLOPs and their ratio, seconds and
their ratio, and MFU against a matrix product timed in the same run. The rows are written after each case.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pgrpo.commands.bench import _matmul_flops, _milliseconds, random_model
from pgrpo.config import Config, load_config
from pgrpo.distributed.world import World
from pgrpo.model.policy import Policy
from pgrpo.packing.balance import share_out
from pgrpo.packing.batch import GroupedBatch, build_batch
from pgrpo.packing.forest import Each
from pgrpo.planning.flops import GIB, ModelDims, forest_update_flops
from pgrpo.training.place import wrap
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


CASES = {"beginning": beginning, "branches": branches}


def by_prompt_alone(policy: Policy, samples: Sequence[Sample], budget: int, dims: ModelDims) -> list[GroupedBatch]:
    """Micro-batches in which prompts share nothing with each other: their first tokens are made to differ."""
    numbers: dict[int, int] = {}
    apart = []
    for s in samples:
        number = numbers.setdefault(id(s.prompt_ids), len(numbers))
        apart.append(replace(s, prompt_ids=[number, *s.prompt_ids[1:]]))
    return micro_batches(policy, apart, budget, dims)


def micro_batches(
    policy: Policy, samples: Sequence[Sample], budget: int, dims: ModelDims, *, is_shared: bool = True
) -> list[GroupedBatch]:
    def cost(each: Each) -> np.ndarray:
        return forest_update_flops(dims, each)

    (plan,) = share_out(samples, 1, budget, cost, policy.attention, is_shared=is_shared)
    return [build_batch(forest, device=policy.device, attention=policy.attention) for forest in plan]


def update(policy: Policy, batches: Sequence[GroupedBatch]) -> None:
    for batch in batches:
        policy(batch).logprobs.sum().backward()
    policy.zero_grad(set_to_none=True)


def measure(case: str, policy: Policy, config: Config, args: argparse.Namespace) -> dict[str, Any]:
    rnd = random.Random(0)
    vocabulary = policy.model.config.vocab_size
    samples, budget = CASES[case](lambda n: [rnd.randrange(64, vocabulary) for _ in range(n)], args.scale)
    dims = ModelDims.from_config(policy.model.config)
    if case == "branches":
        other = micro_batches(policy, samples, budget, dims, is_shared=False)
    else:
        other = by_prompt_alone(policy, samples, budget, dims)
    ways = {"forest": micro_batches(policy, samples, budget, dims), "less shared": other}
    for batches in ways.values():
        for _ in range(2):
            update(policy, batches)
    rate = _matmul_flops(policy.device, config)
    times: dict[str, list[float]] = {way: [] for way in ways}
    peaks: dict[str, float] = {}
    for _ in range(args.repeats):
        for way, batches in ways.items():
            torch.cuda.reset_peak_memory_stats()
            times[way].append(_milliseconds(lambda batches=batches: update(policy, batches), policy.device) / 1e3)
            peaks[way] = torch.cuda.max_memory_allocated() / GIB
    rate = max(rate, _matmul_flops(policy.device, config))
    row: dict[str, Any] = {"case": case, "budget": budget, "matmul_tflops": rate / 1e12, "repeats": args.repeats}
    for way, batches in ways.items():
        flops, seconds = sum(forest_update_flops(dims, b.work) for b in batches), statistics.median(times[way])
        print(
            f"{case}, {way}: {len(batches)} micro-batches of {sum(b.packed_tokens for b in batches)} rows in all, "
            f"{[len(b.layout.passes(None).unpack()) for b in batches]} passes, {seconds:.3f} s, {peaks[way]:.1f} GiB, "
            f"MFU {flops / seconds / rate:.2f}",
            flush=True,
        )
        row[way] = {
            "rows": sum(b.packed_tokens for b in batches), "micro_batches": len(batches), "flops": flops, "seconds": seconds,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=list(CASES), metavar="CASE")
    parser.add_argument("--shape-of", default="benchmarks/qwen3_4b")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    keys = [f"model.path={args.shape_of}", "model.activation_checkpointing=attention", "rollout.engine=embedded"]
    config = load_config("qwen3_4b.yaml", keys)
    world = World(0, 1, torch.device("cuda", 0))
    torch.manual_seed(0)
    policy = wrap(random_model(config, world.device), config, world)
    rows = []
    for case in args.cases:
        rows.append(measure(case, policy, config, args))
        if args.json:
            args.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
