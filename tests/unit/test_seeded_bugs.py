"""Bugs that are seeded into a batch are in every group: a single one may show nothing, where completions are short and sure."""

from pgrpo.admission.compare import tokens_as_samples
from pgrpo.admission.seeded_bugs import sees_its_neighbour, wrong_parent
from pgrpo.packing.batch import build_batch
from pgrpo.packing.forest import Forest


def nodes_of(batch):
    return [(node.length, node.parent) for node in batch.layout.nodes]


def test_bugs_are_seeded_into_all_groups():
    """Rows and parents of: two prompts, and three completions of each, one of a single token."""
    samples = tokens_as_samples([[5, 6, 7], [8, 9]], [[[1, 2], [3, 4, 5], [6, 7]], [[2, 1], [3], [4, 4]]])
    batch = build_batch(Forest.of(samples))
    assert nodes_of(batch) == [(3, -1), (2, -1), (2, 0), (3, 0), (2, 0), (2, 1), (1, 1), (2, 1)]
    neighbour, parent = sees_its_neighbour(batch), wrong_parent(batch)
    assert neighbour is not None and parent is not None
    assert nodes_of(neighbour) == [(3, -1), (2, -1), (5, 0), (2, 0), (2, 1), (3, 1)]
    assert nodes_of(parent) == [(3, -1), (2, -1), (2, 0), (3, 0), (2, 1), (2, 1), (1, 1), (2, 1)]
    alone = build_batch(Forest.of(samples[:1]))
    assert sees_its_neighbour(alone) is None and wrong_parent(alone) is None
    more = build_batch(Forest.of([*samples, *tokens_as_samples([[9, 9]], [[[1, 2], [3, 3]]])]))
    parent = wrong_parent(more)
    assert parent is not None and [p for _, p in nodes_of(parent)] == [-1, -1, -1, 0, 0, 1, 1, 1, 2, 2, 2]
