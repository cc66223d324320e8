"""Samples -> forest -> tensors: the worked example by hand, random samples against a plain dictionary of prefixes, counts."""

import random
from dataclasses import replace

import pytest
import torch

from pgrpo.attention.layout import unpack_calls
from pgrpo.attention.reference import attention_mask
from pgrpo.packing.batch import TokenCounts, build_batch
from pgrpo.packing.forest import Forest, Sorted, length
from pgrpo.planning.flops import pairs
from pgrpo.types import Sample


def sample(prompt, token_ids, mask=None, advantages=None):
    n = len(token_ids)
    return Sample(
        prompt, token_ids, mask or [True] * n, [-0.5 * (i + 1) for i in range(n)], advantages=advantages or [1.0] * n
    )


S, A, B = [1, 2], [1, 2, 3], [1, 2, 4, 5]


def worked_example():
    return [
        sample(A, [7, 8], mask=[True, False], advantages=[1.0, 2.0]),
        sample(A, [9], advantages=[-1.0]),
        sample(B, [6, 6], advantages=[0.5, 0.5]),
    ]


def test_the_worked_example():
    batch = build_batch(Forest.of(worked_example()))
    assert batch.inputs["input_ids"].tolist() == [1, 2, 3, 4, 5, 6, 6, 7, 8, 9]
    assert batch.inputs["position_ids"].tolist() == [0, 1, 2, 2, 3, 4, 5, 3, 4, 3]
    assert [tuple(node) for node in batch.layout.nodes] == [
        (0, 2, -1, 0, 0), (2, 1, 0, 1, 2), (3, 4, 0, 1, 2), (7, 2, 1, 2, 3), (9, 1, 1, 2, 3),
    ]  # fmt: skip
    assert batch.logit_index.tolist() == [2, 7, 2, 4, 5]
    assert batch.target_ids.tolist() == [7, 8, 9, 6, 6]
    assert batch.unpack_index.tolist() == [0, 1, 2, 4, 5]
    assert batch.mask.tolist() == [[True, False], [True, False], [True, True]]
    assert batch.advantages.tolist() == [[1, 2], [-1, 0], [0.5, 0.5]]  # one a token
    assert batch.rollout_logprobs.tolist() == [[-0.5, -1], [-0.5, 0], [-0.5, -1]]
    assert batch.rollout_logprobs.dtype == batch.advantages.dtype == torch.float32
    counts = batch.counts
    assert (counts.packed, counts.repeated, counts.shared_above_prompt, batch.packed_tokens) == (10, 5 + 4 + 6, 2, 10)
    work = batch.work
    assert (work.rows.sum(), work.scored.sum(), pairs(work).sum()) == (10, 5, attention_mask(batch.layout).sum())
    assert batch.distinct.tolist() == batch.pair_index.tolist() == [0, 1, 2, 3, 4]
    assert batch.old_logprobs is None


def test_a_flat_group_is_a_prompt_with_its_completions_in_two_calls():
    prompts = [[11, 12, 13], [14, 15]]
    samples = [
        sample(prompts[0], [21, 22]),
        sample(prompts[0], [31, 32, 33]),
        sample(prompts[1], [41]),
        sample(prompts[1], [51, 52]),
    ]
    batch = build_batch(Forest.of(samples))
    assert batch.inputs["input_ids"].tolist() == [11, 12, 13, 14, 15, 21, 22, 31, 32, 33, 41, 51, 52]
    assert batch.logit_index.tolist() == [2, 5, 2, 7, 8, 4, 4, 11]
    within, across = unpack_calls(batch.layout.passes(None).table)
    cu_seqlens = batch.layout.passes(None).cu_seqlens
    assert cu_seqlens.dtype == torch.int32
    assert [x.tolist() for x in within.on(cu_seqlens)[:2]] == [[0, 3, 5, 7, 10, 11, 13]] * 2
    assert [x.tolist() for x in across.on(cu_seqlens)[:2]] == [[0, 5, 8], [0, 3, 5]]
    assert (within[:4], within.max_q, within.causal) == ((0, 13, 0, 13), 3, 1)
    assert (across[:4], across.max_q, across.max_k, across.causal) == ((5, 13, 0, 5), 5, 3, 0)
    assert batch.counts.shared_above_prompt == 0


