"""The dataclasses that travel between files. Plain Python: token ids are lists of ints, so that every layer may import this.

A *sample* is one prompt with one completion; a *group* is one prompt with all of its completions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length"]
Recompute = Literal["none", "attention", "full"]
"""What the backward recomputes in a layer: nothing, all but attention, or everything."""
Messages = list[dict[str, str]]


@dataclass(slots=True)
class Prompt:
    """One row of the data set, rendered.

    Attributes:
        index: row number in the data set, before shuffling; names the row in errors and in files of an evaluation.
        text: the text that the model reads (chat template applied).
        token_ids: ``text`` tokenized, at least one token.
        columns: the data set's row, handed to reward functions.
        messages: the chat messages before the template, or None for a raw prompt.
    """

    index: int
    text: str
    token_ids: list[int]
    columns: dict[str, Any] = field(default_factory=dict)
    messages: Messages | None = None


@dataclass(slots=True)
class Completion:
    """What the sampler produced for one prompt.

    Attributes:
        token_ids: R completion tokens; the final eos is one of them. May be empty.
        rollout_logprobs: R log-probs (natural logarithm) by the sampler, at the sampling temperature and over the whole vocabulary,
            before top-k and top-p: the same distribution that the trainer's log-probs are of.
        mask: R flags. False marks a token that the policy did not sample (tool output, say): it is read, and takes no loss.
        finish_reason: ``stop`` (eos or a stop string) or ``length`` (the limit came first).
        text: the completion without special tokens and without the stop string; what rewards read.
    """

    token_ids: list[int]
    rollout_logprobs: list[float]
    mask: list[bool]
    finish_reason: FinishReason
    text: str


@dataclass(slots=True)
class Group:
    """One prompt and its ``group_size`` completions, with what rewards made of them.

    Attributes:
        rewards: one total a completion; None where every reward function said None (the sample takes no part).
        reward_parts: reward function name -> one value a completion, before weights.
        advantages: one number a completion (0 for a sample that takes no part).
    """

    prompt: Prompt
    completions: list[Completion]
    rewards: list[float | None] = field(default_factory=list)
    reward_parts: dict[str, list[float | None]] = field(default_factory=dict)
    advantages: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample. ``top_p`` 1 and ``top_k`` 0 are off; ``temperature`` 0 is greedy."""

    max_completion_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
