"""Run by every rank: read the checkpoint that other numbers of ranks wrote, compare with what it must hold, write it again.

Arguments: folder to read (or ""), folder to write, step, and how many ranks share the weights (or "").
"""

import sys
from pathlib import Path

import torch
from tensors import copy_full, full_tensor
from torch import nn

from pgrpo import checkpoint
from pgrpo.checkpoint.shards import shard_of, whole
from pgrpo.config import OptimConfig
from pgrpo.distributed.fsdp import place
from pgrpo.distributed.world import start
from pgrpo.process.exit import run_and_leave
from pgrpo.training.optim import build_optimizer, load_optimizer_shards, optimizer_shards

SHAPES = {"wide": (5, 3), "vector": (3,), "one": (1, 2), "long": (13,)}  # none divides by 2, 3 and 4


class Model(nn.Module):
    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))

    def forward(self):
        return sum(p.square().sum() for p in self.parameters())


def main():
    read, written, step = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    with start(int(sys.argv[4]) if sys.argv[4:] and sys.argv[4] else None) as world:
        want, model = Model(0), Model(1)
        place(model, [], world, torch.float32)
        optimizer = build_optimizer(model, OptimConfig())
        moments = {
            f"{name}.{m}": p.detach() * k
            for name, p in want.named_parameters()
            for m, k in (("exp_avg", 2), ("exp_avg_sq", 3))
        }
        if sys.argv[1]:
            with checkpoint.open_saved(read) as saved:
                assert {n: saved.shapes("model")[n] for n in SHAPES} == SHAPES
                for name, parameter in model.named_parameters():
                    shard = shard_of(parameter)
                    shard.tensor.copy_(saved.read("model", name, shard))
                load_optimizer_shards(
                    optimizer, model, saved.shapes("optimizer"), lambda n, s: saved.read("optimizer", n, s)
                )
        else:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    copy_full(parameter, dict(want.named_parameters())[name].detach())
                    state = optimizer.state[parameter]
                    state["step"] = torch.tensor(7.0)
                    for moment in ("exp_avg", "exp_avg_sq"):
                        state[moment] = torch.zeros_like(parameter)
                        copy_full(state[moment], moments[f"{name}.{moment}"])
        for name, parameter in model.named_parameters():
            here = full_tensor(parameter)
            assert torch.equal(here, dict(want.named_parameters())[name]), name
            assert optimizer.state[parameter]["step"].item() == 7
            for moment in ("exp_avg", "exp_avg_sq"):
                state = optimizer.state[parameter][moment]
                assert torch.equal(state.full_tensor() if world.size > 1 else state, moments[f"{name}.{moment}"])
        held = {
            "model": {name: shard_of(p) for name, p in model.named_parameters()},
            "optimizer": optimizer_shards(optimizer, model),
        }
        held = {s: {n: t for n, t in named.items() if t.is_written_by(world.rank)} for s, named in held.items()}
        writer = checkpoint.Writer(written, world, keep=9)
        writer.save(
            step, held | {f"rng_{world.rank}": {"seed": whole(torch.tensor([world.rank]))}}, {"ranks": world.size}
        )
        with torch.no_grad():
            for parameter in model.parameters():  # training goes on: the copy must not
                parameter.mul_(0)
        writer.wait()
        if world.rank == world.size - 1 and world.size > 1:
            files = sorted(f.name for f in (written / f"step_{step}").iterdir() if f.name.startswith("model."))
            assert files == [f"model.{rank}.safetensors" for rank in range(world.shards)], files


if __name__ == "__main__":
    run_and_leave(main)