def test_repeated_prompts_pack_every_sample_as_a_sequence():
    batch, shared = build_batch(Forest.repeated(worked_example())), build_batch(Forest.of(worked_example()))
    assert batch.inputs["input_ids"].tolist() == [1, 2, 3, 7, 8, 1, 2, 3, 9, 1, 2, 4, 5, 6, 6]
    assert batch.inputs["position_ids"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5]
    assert [node.length for node in batch.layout.nodes] == [5, 4, 6]
    assert batch.logit_index.tolist() == [2, 3, 7, 12, 13]
    for name in ("target_ids", "unpack_index", "mask", "advantages", "rollout_logprobs"):
        assert torch.equal(getattr(batch, name), getattr(shared, name)), name
    assert batch.counts.packed == batch.counts.repeated == shared.counts.repeated
    assert len(build_batch(Forest.repeated([sample([1], [2])] * 3)).layout.nodes) == 3


def test_samples_that_end_inside_others_and_equal_ones_have_no_rows_of_their_own():
    """One node: the prompt, the prompt again, its beginning with a completion, and the longest of all twice."""
    samples = [
        sample([5, 6], []),
        sample([5, 6], [7]),
        sample([5], [6, 7, 8, 9]),
        sample([5, 6], []),
        sample([5], [6, 7, 8, 9]),
    ]
    batch = build_batch(Forest.of(samples))
    assert batch.inputs["input_ids"].tolist() == [5, 6, 7, 8, 9]
    assert len(batch.layout.nodes) == 1
    assert batch.logit_index.tolist() == [1, 0, 1, 2, 3, 0, 1, 2, 3]  # rows 0 to 3 have several tokens in the loss
    assert batch.target_ids.tolist() == [7, 6, 7, 8, 9, 6, 7, 8, 9]
    assert batch.mask.sum(1).tolist() == [0, 1, 4, 0, 4]
    assert batch.distinct.tolist() == [0, 1, 3, 4]  # of nine tokens, four have a log-prob of their own
    assert batch.pair_index.tolist() == [0, 1, 0, 2, 3, 1, 0, 2, 3]
    assert batch.work.scored.sum() == 4


def random_samples(rnd: random.Random) -> list[Sample]:
    """Few different tokens, so that samples share beginnings of all lengths, end inside others, and are equal."""
    most, vocabulary = rnd.choice([(3, 2), (12, 2), (12, 3), (30, 1), (9, 50)])
    shared = [[rnd.randrange(vocabulary) for _ in range(rnd.randint(1, most))] for _ in range(rnd.randint(1, 3))]
    samples = []
    for _ in range(rnd.randint(1, 14)):
        ids = [*rnd.choice(shared), *(rnd.randrange(vocabulary) for _ in range(rnd.randint(0, most)))]
        cut = rnd.randint(1, len(ids))
        samples.append(sample(ids[:cut], ids[cut:], mask=[rnd.random() < 0.7 for _ in ids[cut:]]))
    return samples


def test_a_thousand_random_forests_store_every_distinct_prefix_once_and_predict_from_it():
    """Against a dictionary: a row is a distinct prefix of token ids. Whom a row sees are the rows of its prefix's prefixes."""
    rnd = random.Random(0)
    for _ in range(1000):
        samples = random_samples(rnd)
        full = [tuple(s.prompt_ids + s.token_ids) for s in samples]
        prefixes = {ids[: i + 1] for ids in full for i in range(len(ids))}
        forest = Forest.of(samples)
        batch = build_batch(forest)
        nodes, mask = batch.layout.nodes, attention_mask(batch.layout)
        ids, positions = (batch.inputs[name].tolist() for name in ("input_ids", "position_ids"))
        seen = [
            tuple(ids[j] for j in row.nonzero().flatten().tolist()) for row in mask
        ]  # rows are in order of position
        order = [row.nonzero().flatten().tolist() for row in mask]
        assert all([positions[j] for j in row] == list(range(len(row))) for row in order)
        assert len(seen) == len(prefixes) == forest.rows
        assert set(seen) == prefixes
        wanted = [
            (s_ids[:t], s_ids[t])
            for s, s_ids in zip(samples, full, strict=True)
            for t in range(len(s.prompt_ids), len(s_ids))
        ]
        assert [
            (seen[row], t) for row, t in zip(batch.logit_index.tolist(), batch.target_ids.tolist(), strict=True)
        ] == wanted
        assert batch.unpack(torch.ones(len(wanted))).sum(1).tolist() == [len(s.token_ids) for s in samples]
        # A node ends only where samples diverge: no node has a single child, and no two children begin alike.
        children: dict[int, list[int]] = {}
        for node in nodes:
            children.setdefault(node.parent, []).append(ids[node.start])
        assert all(len(first) == len(set(first)) for first in children.values())
        assert all(len(first) > 1 for parent, first in children.items() if parent >= 0)
        assert pairs(batch.work).sum() == int(mask.sum())
        assert pairs(batch.work, 3).sum() == int(attention_mask(batch.layout, 3).sum())


