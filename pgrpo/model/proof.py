"""Proves that grouped attention is exact on a model: compares it with the untouched model, and with seeded bugs that the same
comparison must detect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pgrpo.attention.layout import PackedLayout
from pgrpo.model.head import NEVER
from pgrpo.packing.batch import GroupedBatch
from pgrpo.types import Episode, Group, Prompt, Sample
from pgrpo.vision.families import never_sampled


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
            rows.append((logits / temperature).log_softmax(-1).gather(-1, ids[0, start:, None]).squeeze(-1))
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


def sees_its_neighbour(batch: GroupedBatch) -> GroupedBatch | None:
    """Seeded bug: a child of at least two rows attends to the child before it."""
    nodes = batch.layout.nodes
    lengths, parents = [node.length for node in nodes], [node.parent for node in nodes]
    for second in range(1, len(nodes)):
        if parents[second] == parents[second - 1] >= 0 and lengths[second] > 1:
            lengths[second - 1 : second + 1] = [lengths[second - 1] + lengths[second]]
            parents = [p - (p >= second) for i, p in enumerate(parents) if i != second]
            return replace(batch, layout=PackedLayout(lengths, parents, batch.logit_index.device))
    return None


def wrong_parent(batch: GroupedBatch) -> GroupedBatch | None:
    """Seeded bug: the last child of a node, of at least two rows, is below the node's neighbour."""
    nodes = batch.layout.nodes
    parents = [node.parent for node in nodes]
    for parent, child in {parent: i for i, parent in enumerate(parents) if parent >= 0}.items():
        if nodes[child].length > 1 and nodes[parent + 1].depth == nodes[parent].depth:
            parents[child] += 1
            layout = PackedLayout([node.length for node in nodes], parents, batch.logit_index.device)
            return replace(batch, layout=layout)
    return None


def positions_go_on(batch: GroupedBatch) -> GroupedBatch:
    """Seeded bug: position ids do not restart."""
    rows = torch.arange(batch.packed_tokens, device=batch.logit_index.device)
    return replace(batch, inputs=batch.inputs | {"position_ids": rows})


def position_off(batch: GroupedBatch) -> GroupedBatch | None:
    """Seeded bug: every node begins one position behind the end of its parent."""
    shifts = [torch.full((node.length,), node.depth) for node in batch.layout.nodes]
    positions = batch.inputs["position_ids"] + torch.cat(shifts).to(batch.logit_index.device)
    has_children = batch.layout.nodes[-1].depth > 0
    return replace(batch, inputs=batch.inputs | {"position_ids": positions}) if has_children else None


def wrong_first_row(batch: GroupedBatch) -> GroupedBatch:
    """Seeded bug: a token is predicted by the row in front of the one that does."""
    wrong = batch.logit_index.clone()
    wrong[int((wrong > 0).int().argmax())] -= 1
    return replace(batch, logit_index=wrong)


SEEDED_BUGS: dict[str, Callable[[GroupedBatch], GroupedBatch | None]] = {
    "a completion sees its neighbour": sees_its_neighbour,
    "a wrong parent": wrong_parent,
    "positions do not restart": positions_go_on,
    "a position off": position_off,
    "wrong row for a token": wrong_first_row,
}
"""A comparison that does not detect each of these proves nothing. None where a batch has no place for the bug: two prompts with two
completions each have one for all, if these are of at least two tokens and differ from the first on. (The last row of a completion
predicts nothing, so a bug in the attention of its only row would not show.)"""


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
