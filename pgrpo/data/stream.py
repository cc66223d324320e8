"""The training order of the prompts."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from pgrpo.config import ConfigError
from pgrpo.types import Prompt


class PromptStream:
    """An endless, resumable sequence of prompts: epoch after epoch, every prompt once an epoch.

    The order of epoch e depends on ``(seed, e)`` only, so the saved position is two numbers. ``take`` continues across the
    end of an epoch.

    Attributes:
        taken: called with the prompts of each ``take``.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool) -> None:
        if not prompts:
            raise ConfigError("the data set has no prompts")
        self._prompts, self._seed, self._shuffle = prompts, seed, shuffle
        self._epoch = self._offset = 0
        self._order = self._order_of(0)
        self.taken: Callable[[list[Prompt]], None] = lambda _: None

    def __len__(self) -> int:
        """Number of prompts in one epoch."""
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
        self.taken(taken)
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Return the position and the identity of the data set, as JSON types."""
        return {"epoch": self._epoch, "offset": self._offset, **self._identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved position. ConfigError if it belongs to other rows or another order."""
        if difference := self.difference(state):
            raise ConfigError(
                f"cannot resume: {difference}; keep the data set, seed and data.* of the first run, or start a new run "
                "from the checkpoint's weights: set another run_dir, and pass the checkpoint's path to --resume"
            )
        self._epoch, self._offset = state["epoch"], state["offset"]
        self._order = self._order_of(self._epoch)

    def difference(self, state: Mapping[str, Any]) -> str | None:
        """Return why a saved position is invalid here (size, seed, shuffle or row content differ), or None if it is valid."""
        for name, now in self._identity.items():
            if (before := state.get(name)) != now:
                what = f"{name} (a hash of their content)" if name == "rows" else name
                return f"the checkpoint's data has {what} {before}, this run's has {now}"
        if state["offset"] > len(self._prompts):
            return f"the checkpoint's position, {state['offset']}, is beyond the {len(self._prompts)} prompts"
        return None

    @cached_property
    def _identity(self) -> dict[str, Any]:
        rows = content_hash(
            p.columns | ({"": [i.key for i in p.images.images]} if p.images else {}) for p in self._prompts
        )
        return {"size": len(self._prompts), "seed": self._seed, "shuffle": self._shuffle, "rows": rows}

    def _order_of(self, epoch: int) -> list[int]:
        order = range(len(self._prompts))
        if not self._shuffle:
            return list(order)
        # Sort by random() instead of shuffle(): only random() is guaranteed to be stable across Python versions.
        rng = random.Random(f"{self._seed}/{epoch}")
        return sorted(order, key=lambda _: rng.random())


def content_hash(rows: Iterable[Mapping[str, Any]]) -> str:
    """Hash the rows' content, in order. Equal rows give the same hash in every process and from every source."""
    digest, text_of = hashlib.sha256(), json.JSONEncoder(default=_as_json, skipkeys=True)
    for row in rows:
        digest.update(text_of.encode(row).encode() + b"\n")
    return digest.hexdigest()[:16]


def _as_json(value: Any) -> Any:
    """Convert arrays to lists, and other types to their text without memory addresses."""
    return value.tolist() if hasattr(value, "tolist") else re.sub(r" at 0x[0-9a-fA-F]+", "", str(value))
