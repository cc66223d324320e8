"""What travels between files. Plain Python: token ids are lists of ints, so that every layer may import this.

A *group* is one prompt and its episodes. An *episode* is what one rollout of the prompt gave, with one reward. A *sample* is one
token sequence that is trained on: an episode has one, or several where its history was rewritten between turns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

FinishReason = Literal["stop", "length", "turns", "tool_calls", "timeout", "environment", "parse_error"]
"""Why a completion (``stop``, ``length``) or an episode ended: the model was done; a limit of tokens, turns, tool calls or seconds;
a failure of a tool or environment, which is not the model's fault; a call that is none."""
LIMITS: tuple[FinishReason, ...] = ("length", "turns", "tool_calls", "timeout")
"""Ends that a limit forced: what ``loss.mask_overlong`` leaves out."""
Recompute = Literal["none", "matmuls", "attention", "full", "offload"]
"""What the backward recomputes in a layer: nothing, all but attention and matrix products, all but attention, or everything, from
an input that is on the GPU or waits in host memory."""
KEEPS_MLP: frozenset[Recompute] = frozenset({"none", "matmuls"})
"""Those that keep what an MLP is differentiated with."""
Messages = list[dict[str, Any]]


class Image(NamedTuple):
    """An image in a sample, without its pixels, which ``vision.ImageReader`` has by its key.

    Attributes:
        key: hash of its content.
        runs: (start, end) of the sample's tokens that stand for it; several where text separates its tiles.
        size: (width, height) of its file, for people.
        content: its file, of one that a tool or environment gave; those of the data are read again when they are needed.
    """

    key: str
    runs: tuple[tuple[int, int], ...]
    size: tuple[int, int] | None = None
    content: bytes | None = None


@dataclass(frozen=True, slots=True)
class PromptImages:
    """The images of a prompt, in order.

    Attributes:
        images: at least one.
        unexpanded_ids: the prompt's token ids with one placeholder an image, which vLLM expands itself.
        positions: [3][P] position ids where a model has three dimensions of them; else None, and they count tokens.
        where: the row in the data, for errors.
    """

    images: tuple[Image, ...]
    unexpanded_ids: list[int]
    positions: list[list[int]] | None = None
    where: str = ""


@dataclass(slots=True)
class Prompt:
    """One row of the data set, rendered.

    Attributes:
        index: row number in the data set, before shuffling; names the row in errors and in files of an evaluation.
        text: the text that the model reads (chat template applied).
        token_ids: ``text`` tokenized, at least one token.
        columns: the data set's row, handed to reward functions.
        messages: the chat messages before the template, or None for a raw prompt.
        images: where images stand in ``token_ids``, a token for each of their rows; None without images.
    """

    index: int
    text: str
    token_ids: list[int]
    columns: dict[str, Any] = field(default_factory=dict)
    messages: Messages | None = None
    images: PromptImages | None = None


class Request(NamedTuple):
    """What an engine is asked for: one completion of ``token_ids`` for each seed.

    Attributes:
        max_tokens: limit of a completion, below ``SamplingParams.max_completion_tokens``; None: that.
        images: of the tokens, as ``Prompt.images``.
        continued: of the tokens, those that an earlier request of the same rollout and its completion had.
    """

    token_ids: list[int]
    seeds: list[int]
    max_tokens: int | None = None
    images: PromptImages | None = None
    continued: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine sampled after a request's tokens.

    Attributes:
        token_ids: R tokens; the final eos is one of them. May be empty.
        rollout_logprobs: R log-probs (natural logarithm) by the sampler, at the sampling temperature and over the whole vocabulary,
            before top-k and top-p: the same distribution that the trainer's log-probs are of.
        finish_reason: ``stop`` (eos or a stop string) or ``length`` (the limit came first).
        text: the completion without the end token or stop string, and without other special tokens unless
            ``keep_special_tokens``; what rewards read.
        weights_version: training steps that the weights had behind them which sampled it.
    """

    token_ids: list[int]
    rollout_logprobs: list[float]
    finish_reason: FinishReason
    text: str
    weights_version: int = 0


@dataclass(slots=True)
class Sample:
    """One token sequence that is trained on: ``prompt_ids``, and behind them R tokens.

    Attributes:
        prompt_ids: P tokens that are read and never trained on. Samples of a group share one list.
        token_ids: R tokens.
        mask: R flags. True marks a token that the policy sampled. The others are read (tool output, say) and take no loss.
        rollout_logprobs: R log-probs by the sampler, as in ``Completion``.
        weights_version: training steps that the weights had behind them which sampled it.
        advantages: R numbers; empty until the group is compared.
        turns: R numbers of the episode's turns, -1 for a token that is read; empty for a single turn.
        images: of the prompt, as ``Prompt.images``.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    mask: list[bool]
    rollout_logprobs: list[float]
    weights_version: int = 0
    advantages: list[float] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    images: PromptImages | None = None


@dataclass(slots=True)
class Episode:
    """What one rollout of a prompt gave.

    Attributes:
        samples: what is trained on.
        text: what rewards read: of several turns the last.
        finish_reason: why it ended.
        reward: the weighted sum of what applies; None where nothing does, and the episode takes no part in the comparison.
        reward_parts: reward function name -> value before weights, None where it does not apply.
        messages: what was said behind the prompt, in turns; empty for a single turn of text.
        counts: numbers of turns, calls, failures and so on, for metrics.
        own_rewards: environment name -> what its ``get_reward`` gave, or an exception.
        environment: the live object, until rewards are done.
        prompt: with what an environment added to it, without columns; None: the group's.
        turn_rewards: what an environment gave for each turn of the model; a part of its own reward.
    """

    samples: list[Sample]
    text: str
    finish_reason: FinishReason
    reward: float | None = None
    reward_parts: dict[str, float | None] = field(default_factory=dict)
    messages: Messages = field(default_factory=list)
    counts: dict[str, float] = field(default_factory=dict)
    own_rewards: dict[str, Any] = field(default_factory=dict)
    environment: Any = None
    prompt: Prompt | None = None
    turn_rewards: list[float] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        """The tokens behind the prompt, of all samples."""
        return [token for sample in self.samples for token in sample.token_ids]

    @property
    def sampled_tokens(self) -> int:
        """Number of tokens that the policy sampled."""
        return sum(sum(sample.mask) for sample in self.samples)


@dataclass(slots=True)
class Group:
    """One prompt and its ``group_size`` episodes."""

    prompt: Prompt
    episodes: list[Episode]

    @property
    def samples(self) -> list[Sample]:
        return [sample for episode in self.episodes for sample in episode.samples]

    @property
    def rewards(self) -> list[float | None]:
        """One total an episode."""
        return [episode.reward for episode in self.episodes]

    def reward_part(self, name: str) -> list[float | None]:
        """One value an episode, of one reward function."""
        return [episode.reward_parts[name] for episode in self.episodes]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample. ``top_p`` 1 and ``top_k`` 0 are off; ``temperature`` 0 is greedy."""

    max_completion_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    keep_special_tokens: bool = False
