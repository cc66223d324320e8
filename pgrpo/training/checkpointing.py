"""Checkpoints of a run: their content, saving and restoring."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from pgrpo import checkpoint
from pgrpo.checkpoint import COUNT, CheckpointError, Saved
from pgrpo.checkpoint.shards import Shard, shard_of, whole
from pgrpo.config import ConfigError, to_yaml
from pgrpo.config.rules import leaves
from pgrpo.data import PromptStream
from pgrpo.distributed import fsdp
from pgrpo.distributed.world import World
from pgrpo.model.policy import Policy
from pgrpo.process.rng import rng_state, set_rng_state
from pgrpo.training.build import Learner
from pgrpo.training.optim import load_optimizer_shards, optimizer_shards
from pgrpo.training.progress import Progress

log = logging.getLogger(__name__)

FORM = {
    "step": COUNT,
    "recent_rewards": [str],
    "best": ({"step": COUNT, "value": float},),
    "unlogged": ({str: str},),
    "skipped_in_row": COUNT,
    "stream": {"epoch": COUNT, "offset": COUNT},
    "trackers": {"step": int, "wandb_id": (str,)},
    "config": str,
    "world_size": COUNT,
}
"""Form of a checkpoint's scalars, for ``checkpoint.check``."""


class Checkpoints:
    """Writes a run's checkpoints to ``root``, and restores one of them or another run's.

    A checkpoint holds trained weights, moments, a refreshed reference, the random generators of every rank, the position in the
    data, and ``progress``. ``resumed`` is the line of the run's log that says which checkpoint ``restore`` read.
    """

    def __init__(self, root: Path, learner: Learner, stream: PromptStream, progress: Progress) -> None:
        self._root, self._config, self._world = root, learner.config, learner.world
        self._policy, self._optimizer = learner.policy, learner.optimizer
        self._stream, self._progress = stream, progress
        # A reference that is never refreshed is not saved: it has the initial weights.
        self._reference: Policy | None = None
        if learner.config.loss.ref_refresh_every and learner.reference is not learner.policy:
            self._reference = learner.reference
        self._writer: checkpoint.Writer | None = None
        self._saved = -1
        self.resumed = ""

    def save(self, tracker_state: Mapping[str, Any]) -> bool:
        """Wait for the previous checkpoint, then start to write ``step_N`` in the background. Each rank writes its shards; a
        collective call. A second call at the same step writes again only if the first had metrics that were not yet logged; returns
        whether this one writes.

        Raises:
            CheckpointError: the previous checkpoint could not be written.
        """
        progress = self._progress
        if self._saved == progress.step:
            return False
        spare = [progress.best["step"]] if progress.best else []
        self._opened().save(progress.step, self._shards(), self._scalars(tracker_state), spare)
        self._saved = progress.step if progress.unlogged is None else -1
        return True

    def reserve(self) -> None:
        """Allocate host memory for the first save in the background. Call it after an update, which makes the moments."""
        if self._writer is None:
            self._opened().reserve(self._shards())

    def wait(self) -> None:
        """Wait until the checkpoint is on the disk. CheckpointError: it could not be written."""
        if self._writer is not None:
            self._writer.wait()

    @property
    def failed(self) -> bool:
        """Whether ``wait`` will raise, as far as this rank knows."""
        return self._writer is not None and self._writer.failed

    def restore(self, resume: str | Path | None) -> dict[str, Any] | None:
        """Resume from a checkpoint, named as for ``find``. Each rank reads its shards. Returns the trackers' state; None if there
        is nothing to resume.

        Raises:
            ConfigError, CheckpointError: there is no such checkpoint, it is broken, or of another model, adapters or data.
        """
        path = resume and find(resume, self._root, self._world)
        if not path:
            return None
        progress, is_own = self._progress, path.parent.resolve() == self._root.resolve()
        with checkpoint.open_saved(path, verified=True) as saved:
            scalars = saved.scalars
            checkpoint.check(scalars, FORM, path)
            _load_parameters("model", _trained(self._policy), saved)
            if self._reference:
                _load_parameters("reference", dict(self._reference.model.named_parameters()), saved)
            names = saved.shapes("optimizer")
            load_optimizer_shards(
                self._optimizer, self._policy.model, names, lambda name, like: saved.read("optimizer", name, like)
            )
            # A new run may train another run's weights on other data, where the saved position has no meaning.
            if not is_own and (difference := self._stream.difference(scalars["stream"])):
                log.warning("%s: training starts with the first prompt", difference)
            else:
                self._stream.load_state_dict(scalars["stream"])
            try:
                progress.load_state_dict(scalars)
                changes = list(_changes(scalars["config"], to_yaml(self._config)))
                # Last, as nothing may draw random numbers after this.
                if scalars["world_size"] == self._world.size:
                    own = f"rng_{self._world.rank}"
                    set_rng_state({name: saved.read(own, name) for name in saved.shapes(own)})
            except (ValueError, KeyError, TypeError, RuntimeError, yaml.YAMLError) as error:
                raise CheckpointError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
        if self._world.is_main:
            self._report(path, scalars["world_size"], changes)
        self._world.barrier()
        trackers = scalars["trackers"]
        if not is_own:  # a new run from another run's weights has its own wandb run and its own best
            trackers, progress.best = trackers | {"wandb_id": None}, None
        self._saved = progress.step if progress.unlogged is None and is_own else -1
        return trackers

    def load_weights(self, path: Path) -> None:
        """Load only the trained weights and the step of a checkpoint, which ``find`` has verified.

        Raises:
            CheckpointError: as ``restore``.
        """
        with checkpoint.open_saved(path, verified=True) as saved:
            _load_parameters("model", _trained(self._policy), saved)
            checkpoint.check(saved.scalars, {"step": COUNT}, path)
            self._progress.step = saved.scalars["step"]
        self._world.barrier()

    def _opened(self) -> checkpoint.Writer:
        """The writer. The first call builds it and is collective."""
        if self._writer is None:
            self._writer = checkpoint.Writer(self._root, self._world, self._config.checkpoint.keep)
        return self._writer

    def _shards(self) -> dict[str, dict[str, Shard]]:
        """The shards that this rank writes: of weights and moments, and its generators. Of equal shards only one rank writes."""
        fsdp.reshard(self._policy)  # a failed step may have left them gathered
        model = {name: shard_of(parameter) for name, parameter in _trained(self._policy).items()}
        sets = {"model": model, "optimizer": optimizer_shards(self._optimizer, self._policy.model)}
        if self._reference:
            fsdp.reshard(self._reference)
            sets["reference"] = {name: shard_of(p) for name, p in self._reference.model.named_parameters()}
        mine = {
            set_name: {n: s for n, s in shards.items() if s.is_written_by(self._world.rank)}
            for set_name, shards in sets.items()
        }
        return mine | {f"rng_{self._world.rank}": {name: whole(state) for name, state in rng_state().items()}}

    def _scalars(self, tracker_state: Mapping[str, Any]) -> dict[str, Any]:
        """Everything in a checkpoint but tensors, as JSON types."""
        return {
            **self._progress.state_dict(),
            "stream": self._stream.state_dict(),
            "trackers": dict(tracker_state),
            "config": to_yaml(self._config),
            "world_size": self._world.size,
        }

    def _report(self, path: Path, saved_ranks: int, changes: list[str]) -> None:
        self.resumed = f"resuming from {path}: {self._progress.step} of {self._config.train.steps} steps done"
        if saved_ranks != self._world.size:
            log.warning("saved on %d ranks, resuming on %d", saved_ranks, self._world.size)
        for change in changes:
            log.warning("config differs from the checkpoint's: %s", change)


