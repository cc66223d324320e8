"""The protocol of engines, which sample completions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Literal, Protocol

from pgrpo.types import Completion, Request, SamplingParams

OnFinished = Callable[[int, list[Completion]], None]
Wait = Literal["no", "soon", "any", "all"]
More = Callable[[Wait], Sequence[Request] | None]
"""Further requests, whose positions go on counting. An engine calls it while it samples (``no``), or with nothing left to sample:
then it waits until there is one (``any``), or until no episode is busy with something else (``all``), and nothing means that no
more will come. ``soon`` waits for a moment only: nothing has come yet, or None: no more will."""


def no_more(_: Wait) -> Sequence[Request]:
    """The ``More`` of requests that are all known."""
    return ()


class RolloutEngine(Protocol):
    """Samples completions with the policy's weights. Every rank calls its methods alike.

    Attributes:
        metrics: numbers of the last time that it was awake, by metric name: seconds of the wake-up, the push and the sleep.
        notes: what a run's log says of the engine when it starts.
        counted_bytes: GPU memory that PyTorch counts as allocated by the engine even while it sleeps.
    """

    metrics: dict[str, float]
    notes: list[str]
    counted_bytes: int

    def awake(self, version: int) -> AbstractContextManager[None]:
        """Inside this block ``sample`` uses the policy's weights at the time of entering. ``version``: their number of training
        steps."""
        ...

    def close(self) -> None:
        """Shut the engine down, at the end of the process."""

    def sample(
        self, requests: Sequence[Request], params: SamplingParams, on_finished: OnFinished, more: More = no_more
    ) -> None:
        """Sample the completions of all requests, and of those that ``more`` gives. ``on_finished`` is called with a request's
        position and its completions, in the order of its seeds, as soon as all of them are finished, while others still decode.
        It must not raise.

        The seeds decide the random numbers; in the embedded engine a completion's own seed alone does. Ranks that
        share an engine call this with the same number of requests, which have as many seeds each.
        """


def sample_seeds(*path: int | str, group_size: int) -> list[int]:
    """One 63-bit seed for each sample of a prompt, from (seed, step, prompt) and the sample's number.

    A hash, not a generator with state, so that a resumed run or another number of ranks samples the same.
    """
    keys = ("/".join(map(str, (*path, sample))).encode() for sample in range(group_size))
    return [int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1 for key in keys]
