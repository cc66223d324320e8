"""Sampling with the policy's own transformers model, in the trainer's process: nothing to install, nothing to synchronise.

Each prompt is computed once, its keys and values are shared by the group, nothing is padded, and finished completions leave
the batch. For speed on a GPU use vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor

from pgrpo.distributed.fsdp import Root, no_gradient
from pgrpo.rollout.embedded.cache import DecodeCache
from pgrpo.rollout.embedded.sampling import draw, uniforms
from pgrpo.rollout.text import Tokenizer, make_completions
from pgrpo.types import Completion, Group, Prompt, SamplingParams

LEAVE_FRACTION = 0.25
"""Finished completions leave the batch when they are this share of it: leaving copies the cache of those that stay."""
CHECK_EVERY = 8
"""Tokens between looks at the stop signal, which ranks exchange."""


class DecodingPolicy(Root, Protocol):
    """The part of ``policy.Policy`` that sampling needs."""

    @property
    def device(self) -> torch.device: ...

    def next_logits(
        self, input_ids_T: Tensor, position_ids_T: Tensor, layout: DecodeCache, rows_B: Tensor
    ) -> Tensor: ...


class EmbeddedEngine:
    """A ``RolloutEngine`` on the policy itself.

    Args:
        policy: gives the logits of the next token.
        tokenizer: turns ids into text, for rewards and stop strings.
        eos_token_ids: tokens that end a completion.
        max_concurrent: completions decoded at once.
        any_rank: whether a flag is true on any rank. With sharded weights every rank decodes until the slowest is done.
        check_stop: called every few tokens, on all ranks alike; what it raises ends the rollout.
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
        self.eos_token_ids = torch.tensor(sorted(eos_token_ids), device=policy.device)
        self.max_concurrent = max_concurrent
        self.any_rank = any_rank
        self.check_stop = check_stop
        self.timings: dict[str, float] = {"time/weight_sync": 0.0}  # there is nothing to push
        self.counted_bytes = 0

    def awake(self) -> nullcontext[None]:
        """It samples with the policy itself."""
        return nullcontext()

    def close(self) -> None:
        """It holds nothing."""

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams, seeds: Sequence[Sequence[int]]
    ) -> list[Group]:
        """One group a prompt, in order; ``seeds[n][g]`` alone decides the random numbers of sample g of prompt n."""
        groups: list[Group] = []
        wave = max(1, self.max_concurrent // len(seeds[0]))
        for start in range(0, len(prompts), wave):
            part = slice(start, start + wave)
            with no_gradient(self.policy):
                completions = self._generate_wave(prompts[part], params, seeds[part])
            groups += [Group(p, c) for p, c in zip(prompts[part], completions, strict=True)]
        return groups

    def _generate_wave(
        self, prompts: Sequence[Prompt], params: SamplingParams, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        device = self.policy.device
        group_size, limit = len(seeds[0]), params.max_completion_tokens
        prompt_lens = [len(p.token_ids) for p in prompts]
        total = len(prompts) * group_size
        uniform = uniforms([s for group in seeds for s in group], limit).to(device)
        tokens = torch.zeros(total, limit, dtype=torch.long, device=device)
        logprobs = torch.zeros(total, limit, device=device)
        lengths = torch.full((total,), limit, device=device)
        stopped = torch.zeros(total, dtype=torch.bool, device=device)

        cache = DecodeCache(prompt_lens, group_size, limit, device)
        rows = torch.arange(total, device=device)  # which completion each row of the batch is
        positions = torch.tensor(prompt_lens, device=device).repeat_interleave(group_size)
        logits = self._prefill(prompts, prompt_lens, cache).repeat_interleave(group_size, dim=0)
        for t in range(limit):
            if t % CHECK_EVERY == 0:
                self.check_stop()
            drawn, drawn_logprobs = draw(logits, params, uniform[rows, t])
            tokens[rows, t], logprobs[rows, t] = drawn, drawn_logprobs
            ended = torch.isin(drawn, self.eos_token_ids) | self._ends_in_stop_string(
                tokens[rows, : t + 1], params.stop
            )
            newly_ended = rows[ended & ~stopped[rows]]
            stopped[newly_ended] = True
            lengths[newly_ended] = t + 1
            running = ~stopped[rows]
            if t + 1 == limit or not self.any_rank(bool(running.any())):
                break
            if running.sum() <= (1 - LEAVE_FRACTION) * len(rows):
                stay = running.nonzero().flatten()
                if not len(stay):  # other ranks still decode: go on with one row, to no effect
                    stay = torch.zeros(1, dtype=torch.long, device=device)
                cache.keep(stay)
                rows, drawn = rows[stay], drawn[stay]
            logits = self.policy.next_logits(drawn, positions[rows] + t, cache, torch.arange(len(rows), device=device))
            cache.advance()

        ids, sampled_at = (
            [x[:n] for x, n in zip(t.tolist(), lengths.tolist(), strict=True)] for t in (tokens, logprobs)
        )
        flat = make_completions(self.tokenizer, ids, sampled_at, stopped.tolist(), params.stop)
        return [flat[i : i + group_size] for i in range(0, total, group_size)]

    def _prefill(self, prompts: Sequence[Prompt], prompt_lens: list[int], cache: DecodeCache) -> Tensor:
        """Logits [N, V] of each completion's first token."""
        device = self.policy.device
        input_ids = torch.tensor([t for p in prompts for t in p.token_ids], device=device)
        position_ids = torch.cat([torch.arange(n, device=device) for n in prompt_lens])
        last_rows = torch.tensor(prompt_lens, device=device).cumsum(0) - 1
        return self.policy.next_logits(input_ids, position_ids, cache, last_rows)

    def _ends_in_stop_string(self, tokens_BT: Tensor, stop: Sequence[str]) -> Tensor:
        """[B] bool: the newest token completed a stop string."""
        if not stop:
            return torch.zeros(len(tokens_BT), dtype=torch.bool, device=tokens_BT.device)
        # A stop string of n bytes spans at most n tokens; a few more keep a character that straddles the cut whole.
        window = max(len(s.encode()) for s in stop) + 4
        texts = self.tokenizer.batch_decode(
            tokens_BT[:, -window:].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return torch.tensor([any(s in text for s in stop) for text in texts], device=tokens_BT.device)
