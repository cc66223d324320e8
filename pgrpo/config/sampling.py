"""What a config asks of an engine."""

from __future__ import annotations

from pgrpo.config.schema import Config
from pgrpo.types import SamplingParams


def sampling_params(config: Config, temperature: float | None = None) -> SamplingParams:
    """The config's sampling parameters; ``temperature`` replaces the rollout's."""
    rollout = config.rollout
    return SamplingParams(
        max_completion_tokens=rollout.max_completion_tokens,
        temperature=rollout.temperature if temperature is None else temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        stop=tuple(rollout.stop),
        keep_special_tokens=rollout.keep_special_tokens,
    )
