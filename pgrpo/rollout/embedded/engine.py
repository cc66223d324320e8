"""Samples with the policy's own transformers model, in the trainer's process: no weights are copied.

Each prompt is computed once and its group shares the keys and values; the next turn of an episode goes on from those of its last.
Nothing is padded, and finished completions leave the batch.
vLLM is faster on a GPU.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, field
from itertools import accumulate, groupby

import torch
from torch import Tensor

from pgrpo.attention.layout import rows_of
from pgrpo.distributed.fsdp import no_gradient
from pgrpo.model.policy import Policy
from pgrpo.packing.batch import GroupedBatch, build_batch
from pgrpo.packing.forest import Forest
from pgrpo.rollout.base import More, OnFinished, no_more
from pgrpo.rollout.embedded.cache import NOTHING, DecodeCache, Front
from pgrpo.rollout.embedded.sampling import draw, uniforms
from pgrpo.rollout.text import Tokenizer, make_completions
from pgrpo.types import Completion, Request, Sample, SamplingParams
from pgrpo.vision.rows import next_position, shown_tokens

LEAVE_FRACTION = 0.25
"""Finished completions leave the batch when they are this fraction of it, as the cache of the others is copied then."""
CHECK_EVERY = 8
"""Tokens between two checks of the stop signal, which are collective calls."""


@dataclass(eq=False)
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

    policy: Policy
    tokenizer: Tokenizer
    eos_token_ids: Sequence[int]
    _: KW_ONLY
    max_concurrent: int = 256
    any_rank: Callable[[bool], bool] = bool
    check_stop: Callable[[], None] = lambda: None
    metrics: dict[str, float] = field(default_factory=lambda: {"time/weight_sync": 0.0})  # no weights to push
    notes: list[str] = field(default_factory=list)
    counted_bytes: int = 0
    weights_version: int = 0

    def awake(self, version: int) -> nullcontext[None]:
        """See ``RolloutEngine``; nothing to wake."""
        self.weights_version = version
        return nullcontext()

    def close(self) -> None:
        """See ``RolloutEngine``; nothing to release."""

    def sample(
        self, requests: Sequence[Request], params: SamplingParams, on_finished: OnFinished, more: More = no_more
    ) -> None:
        """Sample all requests in waves of at most ``max_concurrent`` completions. Each completion's seed alone decides its random
        numbers. More requests are asked for when none is left, and all that come are awaited, so that waves do not depend on how
        long something took. A rank without requests decodes one that nobody asked for while others have some.

        What a completion computed is kept until a request of the next round continues it: of ``max_concurrent`` completions at most
        at any time, and not in models with states, of which a batch has those behind its newest tokens alone."""
        rest, start, self._keeps = list(requests) or list(more("all") or ()), 0, more is not no_more
        self._kept: dict[tuple[int | str, ...], Front] = {}
        filler = Request([min(self.eos_token_ids, default=0)], [0], max_tokens=1)
        while self.any_rank(bool(rest)):
            together = list(accumulate(len(request.seeds) for request in rest))
            count = max(1, bisect_right(together, self.max_concurrent))
            wave, rest = rest[:count], rest[count:]
            with no_gradient(self.policy):
                self._sample_wave(wave or [filler], start, params, on_finished if wave else lambda *_: None)
            start += len(wave)
            if not rest:
                rest = list(more("all") or ())
                goes_on = {shown_tokens(request, request.continued) for request in rest}
                self._kept = {ids: self._kept[ids] for ids in self._kept.keys() & goes_on}

    def _sample_wave(
        self, requests: Sequence[Request], start: int, params: SamplingParams, on_finished: OnFinished
    ) -> None:
        """``start``: the position of the first request."""
        device, limit = self.policy.device, params.max_completion_tokens
        # Neighbours with the same prompt share its keys and values: the first turns of a group, say.
        prompts = [list(same) for _, same in groupby(requests, key=lambda r: (r.token_ids, r.images))]
        asked = [Sample(same[0].token_ids, [], [], [], images=same[0].images) for same in prompts]
        read = [shown_tokens(first, first.continued) for first, *_ in prompts]
        fronts = [self._kept.get(ids, NOTHING) for ids in read]
        self._kept = {ids: self._kept[ids] for ids in self._kept.keys() - read}
        counts = [sum(len(request.seeds) for request in same) for same in prompts]
        request_of = [request for request in requests for _ in request.seeds]  # of each completion
        seeds = [seed for request in requests for seed in request.seeds]
        first = [0, *accumulate(len(request.seeds) for request in requests)]  # of each request, its first completion
        end_ids = torch.tensor(sorted(self.eos_token_ids), device=device)
        uniform = uniforms(seeds, limit).to(device)
        tokens = torch.zeros(len(seeds), limit, dtype=torch.long, device=device)
        logprobs = torch.zeros(len(seeds), limit, device=device)
        # Lengths of completions: their limits until they stop. One is done when it has as many tokens.
        lengths = torch.tensor([min(r.max_tokens or limit, limit) for r in request_of], device=device)
        stopped = torch.zeros(len(seeds), dtype=torch.bool, device=device)
        waiting = list(range(len(requests)))  # requests with a completion that still decodes

        def completions(own: slice) -> list[Completion]:
            ids, sampled_at = (
                [row[:n] for row, n in zip(x[own].tolist(), lengths[own].tolist(), strict=True)]
                for x in (tokens, logprobs)
            )
            return make_completions(
                self.tokenizer, ids, sampled_at, stopped[own].tolist(), self.eos_token_ids, params, self.weights_version
            )

        rows = torch.arange(len(seeds), device=device)  # the completion of each row of the batch
        repeats = torch.tensor(counts, device=device)
        positions = [next_position(prompt.prompt_ids, prompt.images) for prompt in asked]
        positions = torch.tensor(positions, device=device).repeat_interleave(repeats)
        batch = build_batch(Forest.repeated(asked), device=device)
        cache = DecodeCache(batch.layout, counts, limit, fronts)
        logits = self._prefill(batch, fronts, cache).repeat_interleave(repeats, dim=0)
        fronts.clear()  # the cache, which has this list, has copies of what is in it
        for t in range(limit):
            if t % CHECK_EVERY == 0:
                self.check_stop()
            drawn, drawn_logprobs = draw(logits, params, uniform[rows, t])
            tokens[rows, t], logprobs[rows, t] = drawn, drawn_logprobs
            ended = torch.isin(drawn, end_ids) | self._ends_in_stop_string(tokens[rows, : t + 1], params)
            newly_ended = rows[ended & (lengths[rows] > t)]
            stopped[newly_ended] = True
            lengths[newly_ended] = t + 1
            is_new = lengths[rows] == t + 1
            if is_new.any():
                keepable = is_new.nonzero().flatten().tolist() if self._keeps and not cache.states else ()
                for row in keepable[: self.max_concurrent - len(self._kept)]:
                    own = int(rows[row])
                    self._kept[*shown_tokens(request_of[own]), *tokens[own, : t + 1].tolist()] = cache.front(row, t)
                done = (lengths <= t + 1).tolist()
                for position in [p for p in waiting if all(done[first[p] : first[p + 1]])]:
                    waiting.remove(position)
                    on_finished(start + position, completions(slice(first[position], first[position + 1])))
            running = lengths[rows] > t + 1
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

    def _prefill(self, batch: GroupedBatch, fronts: Sequence[Front], cache: DecodeCache) -> Tensor:
        """Logits [N, V] of the first token behind each prompt, whose first rows may be there already."""
        pairs = zip(batch.layout.nodes, fronts, strict=True)
        new = [(node.start + front.rows, node.length - front.rows) for node, front in pairs]
        rows = torch.from_numpy(rows_of(new)).to(self.policy.device)
        inputs = {name: x.index_select(-1, rows) for name, x in batch.inputs.items()}
        last_rows = torch.tensor([count for _, count in new], device=self.policy.device).cumsum(0) - 1
        return self.policy.next_logits(inputs, cache, last_rows, batch.images and batch.images.among(rows))

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
