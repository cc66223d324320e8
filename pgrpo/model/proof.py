"""Proves that grouped attention is exact on a model: compares it with the untouched model, and with seeded bugs that the same
comparison must detect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pgrpo.attention.layout import PackedLayout
from pgrpo.packing.batch import GroupedBatch
from pgrpo.packing.forest import Tree, trees_of
from pgrpo.types import Episode, Group, Prompt, Sample


@dataclass(frozen=True)
class Difference:
    """How much two computations of the same log-probs and gradients differ.

    Attributes:
        logprob: the largest absolute difference over all completion tokens, in nats.
        gradient: norm of the difference of all gradients over the norm of the reference's.
    """

    logprob: float
    gradient: float


def reference_logprobs(model: nn.Module, trees: Sequence[Tree], temperature: float = 1.0) -> Tensor:
    """[L] log-probs of all tokens behind a prompt, from the logits of an untouched model, one unpadded sample a call.

    Args:
        model: ``AutoModelForCausalLM`` as transformers loads it (sdpa).
        trees: in the order in which they are packed.
        temperature: logits are divided by it.
    """
    device = next(model.parameters()).device
    rows = []
    for tree in trees:
        start = len(tree.prompt_ids)
        for sample in tree.samples:
            if sample.token_ids:
                ids = torch.tensor([tree.prompt_ids + sample.token_ids], device=device)
                logprobs = (model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1] / temperature).log_softmax(
                    -1
                )
                rows.append(logprobs.gather(-1, ids[0, start:, None]).squeeze(-1))
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


def sees_its_neighbour(batch: GroupedBatch) -> GroupedBatch:
    """Seeded bug: the second child of the first node that has two attends to the first child."""
    lengths, parents = ([getattr(node, name) for node in batch.layout.nodes] for name in ("length", "parent"))
    second = next(i for i in range(1, len(parents)) if parents[i] == parents[i - 1] >= 0)
    lengths[second - 1 : second + 1] = [lengths[second - 1] + lengths[second]]
    del parents[second]
    parents = [p - (p >= second) for p in parents]
    return replace(batch, layout=PackedLayout(lengths, parents, batch.logit_index.device))


def positions_go_on(batch: GroupedBatch) -> GroupedBatch:
    """Seeded bug: position ids do not restart."""
    rows = torch.arange(batch.packed_tokens, device=batch.logit_index.device)
    return replace(batch, inputs=batch.inputs | {"position_ids": rows})


def wrong_first_row(batch: GroupedBatch) -> GroupedBatch:
    """Seeded bug: the first token of the first completion is predicted by the row before the last prompt row."""
    wrong = batch.logit_index.clone()
    wrong[0] -= 1
    return replace(batch, logit_index=wrong)


SEEDED_BUGS: dict[str, Callable[[GroupedBatch], GroupedBatch]] = {
    "a completion sees its neighbour": sees_its_neighbour,
    "positions do not restart": positions_go_on,
    "wrong row for the first token": wrong_first_row,
}
"""A comparison that does not detect each of these proves nothing. The first group needs a prompt of at least two tokens, a
completion that is not empty, and then one of at least two tokens: the last row of a completion predicts nothing, so a bug in the
attention of its only row would not show."""


def tokens_as_trees(prompts: Sequence[list[int]], completions: Sequence[Sequence[list[int]]]) -> list[Tree]:
    """A forest of the given tokens, with advantages that differ, for comparisons and benchmarks."""
    return trees_of(tokens_as_groups(prompts, completions))


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
