"""From logits to a token and its log-prob. B rows, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pgrpo.types import SamplingParams


def at_temperature(logits_BV: Tensor, params: SamplingParams) -> Tensor:
    """[B, V] float32 logits divided by the temperature; unchanged at temperature 0."""
    logits_BV = logits_BV.float()
    return logits_BV if params.temperature in (0.0, 1.0) else logits_BV / params.temperature


def sampling_logprobs(logits_BV: Tensor, params: SamplingParams) -> Tensor:
    """[B, V] float32 log-probs of the distribution that is sampled from: temperature, then top-k, then top-p (the order of
    vLLM and transformers), renormalised; -inf on tokens that cannot be drawn."""
    logits_BV = at_temperature(logits_BV, params)
    if 0 < params.top_k < logits_BV.shape[-1]:
        kth_B1 = logits_BV.topk(params.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, float("-inf"))
    if params.top_p < 1.0:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
        probs_BV = sorted_BV.softmax(-1)
        # A token stays while the probability of those before it is below top_p, so the likeliest always stays.
        outside_BV = probs_BV.cumsum(-1) - probs_BV >= params.top_p
        logits_BV = logits_BV.masked_fill(outside_BV.scatter(-1, order_BV, outside_BV), float("-inf"))
    return logits_BV.log_softmax(-1)


def draw(logits_BV: Tensor, params: SamplingParams, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids [B], by inversion of the cumulative distribution at ``uniform_B`` (in [0, 1)), and their log-probs [B] at the
    temperature but before top-k and top-p, like the trainer's."""
    logprobs_BV = sampling_logprobs(logits_BV, params)
    if params.temperature == 0.0:
        token_B1 = logprobs_BV.argmax(-1, keepdim=True)
    else:
        cdf_BV = logprobs_BV.exp().cumsum(-1, dtype=torch.float64)
        threshold_B1 = uniform_B.double().unsqueeze(-1) * cdf_BV[:, -1:]
        # right=True: the first token whose cumulative probability exceeds the threshold, so never one of probability 0.
        token_B1 = torch.searchsorted(cdf_BV, threshold_B1, right=True)
    if params.top_k or params.top_p < 1.0:
        logprobs_BV = at_temperature(logits_BV, params).log_softmax(-1)
    return token_B1.squeeze(-1), logprobs_BV.gather(-1, token_B1).squeeze(-1)


def uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """[len(seeds), count] float32 in [0, 1); row i depends on seeds[i] alone."""
    generator = torch.Generator()
    return torch.stack([torch.rand(count, generator=generator.manual_seed(seed)) for seed in seeds])
