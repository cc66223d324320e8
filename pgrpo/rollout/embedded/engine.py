"""Samples with the policy's own transformers model, in the trainer's process: no weights are copied.

Each prompt is computed once and its group shares the keys and values. Nothing is padded, and finished completions leave the batch.
vLLM is faster on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor

from pgrpo.distributed.fsdp import Root, no_gradient
from pgrpo.rollout.base import OnFinished
from pgrpo.rollout.embedded.cache import DecodeCache
from pgrpo.rollout.embedded.sampling import draw, uniforms
from pgrpo.rollout.text import Tokenizer, make_completions
from pgrpo.types import Request, SamplingParams

LEAVE_FRACTION = 0.25
"""Finished completions leave the batch when they are this fraction of it, as the cache of the others is copied then."""
CHECK_EVERY = 8
"""Tokens between two checks of the stop signal, which are collective calls."""


class DecodingPolicy(Root, Protocol):
    """The part of ``policy.Policy`` that sampling needs."""

    @property
    def device(self) -> torch.device: ...

    def next_logits(self, inputs: dict[str, Tensor], layout: DecodeCache, rows_B: Tensor) -> Tensor: ...


class EmbeddedEngine:
    """A ``RolloutEngine`` on the policy itself.

    Args:
        policy: computes the logits of the next token.
        tokenizer: decodes ids, for rewards and stop strings.
        eos_token_ids: tokens that end a completion.
        max_concurrent: the most completions decoded at once.
        any_rank: whether a flag is true on any rank. With sharded weights every rank decodes until the slowest is done.
        check_stop: called every few tokens on all ranks; an exception of it ends the rollout.
    """

    def __init__(
        self,
        policy: DecodingPolicy,
        tokenizer: Tokenizer,
        eos_token_ids: Sequence[int],
        *,
        max_concurrent: int = 256,
        any_rank: Callable[[bool], bool] = bool,
        check_stop: Callable[[], None] = lambda: None,
    ) -> None:
        self.policy = policy
        self.tokenizer = tokenizer
        self.end_ids = set(eos_token_ids)
        self.eos_token_ids = torch.tensor(sorted(eos_token_ids), device=policy.device)
        self.max_concurrent = max_concurrent
        self.any_rank = any_rank
        self.check_stop = check_stop
        self.metrics: dict[str, float] = {"time/weight_sync": 0.0}  # no weights to push
        self.notes: list[str] = []
        self.counted_bytes = 0
        self.weights_version = 0

    def awake(self, version: int) -> nullcontext[None]:
        """See ``RolloutEngine``; nothing to wake."""
        self.weights_version = version
        return nullcontext()

    def close(self) -> None:
        """See ``RolloutEngine``; nothing to release."""

    def sample(self, requests: Sequence[Request], params: SamplingParams, on_finished: OnFinished) -> None:
        """Sample all requests in waves of at most ``max_concurrent`` completions. Each completion's seed alone decides its random
        numbers."""
        wave = max(1, self.max_concurrent // len(requests[0].seeds))
        for start in range(0, len(requests), wave):
            with no_gradient(self.policy):
                self._sample_wave(
                    requests[start : start + wave],
                    params,
                    lambda position, completions, start=start: on_finished(start + position, completions),
                )

    def _sample_wave(self, requests: Sequence[Request], params: SamplingParams, on_finished: OnFinished) -> None:
        device = self.policy.device
        group_size, limit = len(requests[0].seeds), params.max_completion_tokens
        prompt_lens = [len(request.token_ids) for request in requests]
        total = len(requests) * group_size
        uniform = uniforms([seed for request in requests for seed in request.seeds], limit).to(device)
        tokens = torch.zeros(total, limit, dtype=torch.long, device=device)
        logprobs = torch.zeros(total, limit, device=device)
        lengths = torch.full((total,), limit, device=device)
        stopped = torch.zeros(total, dtype=torch.bool, device=device)
        waiting = set(range(len(requests)))  # requests with a completion that still decodes

        def hand_over(position: int) -> None:
            waiting.remove(position)
            own = slice(position * group_size, (position + 1) * group_size)
            ids, sampled_at = (
                [row[:n] for row, n in zip(x[own].tolist(), lengths[own].tolist(), strict=True)]
                for x in (tokens, logprobs)
            )
            made = make_completions(
                self.tokenizer, ids, sampled_at, stopped[own].tolist(), self.end_ids, params, self.weights_version
            )
            on_finished(position, made)

        cache = DecodeCache(prompt_lens, group_size, limit, device)
        rows = torch.arange(total, device=device)  # the completion of each row of the batch
        positions = torch.tensor(prompt_lens, device=device).repeat_interleave(group_size)
        logits = self._prefill(requests, prompt_lens, cache).repeat_interleave(group_size, dim=0)
        for t in range(limit):
            if t % CHECK_EVERY == 0:
                self.check_stop()
            drawn, drawn_logprobs = draw(logits, params, uniform[rows, t])
            tokens[rows, t], logprobs[rows, t] = drawn, drawn_logprobs
            ended = torch.isin(drawn, self.eos_token_ids) | self._ends_in_stop_string(tokens[rows, : t + 1], params)
            newly_ended = rows[ended & ~stopped[rows]]
            stopped[newly_ended] = True
            lengths[newly_ended] = t + 1
            if len(newly_ended):
                done = stopped.view(len(requests), group_size).all(-1).tolist()
                for position in sorted(waiting):
                    if done[position]:
                        hand_over(position)
            running = ~stopped[rows]
            if t + 1 == limit or not self.any_rank(bool(running.any())):
                break
            if running.sum() <= (1 - LEAVE_FRACTION) * len(rows):
                stay = running.nonzero().flatten()
                if not len(stay):  # other ranks still decode, so decode one row and ignore it
                    stay = torch.zeros(1, dtype=torch.long, device=device)
                cache.keep(stay)
                rows, drawn = rows[stay], drawn[stay]
            inputs = {"input_ids": drawn, "position_ids": positions[rows] + t}
            logits = self.policy.next_logits(inputs, cache, torch.arange(len(rows), device=device))
            cache.advance()
        for position in sorted(waiting):
            hand_over(position)

    def _prefill(self, requests: Sequence[Request], prompt_lens: list[int], cache: DecodeCache) -> Tensor:
        """Logits [N, V] of each completion's first token."""
        device = self.policy.device
        input_ids = torch.tensor([t for request in requests for t in request.token_ids], device=device)
        position_ids = torch.cat([torch.arange(n, device=device) for n in prompt_lens])
        last_rows = torch.tensor(prompt_lens, device=device).cumsum(0) - 1
        inputs = {"input_ids": input_ids, "position_ids": position_ids}
        return self.policy.next_logits(inputs, cache, last_rows)

    def _ends_in_stop_string(self, tokens_BT: Tensor, params: SamplingParams) -> Tensor:
        """[B] bool: the newest token completed a stop string."""
        if not params.stop:
            return torch.zeros(len(tokens_BT), dtype=torch.bool, device=tokens_BT.device)
        # A stop string of n bytes spans at most n tokens; four more keep the first character of the window whole.
        window = max(len(s.encode()) for s in params.stop) + 4
        texts = self.tokenizer.batch_decode(
            tokens_BT[:, -window:].tolist(),
            skip_special_tokens=not params.keep_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        return torch.tensor([any(s in text for s in params.stop) for text in texts], device=tokens_BT.device)
