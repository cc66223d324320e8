"""How far a run has come: what changes from step to step beside weights, moments, data position and random numbers."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """Saved in every checkpoint.

    Attributes:
        step: steps that are done.
        recent_rewards: mean rewards of the last of them.
        best: step and value of the best evaluation so far, by ``checkpoint.keep_best``.
        unlogged: metrics of ``step``, as long as they wait for an evaluation.
        skipped_in_row: updates that were skipped since the last one that was not.
        has_moved: whether an update has begun to change weights since the last finished step. Not saved.
    """

    step: int = 0
    recent_rewards: list[float] = field(default_factory=list)
    best: dict[str, Any] | None = None
    unlogged: dict[str, float] | None = None
    skipped_in_row: int = 0
    has_moved: bool = False

    def is_best(self, name: str | None, metrics: Mapping[str, float]) -> bool:
        """Whether metric ``name`` of an evaluation of a trained model is the highest so far; if so it is noted as ``best``."""
        if name is None or self.step == 0 or not metrics[name] > (self.best["value"] if self.best else -math.inf):
            return False
        self.best = {"step": self.step, "value": metrics[name]}
        log.info("step %d is the best so far: %s %.4g", self.step, name, metrics[name])
        return True

    def state_dict(self) -> dict[str, Any]:
        """As JSON types. Numbers that may be nan, which JSON has not, are text."""
        return {
            "step": self.step,
            "recent_rewards": [repr(reward) for reward in self.recent_rewards],
            "best": self.best,
            "skipped_in_row": self.skipped_in_row,
            "unlogged": self.unlogged and {name: repr(float(value)) for name, value in self.unlogged.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""
        self.step, self.best, unlogged = state["step"], state["best"], state["unlogged"]
        self.skipped_in_row = state["skipped_in_row"]
        self.recent_rewards = [float(reward) for reward in state["recent_rewards"]]
        self.unlogged = None if unlogged is None else {name: float(value) for name, value in unlogged.items()}
