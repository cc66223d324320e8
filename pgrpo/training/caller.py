"""What a Python caller passes beside the config, and the callbacks by which it follows a run and stops it.

Nothing heavy is imported, so that ``pgrpo.Callback`` costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgrpo.config import Config, ConfigError

if TYPE_CHECKING:
    from pgrpo.model.policy import Policy
    from pgrpo.types import Group


@dataclass(frozen=True)
class Given:
    """Objects from Python.

    Attributes:
        rewards: functions beside those of the config.
        dataset: rows instead of ``data.path``; None reads that.
        eval_dataset: held-out rows instead of ``data.eval_path`` and ``data.eval_split``; None reads those.
        callbacks: see ``Callback``.
        tools: functions that the model may call, beside those of the config.
        environment: a class of environments or a mapping of names to classes, instead of ``environment.factory``.
    """

    rewards: Sequence[Callable[..., Any]] = ()
    dataset: Iterable[Mapping[str, Any]] | None = None
    eval_dataset: Iterable[Mapping[str, Any]] | None = None
    callbacks: Sequence[Callback] = ()
    tools: Sequence[Callable[..., Any]] = ()
    environment: Any = None


@dataclass
class Run:
    """A run as callbacks see it; to be read only, but for ``stop``.

    Attributes:
        policy: the model that is trained, ``policy.model`` of transformers; with several ranks each holds its shards.
        is_main: whether this is rank 0, which alone has ``groups`` and writes files.
        step: number of finished steps.
        metrics: of the step in ``on_step_end``, of the evaluation in ``on_evaluate``.
        groups: the prompts of the last step with their episodes, rewards and advantages.
    """

    config: Config
    run_dir: Path
    policy: Policy
    is_main: bool
    step: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    groups: Sequence[Group] = ()
    is_stopping: bool = False

    def stop(self) -> None:
        """End the run: no further step begins, and the last one is saved. Any rank may ask for it."""
        self.is_stopping = True


class Callback:
    """Subclass it and override what you need; every rank calls it. An error in it ends the run, with a save. A tracker of your own
    is a callback. A callback has no state in a checkpoint."""

    def on_step_begin(self, run: Run) -> None:
        """Before the rollout of step ``run.step + 1``."""

    def on_step_end(self, run: Run) -> None:
        """After the update of step ``run.step``."""

    def on_evaluate(self, run: Run) -> None:
        """After an evaluation; after that of the untrained model ``run.step`` is 0."""

    def on_save(self, run: Run) -> None:
        """A checkpoint of step ``run.step`` is being written, in the background."""


EVENTS = [name for name in vars(Callback) if name.startswith("on_")]


def check_callbacks(callbacks: Sequence[Any]) -> None:
    """Refuse what is not a ``Callback``, and methods that nothing would call (``ConfigError``)."""
    for i, callback in enumerate(callbacks):
        if not isinstance(callback, Callback):
            raise ConfigError(
                f"callbacks[{i}]: {callback!r:.80} is not a pgrpo.Callback; subclass it, and pass an instance"
            )
        if unknown := [name for name in dir(callback) if name.startswith("on_") and name not in EVENTS]:
            raise ConfigError(
                f"callbacks[{i}]: nothing calls {type(callback).__name__}.{unknown[0]}; there are {', '.join(EVENTS)}"
            )
