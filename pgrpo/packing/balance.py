"""Divides trees into micro-batches of the token budget and distributes them over ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from pgrpo.packing.forest import Tree, packed_tokens
from pgrpo.types import Sample


def share_out(
    trees: Sequence[Tree],
    dp_size: int,
    token_budget: int,
    cost: Callable[[Tree], float],
    *,
    share_prompts: bool = True,
) -> list[list[list[Tree]]]:
    """Micro-batches of every rank: ``plan[rank][i]`` is a list of trees of at most ``token_budget`` packed tokens.

    The costliest remaining tree goes to the rank with the least cost so far (longest-processing-time rule). All ranks get the same
    number of micro-batches, as FSDP requires: a rank with fewer gets fillers, the cheapest sample with no token in the loss.
    """
    pieces = [piece for tree in trees for piece in split_to_budget(tree, token_budget, share_prompts)]
    costs = [cost(piece) for piece in pieces]
    loads = [0.0] * dp_size
    owned: list[list[Tree]] = [[] for _ in range(dp_size)]
    for i in sorted(range(len(pieces)), key=lambda i: -costs[i]):
        rank = loads.index(min(loads))
        owned[rank].append(pieces[i])
        loads[rank] += costs[i]
    plan = [fill_micro_batches(own, token_budget, lambda g: packed_tokens(g, share_prompts), cost) for own in owned]
    rounds = max(len(batches) for batches in plan)
    if rounds:
        filler = weightless(min(pieces, key=packed_tokens))
        for batches in plan:
            batches.sort(
                key=lambda batch: sum(map(cost, batch)), reverse=True
            )  # ranks wait for each other: equal costs at a time
            batches.extend([filler] for _ in range(rounds - len(batches)))
    return plan


def weightless(tree: Tree) -> Tree:
    """The shortest sample of the tree, with no token in the loss."""
    shortest = min(tree.samples, key=lambda sample: len(sample.token_ids))
    length = len(shortest.token_ids)
    masked = replace(shortest, mask=[False] * length, advantages=[0.0] * length)
    return Tree(tree.prompt_ids, [masked], is_filler=True)


def split_to_budget(tree: Tree, token_budget: int, share_prompts: bool = True) -> list[Tree]:
    """Split a tree that is larger than the budget into trees that fit, each with its own copy of the prompt.

    Raises:
        ValueError: a single sample is larger than the budget.
    """
    pieces: list[list[Sample]] = []
    room = 0
    prompt = len(tree.prompt_ids)
    for sample, length in zip(tree.samples, tree.lengths, strict=True):
        if prompt + length > token_budget:
            raise ValueError(
                f"a sample of {prompt + length} tokens does not fit train.token_budget={token_budget}: "
                "raise train.token_budget or lower data.max_prompt_tokens or rollout.max_completion_tokens"
            )
        needed = length if share_prompts else prompt + length
        if not pieces or needed > room:
            pieces.append([])
            room = token_budget - (prompt if share_prompts else 0)
        pieces[-1].append(sample)
        room -= needed
    return [tree] if len(pieces) == 1 else [tree.with_samples(piece) for piece in pieces]


def fill_micro_batches(
    trees: Sequence[Tree],
    token_budget: int,
    size: Callable[[Tree], int] = packed_tokens,
    cost: Callable[[Tree], float] | None = None,
) -> list[list[Tree]]:
    """Bins of at most ``token_budget`` tokens and about equal cost (default: ``size``), as few as first-fit decreasing finds.

    Costs should be equal because ranks wait for each other in every micro-batch. Deterministic. Every tree must fit the budget.
    """
    bins = _first_fit(trees, token_budget, size)
    return _even_out(trees, token_budget, size, cost or size, len(bins)) or bins


def _even_out(
    trees: Sequence[Tree],
    token_budget: int,
    size: Callable[[Tree], int],
    cost: Callable[[Tree], float],
    count: int,
) -> list[list[Tree]] | None:
    """Put the costliest remaining tree into the cheapest bin with room for it; None if a tree finds no room."""
    bins: list[list[Tree]] = [[] for _ in range(count)]
    room, load = [token_budget] * count, [0.0] * count
    for tree in sorted(trees, key=cost, reverse=True):
        tokens = size(tree)
        slot = min((i for i in range(count) if tokens <= room[i]), key=load.__getitem__, default=None)
        if slot is None:
            return None
        bins[slot].append(tree)
        room[slot] -= tokens
        load[slot] += cost(tree)
    return bins


def _first_fit(trees: Sequence[Tree], token_budget: int, size: Callable[[Tree], int]) -> list[list[Tree]]:
    bins: list[list[Tree]] = []
    room: list[int] = []
    for tree in sorted(trees, key=size, reverse=True):
        tokens = size(tree)
        if tokens > token_budget:
            raise ValueError(f"a tree of {tokens} tokens does not fit a budget of {token_budget}: split it first")
        slot = next((i for i, free in enumerate(room) if tokens <= free), None)
        if slot is None:
            slot = len(bins)
            bins.append([])
            room.append(token_budget)
        bins[slot].append(tree)
        room[slot] -= tokens
    return bins
