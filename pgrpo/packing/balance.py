"""A step's groups shared out: cut to the token budget, filled into micro-batches, and spread over ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from pgrpo.packing.batch import packed_tokens
from pgrpo.types import Group


def share_out(
    groups: Sequence[Group],
    dp_size: int,
    token_budget: int,
    cost: Callable[[Group], float],
    *,
    share_prompts: bool = True,
) -> list[list[list[Group]]]:
    """Micro-batches of every rank: ``plan[rank][i]`` is a list of groups of at most ``token_budget`` packed tokens.

    The costliest group goes to the rank that has least so far (longest-processing-time rule). All ranks get the same number of
    micro-batches: a rank that is short of some runs fillers, which cost as little as can be and weigh nothing in the loss.
    """
    pieces = [piece for group in groups for piece in split_to_budget(group, token_budget, share_prompts)]
    costs = [cost(piece) for piece in pieces]
    loads = [0.0] * dp_size
    owned: list[list[Group]] = [[] for _ in range(dp_size)]
    for i in sorted(range(len(pieces)), key=lambda i: -costs[i]):
        rank = loads.index(min(loads))
        owned[rank].append(pieces[i])
        loads[rank] += costs[i]
    plan = [fill_micro_batches(own, token_budget, lambda g: packed_tokens(g, share_prompts), cost) for own in owned]
    rounds = max(len(batches) for batches in plan)
    if rounds:
        filler = weightless(min(pieces, key=packed_tokens))
        for batches in plan:
            batches.sort(key=lambda batch: sum(map(cost, batch)), reverse=True)  # ranks run alike ones side by side
            batches.extend([filler] for _ in range(rounds - len(batches)))
    return plan


def weightless(group: Group) -> Group:
    """One sample of the group that takes no part in the loss."""
    shortest = min(group.completions, key=lambda c: len(c.token_ids))
    return replace(
        group,
        completions=[replace(shortest, mask=[False] * len(shortest.mask))],
        rewards=[None],
        reward_parts={},
        advantages=[0.0],
    )


def without_text(group: Group) -> Group:
    """What the loss needs of a group: no text, no columns of the data set."""
    return replace(
        group,
        prompt=replace(group.prompt, text="", columns={}, messages=None),
        completions=[replace(c, text="") for c in group.completions],
    )


def split_to_budget(group: Group, token_budget: int, share_prompts: bool = True) -> list[Group]:
    """Cut a group that is larger than the budget into sub-groups that fit, each with its own copy of the prompt.

    Raises:
        ValueError: one sample alone is larger than the budget.
    """
    pieces: list[list[int]] = []
    room = 0
    prompt = len(group.prompt.token_ids)
    for i, completion in enumerate(group.completions):
        length = len(completion.token_ids)
        if prompt + length > token_budget:
            raise ValueError(
                f"a sample of {prompt + length} tokens does not fit train.token_budget={token_budget}: "
                "raise train.token_budget or lower data.max_prompt_tokens or rollout.max_completion_tokens"
            )
        needed = length if share_prompts else prompt + length
        if not pieces or needed > room:
            pieces.append([])
            room = token_budget - (prompt if share_prompts else 0)
        pieces[-1].append(i)
        room -= needed
    return [group] if len(pieces) == 1 else [select(group, piece) for piece in pieces]


def select(group: Group, samples: Sequence[int]) -> Group:
    """The group with only these samples; advantages and rewards stay what they were in the whole group."""
    return replace(
        group,
        completions=[group.completions[i] for i in samples],
        rewards=[group.rewards[i] for i in samples],
        reward_parts={name: [values[i] for i in samples] for name, values in group.reward_parts.items()},
        advantages=[group.advantages[i] for i in samples],
    )


def fill_micro_batches(
    groups: Sequence[Group],
    token_budget: int,
    size: Callable[[Group], int] = packed_tokens,
    cost: Callable[[Group], float] | None = None,
) -> list[list[Group]]:
    """As few bins as first-fit decreasing finds, of at most ``token_budget`` tokens and about equal cost (``size`` unless given).

    Sharded ranks wait for each other in every micro-batch, so equal costs count. Deterministic. Every group must fit on its own.
    """
    bins = _first_fit(groups, token_budget, size)
    return _even_out(groups, token_budget, size, cost or size, len(bins)) or bins


def _even_out(
    groups: Sequence[Group],
    token_budget: int,
    size: Callable[[Group], int],
    cost: Callable[[Group], float],
    count: int,
) -> list[list[Group]] | None:
    """The costliest group goes to the cheapest bin that has room for it; None if one finds no room that way."""
    bins: list[list[Group]] = [[] for _ in range(count)]
    room, load = [token_budget] * count, [0.0] * count
    for group in sorted(groups, key=cost, reverse=True):
        tokens = size(group)
        slot = min((i for i in range(count) if tokens <= room[i]), key=load.__getitem__, default=None)
        if slot is None:
            return None
        bins[slot].append(group)
        room[slot] -= tokens
        load[slot] += cost(group)
    return bins


def _first_fit(groups: Sequence[Group], token_budget: int, size: Callable[[Group], int]) -> list[list[Group]]:
    bins: list[list[Group]] = []
    room: list[int] = []
    for group in sorted(groups, key=size, reverse=True):
        tokens = size(group)
        if tokens > token_budget:
            raise ValueError(f"a group of {tokens} tokens does not fit a budget of {token_budget}: split it first")
        slot = next((i for i, free in enumerate(room) if tokens <= free), None)
        if slot is None:
            slot = len(bins)
            bins.append([])
            room.append(token_budget)
        bins[slot].append(group)
        room[slot] -= tokens
    return bins
