"""What a small copy with short samples does not reach: long samples, and layers beyond one of every kind.

A config says at which lengths and in which layers a model changes what it does, and ``shrink.py`` puts those within reach. Code may
have such numbers that no config names. So log-probs are compared twice more, without gradients: of long samples, and of a copy with
all layers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import PretrainedConfig

from pgrpo.admission.compare import first_difference, reference_logprobs, tokens_as_samples
from pgrpo.admission.shrink import Small, shrink
from pgrpo.admission.twins import MOST_PARAMETERS, twins
from pgrpo.admission.vision import RandomImages, reference_inputs
from pgrpo.model.policy import Policy
from pgrpo.packing.batch import build_batch
from pgrpo.packing.forest import Forest

LONG = 1100
"""Tokens of the long sample, if samples of the run can be that long. A length in a model's code beyond it is not seen."""
SHORT = 40
OWN = 24
"""Tokens of the longer one of two completions."""


def long_sample(max_sample: int | None, stretch: int = 1) -> int:
    """Tokens of the longest sample that is compared; ``max_sample`` is the run's (None: any)."""
    return min(LONG * stretch, max_sample or LONG * stretch)


def beyond_reach(
    config: PretrainedConfig,
    max_sample: int | None,
    small: Small,
    seed: int,
    stretch: int,
    mode: Callable[[], AbstractContextManager[Any]],
    exact: float,
) -> str:
    """Why a model must not be trained that is exact on short samples and few layers; empty if these are as well. Arguments as those
    of ``prove``; ``exact`` is the largest difference of a log-prob that is rounding in ``mode``."""
    long, layers = long_sample(max_sample, stretch), config.get_text_config().num_hidden_layers
    roomy = small._replace(unreached=max(small.unreached, 2 * long))
    few = shrink(config, max_sample, roomy)
    found = ""
    if long > SHORT:
        found = _difference(few, long, f"in samples of {long} tokens", seed, mode, exact)
    if not found and few.get_text_config().num_hidden_layers < layers:
        whole = shrink(config, max_sample, roomy, all_layers=True)
        found = _difference(whole, SHORT, f"in a copy with all of its {layers} layers", seed, mode, exact)
    return found


def _difference(
    config: PretrainedConfig,
    length: int,
    where: str,
    seed: int,
    mode: Callable[[], AbstractContextManager[Any]],
    exact: float,
) -> str:
    untouched, grouped = twins(config, seed, 10 * MOST_PARAMETERS)  # all layers are that many times as large
    texts, images = _texts(config.get_text_config().vocab_size, length, seed), None
    with mode(), torch.no_grad():
        policy = Policy(grouped)
        if policy.vision:
            images = RandomImages(config, untouched, seed)
            samples, policy.vision.pixels = images.long_samples(texts), images.pixels
        else:
            prompt, first, second, short, third = texts
            samples = tokens_as_samples([prompt, short], [[first, second], [third]])
        batch, more = build_batch(Forest.of(samples)), reference_inputs(untouched, images)
        size = (policy(batch).logprobs - reference_logprobs(untouched, samples, more=more)).abs().max().item()
        if size <= exact:
            return ""
        part = first_difference(untouched, policy, samples, batch, more)
    return f"log-probs differ from the untouched model's by {size:.1e} nats {where} (small, in float64); {part}"


def _texts(vocab: int, length: int, seed: int) -> list[list[int]]:
    """A prompt and two completions, of which the longer sample has ``length`` tokens; a short prompt and its completion."""
    generator = torch.Generator().manual_seed(seed)
    lengths = length - OWN, OWN // 2, OWN, OWN // 2, OWN
    return [torch.randint(3, vocab - 4, (n,), generator=generator).tolist() for n in lengths]
