"""Reads log-probs and chosen experts of given samples out of what vLLM returns for them as prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pgrpo.rollout.vllm.requests import EngineError
from pgrpo.types import Sample


class Scores(NamedTuple):
    """What an engine computes of given samples.

    Attributes:
        logprobs: at temperature 1, of all completion tokens, in order.
        experts: [layers, A] of the rows that predict these, one after the other: the experts that vLLM chose. None unless
            ``rollout.compare_experts``.
    """

    logprobs: list[float]
    experts: list[np.ndarray] | None = None


def read_scores(outputs: Sequence[Any], samples: Sequence[Sample], *, with_experts: bool) -> Scores:
    """What vLLM computed of samples.

    Args:
        outputs: vLLM's, of a request for one more token behind each sample, with the prompt's log-probs.
        with_experts: the engine was started to return them.

    Raises:
        EngineError: experts are missing.
    """
    ids = [sample.prompt_ids + sample.token_ids for sample in samples]
    tokens = [(i, at) for i, s in enumerate(samples) for at in range(len(s.prompt_ids), len(ids[i]))]
    logprobs = [outputs[i].prompt_logprobs[at][ids[i][at]].logprob for i, at in tokens]
    if not with_experts:
        return Scores(logprobs)
    choices = [_choices_of_prompt(output, len(own)) for output, own in zip(outputs, ids, strict=True)]
    return Scores(logprobs, [choices[i][at - 1] for i, at in tokens])


def _choices_of_prompt(output: Any, tokens: int) -> Any:
    """[rows, layers, A] the experts that computed a prompt of so many tokens, for a request of one more. Some releases give them
    apart from those of what was sampled, others (0.32) in front of them; the last sampled token has none."""
    apart = getattr(output, "prompt_routed_experts", None)
    found = output.outputs[0].routed_experts if apart is None else apart
    if found is None or len(found) != tokens:
        raise EngineError(
            f"vLLM gave the experts of {0 if found is None else len(found)} rows of a prompt of {tokens}: "
            "set rollout.compare_experts=false"
        )
    return found