def find(name: str | Path, root: Path, world: World) -> Path | None:
    """The path of the checkpoint ``name``, verified by rank 0; None if ``root``, the run's own checkpoints, has none.

    Args:
        name: ``auto``, ``best``, a checkpoint's folder, or the folder of a run or of its checkpoints: the newest there.

    Raises:
        ConfigError, CheckpointError: it does not exist or is broken; ``RankFailed`` on the other ranks.
    """

    def verified() -> Path | None:
        if name == "auto":
            return checkpoint.latest(root)
        if name == "best":
            newest = checkpoint.latest(root)
            found = newest and _best(newest)
        elif (folder := _checkpoints_in(Path(name).expanduser().resolve())) is not None:
            if (newest := checkpoint.latest(folder)) is None:
                raise CheckpointError(f"{folder}: all checkpoints there are broken")
            return newest
        else:
            found = Path(name).expanduser().resolve()
        if found:
            checkpoint.open_saved(found).__exit__()
        return found

    # Verifying can take minutes, more than the timeout of NCCL: the other ranks wait in a gloo call.
    return world.from_main(world.together(lambda: verified() if world.is_main else None))


def _checkpoints_in(path: Path) -> Path | None:
    """The folder of checkpoints that a run's folder has, or that ``path`` is."""
    return next((folder for folder in (path / "checkpoints", path) if checkpoint.list_steps(folder)), None)


