"""Compares log-probs and gradients of a policy with those of the untouched model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pgrpo.model.head import NEVER
from pgrpo.model.policy import Policy
from pgrpo.packing.batch import GroupedBatch
from pgrpo.packing.forest import length
from pgrpo.types import Episode, Group, Prompt, Sample
from pgrpo.vision.families import never_sampled
from pgrpo.vision.rows import predicted_ids


def _nothing(_: Sample) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Difference:
    """How much two computations of the same log-probs and gradients differ.

    Attributes:
        logprob: the largest absolute difference over all completion tokens, in nats.
        gradient: norm of the difference of all gradients over the norm of the reference's.
    """

    logprob: float
    gradient: float


def untouched_model(make: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    """What ``make`` makes of the name of an attention: sdpa, or eager for a model that has no sdpa or whose scores are soft-capped,
    which sdpa leaves out without a word (transformers 5.19; 5.23 has no sdpa for these)."""
    try:
        model = make("sdpa")
    except ValueError:
        return make("eager")
    return make("eager") if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) else model


def reference_logprobs(
    model: nn.Module,
    samples: Sequence[Sample],
    temperature: float = 1.0,
    more: Callable[[Sample], dict[str, Any]] = _nothing,
) -> Tensor:
    """[L] log-probs of all tokens behind a prompt, from the logits of an untouched model, one unpadded sample a call.

    Args:
        model: ``AutoModelForCausalLM`` as transformers loads it (sdpa).
        samples: in the order of the batch.
        temperature: logits are divided by it.
        more: further arguments of the model for a sample: pixels of its images.
    """
    device = next(model.parameters()).device
    never = torch.tensor(never_sampled(model.config), dtype=torch.long, device=device)  # pyright: ignore[reportArgumentType]
    rows = []
    for sample in samples:
        if sample.token_ids:
            start = len(sample.prompt_ids)
            ids = torch.tensor([sample.prompt_ids + sample.token_ids], device=device)
            logits = model(input_ids=ids, use_cache=False, **more(sample)).logits[0, start - 1 : -1]
            logits = logits.index_fill(1, never, NEVER)
            targets = torch.tensor(predicted_ids(sample), device=device)[:, None]
            rows.append((logits / temperature).log_softmax(-1).gather(-1, targets).squeeze(-1))
    return torch.cat(rows)


def gradients(logprobs: Tensor, module: nn.Module) -> list[Tensor]:
    """Gradients of a fixed random combination of log-probs, one for each trained parameter (0 for one without influence). Leaves
    ``.grad`` alone."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(len(logprobs), generator=generator, dtype=torch.float64).to(logprobs)
    trained = [p for p in module.parameters() if p.requires_grad]
    return list(torch.autograd.grad((weights * logprobs).sum(), trained, allow_unused=True, materialize_grads=True))


def difference(
    policy: nn.Module, batch: GroupedBatch, wanted: Tensor, wanted_gradients: Sequence[Tensor]
) -> Difference:
    """Difference between the policy's log-probs and gradients on a batch and the wanted ones."""
    logprobs: Tensor = policy(batch).logprobs
    got = gradients(logprobs, policy)
    pairs = list(zip(got, wanted_gradients, strict=True))
    error = sum((g.double() - w.double()).square().sum() for g, w in pairs)
    size = sum(w.double().square().sum() for _, w in pairs)
    largest = (logprobs.detach().double() - wanted.detach().double()).abs().max()
    return Difference(largest.item(), (error / size).sqrt().item())  # pyright: ignore[reportAttributeAccessIssue]


def first_difference(
    untouched: nn.Module,
    policy: Policy,
    samples: Sequence[Sample],
    batch: GroupedBatch,
    more: Callable[[Sample], dict[str, Any]] = _nothing,
) -> str:
    """Name the first module, in the order in which they finish, whose outputs differ between both models."""
    with torch.no_grad():
        with _outputs(policy.model) as ours:
            policy(batch)
        parts: dict[str, list[Tensor]] = {}
        for sample in samples:
            if sample.token_ids:
                start = len(sample.prompt_ids)
                with _outputs(untouched) as theirs:
                    ids = torch.tensor([sample.prompt_ids + sample.token_ids])
                    untouched(input_ids=ids, use_cache=False, **more(sample))
                for name, x in theirs.items():
                    if x.ndim >= 2 and x.shape[:2] == (1, length(sample)):
                        parts.setdefault(name, []).append(x[0, start - 1 : -1])
    for name, x in ours.items():
        if x.ndim < 2 or x.shape[:2] != (1, batch.packed_tokens) or name not in parts:
            continue
        wanted = torch.cat(parts[name])
        got = x[0].index_select(0, batch.logit_index)
        if wanted.shape != got.shape or not (got - wanted).abs().max() <= 1e-6 * (1 + wanted.abs().max()):
            return f"hidden states part in {name} ({type(policy.model.get_submodule(name)).__name__})"
    return "hidden states are equal"


@contextmanager
def _outputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collects the first output of every module by its name, in the order in which modules finish."""
    found: dict[str, Tensor] = {}

    def keep(name: str, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor):
            found[name] = first

    hooks = [
        m.register_forward_hook(lambda *a, name=name: keep(name, a[-1])) for name, m in model.named_modules() if name
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def tokens_as_samples(prompts: Sequence[list[int]], completions: Sequence[Sequence[list[int]]]) -> list[Sample]:
    """Samples of the given tokens, with advantages that differ, for comparisons and benchmarks."""
    return [sample for group in tokens_as_groups(prompts, completions) for sample in group.samples]


def tokens_as_groups(prompts: Sequence[list[int]], completions: Sequence[Sequence[list[int]]]) -> list[Group]:
    """Groups of the given tokens, with rewards 0, 1, 2, ... and advantages around their mean."""
    groups = []
    for index, (prompt, sampled) in enumerate(zip(prompts, completions, strict=True)):
        group = Group(Prompt(index, "", prompt), [])
        for i, ids in enumerate(sampled):
            advantage = i - (len(sampled) - 1) / 2
            sample = Sample(prompt, ids, [True] * len(ids), [0.0] * len(ids), advantages=[advantage] * len(ids))
            group.episodes.append(Episode([sample], "", "stop", reward=float(i)))
        groups.append(group)
    return groups
