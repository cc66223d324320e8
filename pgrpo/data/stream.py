"""The order in which training takes the prompts."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from pgrpo.config import ConfigError
from pgrpo.types import Prompt


class PromptStream:
    """An endless, resumable sequence of prompts: epoch after epoch, every prompt once an epoch.

    The order of epoch e depends on ``(seed, e)`` alone, so the position is two numbers, and a resumed run goes on
    where the other stopped. ``take`` runs across the end of an epoch.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool) -> None:
        if not prompts:
            raise ConfigError("the data set has no prompts")
        self._prompts, self._seed, self._shuffle = prompts, seed, shuffle
        self._epoch = self._offset = 0
        self._order = self._order_of(0)

    def __len__(self) -> int:
        """Prompts in one epoch."""
        return len(self._prompts)

    @property
    def epoch(self) -> float:
        """Epochs taken so far."""
        return self._epoch + self._offset / len(self._order)

    def take(self, n: int) -> list[Prompt]:
        """The next ``n`` prompts."""
        taken: list[Prompt] = []
        while len(taken) < n:
            if self._offset == len(self._order):
                self._epoch, self._offset = self._epoch + 1, 0
                self._order = self._order_of(self._epoch)
            picked = self._order[self._offset : self._offset + n - len(taken)]
            self._offset += len(picked)
            taken += [self._prompts[i] for i in picked]
        return taken

    def state_dict(self) -> dict[str, Any]:
        """The position and what it is a position in, as JSON types."""
        return {"epoch": self._epoch, "offset": self._offset, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position. ``ConfigError`` if it belongs to another size, seed or shuffle: the order differs."""
        for name, now in self._identity().items():
            if state[name] != now:
                raise ConfigError(
                    f"cannot resume: the checkpoint's data has {name} {state[name]}, this run's has {now}; "
                    "keep the data set, seed and data.* of the first run, or start a new run_dir"
                )
        self._epoch, self._offset = state["epoch"], state["offset"]
        self._order = self._order_of(self._epoch)

    def _identity(self) -> dict[str, Any]:
        return {"size": len(self._prompts), "seed": self._seed, "shuffle": self._shuffle}

    def _order_of(self, epoch: int) -> list[int]:
        order = range(len(self._prompts))
        if not self._shuffle:
            return list(order)
        # Sorted by random() rather than shuffle(): only random() is promised to stay the same across Python versions.
        rng = random.Random(f"{self._seed}/{epoch}")
        return sorted(order, key=lambda _: rng.random())
