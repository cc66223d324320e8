"""Compares the GPU's kernels with the untouched model, in bfloat16, before a model is trained there for the first time.

The proof (``proof.py``) is of float64 on a CPU, and of small heads. This one has the model's own widths, heads and windows, but
only a layer of every kind, with random weights: so it fits beside anything.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from pgrpo.admission.compare import gradients, reference_logprobs, tokens_as_samples, untouched_model
from pgrpo.admission.linear import release
from pgrpo.admission.models import cache_file
from pgrpo.admission.shrink import few_layers
from pgrpo.attention.choose import AttentionChoice
from pgrpo.attention.hook import ATTENTION_NAME
from pgrpo.config import ConfigError
from pgrpo.model.families.linear import has_state, plain_functions
from pgrpo.model.policy import Policy
from pgrpo.packing.batch import build_batch
from pgrpo.packing.forest import Forest
from pgrpo.planning.dims import is_stack
from pgrpo.planning.hub import new_model
from pgrpo.types import Sample
from pgrpo.vision.families import attention_names

log = logging.getLogger(__name__)
PROMPTS, PROMPT_TOKENS, COMPLETIONS, COMPLETION_TOKENS = 2, 2048, 4, 256
"""What is compared at most: prompts of the run, with completions of random tokens."""
MOST_ERROR = 2.0
"""Times the error of the untouched model in bfloat16."""


def check_on_device(
    path: str, config: PretrainedConfig, prompts: Sequence[list[int]], attention: AttentionChoice, device: torch.device
) -> None:
    """Refuse a model whose grouped log-probs in bfloat16 are further from float32 than twice the untouched model's own. Once for a
    model, kernel and device; what was found is kept in a file.

    Args:
        path: ``model.path``, for the message.
        config: of the model.
        prompts: tokens of some of the run's prompts.
        attention: how the run computes attention.
        device: where it trains.

    Raises:
        ConfigError: with both errors.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    file = cache_file(config, f"{name} {attention.kernel}", *kernel_releases())
    if file.is_file():
        return
    vocab = config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    chosen = [ids[-PROMPT_TOKENS:] for ids in prompts[:PROMPTS]]
    completions = torch.randint(vocab, (len(chosen), COMPLETIONS, COMPLETION_TOKENS), generator=generator).tolist()
    ours, theirs, *of_gradients = bfloat16_errors(config, tokens_as_samples(chosen, completions), attention, device)
    found = f"log-probs in bfloat16 are {ours:.1e} nats from float32 (rms), the untouched model's {theirs:.1e}"
    if of_gradients:
        found += "; gradients of linear attention and experts {:.1e} (relative), the untouched model's {:.1e}".format(
            *of_gradients
        )
    if not ours <= MOST_ERROR * theirs or (of_gradients and not of_gradients[0] <= MOST_ERROR * of_gradients[1]):
        raise ConfigError(
            f"model.path={path}: on {name}, with the {attention.kernel} attention kernel, {found}: more than twice"
        )
    log.info("on %s, in a layer of each kind: %s", name, found)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"ours": ours, "theirs": theirs}))


def kernel_releases() -> list[str]:
    """Packages that kernels come from, with their releases."""
    return [f"{package} {release(package)}" for package in ("triton", "fla-core", "tilelang", "flash-attn-4")]


def bfloat16_errors(
    config: PretrainedConfig, samples: Sequence[Sample], attention: AttentionChoice, device: torch.device
) -> tuple[float, ...]:
    """Root mean square of the log-probs' errors in bfloat16 against float32: grouped, and untouched. Of a model with linear
    attention or stacked experts also the relative errors of these modules' gradients, which the proof computes by other code: the
    kernels are another package's and were wrong once, or compute in half precision alone."""
    few = few_layers(config)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        untouched = untouched_model(partial(random_model, few)).eval()
        grouped = random_model(few, ATTENTION_NAME).eval()
    policy = Policy(grouped, attention=attention)

    def own_backward(part: nn.Module) -> bool:
        return has_state(part) or is_stack(part)

    compares_gradients = any(map(own_backward, grouped.modules()))

    def measured(model: PreTrainedModel, logprobs: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
        with nullcontext() if compares_gradients else torch.no_grad():
            found = logprobs()
            own = {id(p) for part in model.modules() if own_backward(part) for p in part.parameters()}
            pairs = zip(model.parameters(), gradients(found, model), strict=True) if compares_gradients else ()
            return found.detach().float(), [gradient.float() for p, gradient in pairs if id(p) in own]

    with plain_functions():
        wanted = measured(untouched, lambda: reference_logprobs(untouched, samples))
        theirs = measured(untouched.bfloat16(), lambda: reference_logprobs(untouched, samples))
    grouped.bfloat16().load_state_dict(untouched.state_dict())
    batch = build_batch(Forest.of(samples), device=device, attention=policy.attention)
    ours = measured(grouped, lambda: policy(batch).logprobs)
    errors = [(x - wanted[0]).square().mean().sqrt().item() for x, _ in (ours, theirs)]
    for _, found in (ours, theirs) if compares_gradients else ():
        off = sum((a - b).square().sum() for a, b in zip(found, wanted[1], strict=True))
        errors.append((off / sum(g.square().sum() for g in wanted[1])).sqrt().item())  # pyright: ignore[reportAttributeAccessIssue]
    return tuple(errors)


def random_model(config: PretrainedConfig, attention: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of that shape with random weights, on the default device."""
    return new_model(config, attention_names(config, attention), dtype=dtype)
