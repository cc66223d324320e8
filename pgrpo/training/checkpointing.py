"""What a checkpoint of a run holds, and how it is put back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pgrpo import checkpoint
from pgrpo.checkpoint import CheckpointError, Saved
from pgrpo.config import ConfigError, to_yaml
from pgrpo.distributed import fsdp
from pgrpo.distributed.shards import Shard, shard_of, whole
from pgrpo.distributed.world import World
from pgrpo.model.policy import Policy
from pgrpo.process.rng import rng_state, set_rng_state
from pgrpo.training.optim import load_optimizer_shards, optimizer_shards

if TYPE_CHECKING:
    from pgrpo.training.run import Run

log = logging.getLogger(__name__)


def shards_of(run: Run) -> dict[str, dict[str, Shard]]:
    """What this rank writes: its part of the weights and moments (what several have, the first writes), and its generators."""
    fsdp.reshard(run.policy)  # the last forward may have been an evaluation's
    model = {name: shard_of(parameter) for name, parameter in _trained(run.policy).items()}
    moments = optimizer_shards(run.updater.optimizer, run.policy.model)
    sets = {"model": model, "optimizer": moments}
    if reference := _refreshed_reference(run):
        fsdp.reshard(reference)
        sets["reference"] = {name: shard_of(parameter) for name, parameter in reference.model.named_parameters()}
    mine = {
        set_name: {n: s for n, s in shards.items() if s.is_written_by(run.world.rank)}
        for set_name, shards in sets.items()
    }
    generators = {name: whole(state) for name, state in rng_state().items()}
    return mine | {f"rng_{run.world.rank}": generators}


def scalars_of(run: Run, tracker_state: Mapping[str, Any]) -> dict[str, Any]:
    """The rest of a checkpoint, as JSON types."""
    return {
        "step": run.step,
        "recent_rewards": [repr(reward) for reward in run.recent_rewards],  # as text: JSON has no nan
        "stream": run.stream.state_dict(),
        "trackers": dict(tracker_state),
        "config": to_yaml(run.config),
        "world_size": run.world.size,
        "best": run.best,
        "skipped_in_row": run.updater.skipped_in_row,
        "unlogged": run.unlogged and {name: repr(float(value)) for name, value in run.unlogged.items()},
    }


def find(root: Path, resume: str | Path, world: World) -> Path | None:
    """The checkpoint that ``resume`` means, verified; rank 0 reads it, all ranks get its answer. None: there is none.

    Raises:
        ConfigError, CheckpointError: a named one does not exist, or is broken; ``RankFailed`` on the other ranks.
    """

    def verified() -> Path | None:
        found = checkpoint.latest(root) if resume in ("auto", "best") else Path(resume)
        if found and resume == "best":
            found = _best(found)
        if found and resume != "auto":
            checkpoint.open_saved(found).__exit__()
        return found

    # Reading a large one takes minutes, which ranks may wait for here, and not in a collective call of NCCL's.
    return world.from_main(world.together(lambda: verified() if world.is_main else None))


def _best(newest: Path) -> Path:
    with checkpoint.open_saved(newest, verified=True) as saved:
        best = saved.scalars["best"]
    if best is None:
        raise ConfigError(f"best: {newest} knows of no best checkpoint; train with checkpoint.keep_best=eval/reward")
    return newest.with_name(f"step_{best['step']}")


def put_back(run: Run, path: Path) -> dict[str, Any]:
    """Read a verified checkpoint, each rank what it holds, and return the scalars.

    Raises:
        CheckpointError: it is of another model, or of other adapters.
    """
    with checkpoint.open_saved(path, verified=True) as saved:
        _load_parameters("model", _trained(run.policy), saved)
        if reference := _refreshed_reference(run):
            _load_parameters("reference", dict(reference.model.named_parameters()), saved)
        names = saved.shapes("optimizer")
        optimizer, model = run.updater.optimizer, run.policy.model
        load_optimizer_shards(optimizer, model, names, lambda name, like: saved.read("optimizer", name, like))
        scalars = saved.scalars
        run.stream.load_state_dict(scalars["stream"])
        run.step, run.best = scalars["step"], scalars["best"]
        run.recent_rewards = [float(reward) for reward in scalars["recent_rewards"]]
        run.updater.skipped_in_row = scalars["skipped_in_row"]
        unlogged = scalars["unlogged"]
        run.unlogged = None if unlogged is None else {name: float(value) for name, value in unlogged.items()}
        # Last: nothing above may draw from what this puts back.
        if scalars["world_size"] == run.world.size:
            own = f"rng_{run.world.rank}"
            set_rng_state({name: saved.read(own, name) for name in saved.shapes(own)})
    if run.world.is_main:
        _report(run, path, scalars)
    run.world.barrier()
    return scalars


def put_back_weights(run: Run, path: Path) -> None:
    """Read what a verified checkpoint trained, each rank what it holds, and the step. Nothing else of the run changes.

    Raises:
        CheckpointError: it is of another model, or of other adapters.
    """
    with checkpoint.open_saved(path, verified=True) as saved:
        _load_parameters("model", _trained(run.policy), saved)
        run.step = saved.scalars["step"]
    run.world.barrier()


def _report(run: Run, path: Path, scalars: Mapping[str, Any]) -> None:
    log.warning("going on from %s: %d of %d steps done", path, run.step, run.config.train.steps)
    if scalars["world_size"] != run.world.size:
        log.warning("saved on %d ranks, going on with %d", scalars["world_size"], run.world.size)
    before, now = scalars["config"].splitlines(), to_yaml(run.config).splitlines()
    for line in sorted(set(now) - set(before)):
        log.warning("config differs from the checkpoint's: now %s", line.strip())


def _refreshed_reference(run: Run) -> Policy | None:
    """The reference model where its weights are no longer the initial ones."""
    reference = run.updater.reference
    return reference if run.config.loss.ref_refresh_every and isinstance(reference, Policy) else None


def _load_parameters(set_name: str, parameters: Mapping[str, torch.nn.Parameter], saved: Saved) -> None:
    shapes = saved.shapes(set_name)
    if differing := sorted(parameters.keys() ^ shapes.keys()):
        raise CheckpointError(
            f"the checkpoint is of another model, or of other model.lora_* keys: {differing[:3]} are not in both"
        )
    for name, parameter in parameters.items():
        shard = shard_of(parameter)
        if shapes[name] != shard.shape:
            raise CheckpointError(
                f"the checkpoint is of another model, or of another model.lora_rank: {name} is "
                f"{list(shapes[name])} there, {list(shard.shape)} here"
            )
        shard.tensor.copy_(saved.read(set_name, name, shard))


def _trained(policy: Policy) -> dict[str, torch.nn.Parameter]:
    """What a checkpoint holds: with LoRA the adapters only."""
    return {name: parameter for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
