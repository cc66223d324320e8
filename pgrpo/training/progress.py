"""State of a run that changes from step to step, except weights, moments, data position and random numbers."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """Saved in every checkpoint, except ``has_moved``.

    Attributes:
        step: number of finished steps.
        recent_rewards: mean rewards of the last steps.
        best: step and value of the best evaluation so far, by ``checkpoint.keep_best``.
        unlogged: metrics of ``step`` while they wait for an evaluation, else None.
        skipped_in_row: updates skipped since the last that was not.
        has_moved: whether the unfinished step has changed weights.
    """

    step: int = 0
    recent_rewards: list[float] = field(default_factory=list)
    best: dict[str, Any] | None = None
    unlogged: dict[str, float] | None = None
    skipped_in_row: int = 0
    has_moved: bool = False

    def is_best(self, name: str | None, metrics: Mapping[str, float]) -> bool:
        """Whether metric ``name`` of an evaluation is the highest so far; then it becomes ``best``. False before training."""
        if name is None or self.step == 0 or not metrics[name] > (self.best["value"] if self.best else -math.inf):
            return False
        self.best = {"step": self.step, "value": metrics[name]}
        log.info("step %d is the best so far: %s %.4g", self.step, name, metrics[name])
        return True

    def state_dict(self) -> dict[str, Any]:
        """As JSON types. Numbers that may be nan are text, as JSON has no nan."""
        return {
            "step": self.step,
            "recent_rewards": [repr(reward) for reward in self.recent_rewards],
            "best": self.best,
            "skipped_in_row": self.skipped_in_row,
            "unlogged": self.unlogged and {name: repr(float(value)) for name, value in self.unlogged.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        self.step, self.best, unlogged = state["step"], state["best"], state["unlogged"]
        self.skipped_in_row = state["skipped_in_row"]
        self.recent_rewards = [float(reward) for reward in state["recent_rewards"]]
        self.unlogged = None if unlogged is None else {name: float(value) for name, value in unlogged.items()}
