"""What the training loop asks of an engine."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from pgrpo.config import Config
from pgrpo.types import Group, Prompt, SamplingParams


class RolloutEngine(Protocol):
    """Samples completions with the policy's weights. Every rank calls its methods alike.

    Attributes:
        timings: seconds of the last waking, weight push and falling asleep, under metric names.
        counted_bytes: of GPU memory that PyTorch counts as allocated for the engine, though it sleeps.
    """

    timings: dict[str, float]
    counted_bytes: int

    def awake(self) -> AbstractContextManager[None]:
        """Inside, ``generate`` samples with the policy's weights of the moment of entering."""
        ...

    def close(self) -> None:
        """Give everything up; after this only the process's end."""
        ...

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams, seeds: Sequence[Sequence[int]]
    ) -> list[Group]:
        """One group a prompt, in order. The seeds decide the random numbers; in the embedded engine ``seeds[n][g]`` alone those of
        sample g of prompt n.

        Every rank calls this with the same number of prompts.
        """
        ...


def sample_seeds(*path: int | str, group_size: int) -> list[int]:
    """One 63-bit seed for each sample of a prompt, from (seed, step, prompt) and the sample's number.

    A hash, not a running generator: a resumed run, or one on another number of ranks, samples what this one would have.
    """
    seeds = []
    for sample in range(group_size):
        key = "/".join(map(str, (*path, sample))).encode()
        seeds.append(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1)
    return seeds


def sampling_params(config: Config, temperature: float | None = None) -> SamplingParams:
    """How the config says to sample; without a temperature at the rollout's."""
    rollout = config.rollout
    return SamplingParams(
        max_completion_tokens=rollout.max_completion_tokens,
        temperature=rollout.temperature if temperature is None else temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        stop=tuple(rollout.stop),
    )
