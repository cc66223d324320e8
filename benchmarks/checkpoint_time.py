"""Measures how long training waits for a checkpoint: written in the background (as in a run), and written while training waits.

    python benchmarks/checkpoint_time.py [--config smollm2_135m] [--saves 4] [--out FOLDER] [key=value ...]

Builds the config's model with AdamW, does one update so that there are moments, and saves both ways in turn. In the background: the
seconds until ``save`` returns, that is the copy to host memory (which is reserved ahead, as a run does after its first step).
Waiting: the seconds until a checkpoint is on the disk with its checksums and its name, without a copy.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from pgrpo.checkpoint import Writer, save
from pgrpo.checkpoint.shards import shard_of
from pgrpo.config import load_config
from pgrpo.distributed.world import start
from pgrpo.training.optim import build_optimizer, optimizer_shards
from pgrpo.training.place import place_policy


def main() -> None:
    """Print both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="smollm2_135m")
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--out", type=Path, help="a folder on the disk to be timed; removed at the end")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    root = arguments.out or Path(tempfile.mkdtemp(prefix="checkpoint_time-"))
    with start(config.model.fsdp_size, config.model.sequence_parallel_size) as world:
        policy = place_policy(config, world)
        optimizer = build_optimizer(policy, config.optim)
        for parameter in policy.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        sets = {
            "model": {name: shard_of(p) for name, p in policy.model.named_parameters()},
            "optimizer": optimizer_shards(optimizer, policy.model),
        }
        size = sum(shard.bytes for named in sets.values() for shard in named.values())
        writer, blocked, waited = Writer(root, world, keep=1), [], []
        writer.reserve(sets)
        writer.wait()
        try:
            for step in range(arguments.saves):
                world.synchronize()
                began = time.perf_counter()
                writer.save(2 * step, sets, {"step": step})
                blocked.append(time.perf_counter() - began)
                writer.wait()
                began = time.perf_counter()
                save(
                    root,
                    2 * step + 1,
                    {name: {n: s.tensor for n, s in named.items()} for name, named in sets.items()},
                    {},
                )
                waited.append(time.perf_counter() - began)
        finally:
            shutil.rmtree(root, ignore_errors=True)
    async_s, sync_s = statistics.median(blocked), statistics.median(waited)
    print(f"{config.model.path}: {size / 1e9:.2f} GB with optimizer, on {world.device.type}")
    print(f"in the background: training waits {async_s:.3f} s (the first time {blocked[0]:.3f} s)")
    print(f"written while training waits: {sync_s:.3f} s")
    print(f"ratio {async_s / sync_s:.3f}")


if __name__ == "__main__":
    main()