def paths(forest: Forest) -> list[set[int]]:
    """The nodes of each sample."""
    found = []
    for node in forest.leaves:
        path = set()
        while node >= 0:
            path.add(node)
            node = forest.parents[node]
        found.append(path)
    return found


def test_beginnings_that_are_too_short_are_not_shared_and_others_still_are():
    rnd = random.Random(1)
    for _ in range(200):
        samples, least = random_samples(rnd), rnd.randint(2, 8)
        forest = Forest.of(samples, least)
        batch = build_batch(forest)
        for node in set(forest.parents) - {-1}:
            end = batch.layout.nodes[node].offset + forest.lengths[node]
            prompts = [len(s.prompt_ids) for s, path in zip(samples, paths(forest), strict=True) if node in path]
            assert forest.lengths[node] >= least or end - forest.lengths[node] < min(prompts) <= end
        assert Forest.of(samples).rows <= forest.rows <= sum(map(length, samples))
        mask = attention_mask(batch.layout)
        ids = batch.inputs["input_ids"].tolist()
        seen = [tuple(ids[j] for j in mask[row].nonzero().flatten().tolist()) for row in batch.logit_index.tolist()]
        full = [tuple(s.prompt_ids + s.token_ids) for s in samples]
        assert seen == [f[:t] for s, f in zip(samples, full, strict=True) for t in range(len(s.prompt_ids), len(f))]
        order = Sorted.of(samples)
        kept = order.kept(order.runs(least))
        assert sum(map(length, samples)) - kept.sum() == forest.rows


def test_a_prompt_is_always_shared():
    """With no other beginning shared, the forest is flat: what completions of a prompt begin alike is repeated."""
    samples = [sample(A, [7, 8]), sample(A, [7, 9]), sample(A, [9]), sample(B, [6]), sample(B, [7])]
    forest = Forest.of(samples, 100)
    assert (forest.lengths, forest.parents) == ([3, 4, 2, 2, 1, 1, 1], [-1, -1, 0, 0, 0, 1, 1])
    assert Forest.of(samples).rows == 2 + 1 + 2 + 4 + 2


def test_children_are_in_the_order_in_which_samples_first_go_through_them():
    batch = build_batch(Forest.of([sample([1, 2], [9, 3]), sample([1, 2], [5]), sample([1, 2], [9, 1])]))
    assert batch.inputs["input_ids"].tolist() == [1, 2, 9, 5, 3, 1]


def test_unpack_puts_values_in_their_rows_and_lets_gradients_through():
    batch = build_batch(Forest.of(worked_example()))
    flat = torch.arange(1.0, 6.0, requires_grad=True)
    rows = batch.unpack(flat)
    assert rows.tolist() == [[1, 2], [3, 0], [4, 5]]
    (rows * torch.arange(6.0).view(3, 2)).sum().backward()
    assert flat.grad is not None
    assert flat.grad.tolist() == [0, 1, 2, 4, 5]


def test_completions_of_no_token():
    nothing = build_batch(Forest.of([sample([1, 2], []), sample([1, 2], [])]))
    assert nothing.mask.shape == nothing.rollout_logprobs.shape == nothing.advantages.shape == (2, 0)
    assert len(nothing.logit_index) == 0
    assert nothing.unpack(torch.zeros(0)).shape == (2, 0)


@pytest.mark.parametrize(
    ("prompts", "saved"),
    [
        ([[1, 2, 3], [1, 2, 4]], 2),
        ([[1, 2, 3], [4, 5]], 0),
        ([[1, 2, 3], [1, 2, 3]], 3),  # two rows of the data set with one prompt
        ([[1, 2], [1, 2, 3, 4]], 2),
    ],
)
def test_what_prompts_share_with_each_other_is_counted(prompts, saved):
    samples = [sample(p, [9, i, i]) for i, p in enumerate(prompts)] + [
        sample(p, [9, 7 + i]) for i, p in enumerate(prompts)
    ]
    assert build_batch(Forest.of(samples)).counts.shared_above_prompt == saved
    assert build_batch(Forest.repeated(samples)).counts.shared_above_prompt == 0


def test_a_filler_is_counted_nowhere():
    forest = Forest.of([Sample([1, 2, 3], [4, 5], [False] * 2, [0.0] * 2)])
    assert build_batch(forest).counts.packed == 5 and int(build_batch(forest).work.rows.sum()) == 5
    filler = build_batch(replace(forest, is_filler=True))
    assert filler.counts == TokenCounts()
    assert len(filler.work.rows) == len(filler.work.scored) == 0
    assert filler.packed_tokens == 5, "it is computed all the same"