def _best(newest: Path) -> Path:
    with checkpoint.open_saved(newest, verified=True) as saved:
        checkpoint.check(saved.scalars, {"best": FORM["best"]}, newest)
        best = saved.scalars["best"]
    if best is None:
        raise ConfigError(f"best: {newest} has no best checkpoint; train with checkpoint.keep_best=eval/reward")
    return newest.with_name(f"step_{best['step']}")


def _changes(before: str, now: str) -> Iterator[str]:
    """``optim.lr: 0.0005 -> 0.0001`` for each key that differs between two configs as ``to_yaml`` writes them."""
    saved, own = (yaml.safe_load(text) for text in (before, now))
    if not isinstance(saved, dict):
        raise ValueError("its config is not a mapping")
    old, new = ({key: json.dumps(value, default=str) for key, value in leaves(keys)} for keys in (saved, own))
    for key in {**new, **old}:
        if old.get(key) != new.get(key):
            yield f"{key}: {old.get(key, '(not set)')} -> {new.get(key, '(not set)')}"


def _load_parameters(set_name: str, parameters: Mapping[str, torch.nn.Parameter], saved: Saved) -> None:
    shapes = saved.shapes(set_name)
    if differing := sorted(parameters.keys() ^ shapes.keys()):
        raise CheckpointError(
            f"{saved.path}: is of another model, or of other model.lora_* keys: {differing[:3]} are in one of the two only; "
            f"{_model_of(saved)}"
        )
    for name, parameter in parameters.items():
        shard = shard_of(parameter)
        if shapes[name] != shard.shape:
            raise CheckpointError(
                f"{saved.path}: is of another model, or of another model.lora_rank: {name} is "
                f"{list(shapes[name])} in the checkpoint, {list(shard.shape)} here; {_model_of(saved)}"
            )
        shard.tensor.copy_(saved.read(set_name, name, shard))


def _model_of(saved: Saved) -> str:
    """What to set, from the config that a checkpoint has in it."""
    always, others = ("path", "lora_rank"), ("lora_targets", "load_vision", "train_vision", "train_projector")
    try:
        model = yaml.safe_load(saved.scalars["config"])["model"]
        # Without spaces, so that a shell takes them.
        values = {key: json.dumps(model[key], separators=(",", ":")) for key in (*always, *others)}
        its = [f"model.{key}={value}" for key, value in values.items() if model[key] or key in always]
    except (KeyError, TypeError, yaml.YAMLError):
        its = [f"model.{key}" for key in (*always, *others)]
    return f"set what its run had: {', '.join(its)}"


def _trained(policy: Policy) -> dict[str, torch.nn.Parameter]:
    """The parameters that a checkpoint holds: with LoRA the adapters only."""
    return {name: parameter for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
