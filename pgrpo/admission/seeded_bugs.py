"""Bugs that are seeded into a packed batch. A comparison that does not detect each of them proves nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from pgrpo.attention.layout import PackedLayout
from pgrpo.packing.batch import GroupedBatch


def sees_its_neighbour(batch: GroupedBatch) -> GroupedBatch | None:
    """Seeded bug: children of at least two rows attend to the child before them, in pairs. One pair of completions of a few sure
    tokens might show nothing."""
    nodes = batch.layout.nodes
    lengths: list[int] = []
    parents: list[int] = []
    numbers: list[int] = []  # of each node, its number when children are joined
    for i, node in enumerate(nodes):
        is_second = i and node.parent == nodes[i - 1].parent >= 0 and node.length > 1
        if is_second and (i < 2 or numbers[i - 1] != numbers[i - 2]):  # in pairs
            numbers.append(numbers[i - 1])
            lengths[-1] += node.length
        else:
            numbers.append(len(lengths))
            lengths.append(node.length)
            parents.append(numbers[node.parent] if node.parent >= 0 else -1)
    if len(lengths) == len(nodes):
        return None
    return replace(batch, layout=PackedLayout(lengths, parents, batch.logit_index.device))


def wrong_parent(batch: GroupedBatch) -> GroupedBatch | None:
    """Seeded bug: the last child of each node, of at least two rows, is below the node's neighbour."""
    nodes = batch.layout.nodes
    parents = [node.parent for node in nodes]
    last_children = {parent: i for i, parent in enumerate(parents) if parent >= 0}
    moved = [
        child
        for parent, child in last_children.items()
        if nodes[child].length > 1 and nodes[parent + 1].depth == nodes[parent].depth
    ]
    if not moved:
        return None
    for child in moved:
        parents[child] += 1
    layout = PackedLayout([node.length for node in nodes], parents, batch.logit_index.device)
    return replace(batch, layout=layout)


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
"""By name. None where a batch has no place for the bug: two prompts with two completions each have one for all, if these are of at
least two tokens and differ from the first on. (The last row of a completion predicts nothing, so a bug in the attention of its only
row would not show.)"""
