"""Bugs that are seeded into a packed batch. A comparison that does not detect each of them proves nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from pgrpo.attention.layout import PackedLayout
from pgrpo.packing.batch import GroupedBatch


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
"""By name. None where a batch has no place for the bug: two prompts with two completions each have one for all, if these are of at
least two tokens and differ from the first on. (The last row of a completion predicts nothing, so a bug in the attention of its only
row would not show.)"""
