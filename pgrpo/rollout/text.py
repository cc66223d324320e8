"""Makes completions from sampled token ids, for all engines."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from pgrpo.types import Completion, FinishReason, SamplingParams


class Tokenizer(Protocol):
    def batch_decode(
        self, sequences: list[list[int]], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> list[str]: ...


def make_completions(
    tokenizer: Tokenizer,
    token_ids: Sequence[list[int]],
    logprobs: Sequence[list[float]],
    stopped: Sequence[bool],
    end_ids: Collection[int],
    params: SamplingParams,
    weights_version: int,
) -> list[Completion]:
    """Completions with their text, which ends before the end token and before the first stop string.

    Args:
        token_ids: of each completion, with the final eos or the tokens of the stop string.
        logprobs: one a token, see ``Completion.rollout_logprobs``.
        stopped: whether eos or a stop string ended each completion.
        end_ids: the tokens that end a completion.
        params: what was asked for.
        weights_version: number of training steps of the weights.
    """
    shown = [ids[:-1] if done and ids[-1] in end_ids else ids for ids, done in zip(token_ids, stopped, strict=True)]
    texts = tokenizer.batch_decode(
        shown, skip_special_tokens=not params.keep_special_tokens, clean_up_tokenization_spaces=False
    )
    completions = []
    for ids, sampled_at, text, done in zip(token_ids, logprobs, texts, stopped, strict=True):
        ends = [at for s in params.stop if (at := text.find(s)) >= 0]
        reason: FinishReason = "stop" if done else "length"
        completions.append(Completion(ids, sampled_at, reason, text[: min(ends, default=None)], weights_version))
    return completions
