"""Packing: the worked example of batch.py by hand, budgets, and how a step is shared out among ranks."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgrpo.packing.balance import _first_fit, fill_micro_batches, share_out, split_to_budget
from pgrpo.packing.batch import build_batch
from pgrpo.packing.forest import Tree, packed_tokens, trees_of
from pgrpo.types import Episode, Group, Prompt, Sample


def sample(prompt, token_ids, mask=None, advantage=0.0):
    n = len(token_ids)
    logprobs = [-0.5 * (i + 1) for i in range(n)]
    return Sample(prompt, token_ids, mask or [True] * n, logprobs, advantages=[advantage] * n)


def tree(prompt, completions, advantages=None):
    advantages = advantages or [0.25 * (i + 1) for i in range(len(completions))]
    return Tree(prompt, [sample(prompt, ids, None, a) for ids, a in zip(completions, advantages, strict=True)])


def sized(index, prompt_len, lengths):
    """A tree whose every sample can be told apart: by its version of the weights."""
    grown = tree([1] * prompt_len, [[2] * n for n in lengths])
    for i, own in enumerate(grown.samples):
        own.weights_version = 100 * index + i
    return grown


def worked_example():
    a, b = tree([11, 12, 13], [[21, 22], [31, 32, 33]], [1.0, -1.0]), tree([14, 15], [[41], [51, 52]], [0.5, -0.5])
    a.samples[0].mask = [True, False]
    a.samples[0].advantages = [1.0, 2.0]
    return [a, b]


def samples(trees):
    return Counter(s.weights_version for tree in trees for s in tree.samples)


def is_filler(tree):
    return not any(any(s.mask) for s in tree.samples) and any(s.token_ids for s in tree.samples)


def test_the_worked_example():
    batch = build_batch(worked_example())
    assert batch.inputs["input_ids"].tolist() == [11, 12, 13, 14, 15, 21, 22, 31, 32, 33, 41, 51, 52]
    assert batch.inputs["position_ids"].tolist() == [0, 1, 2, 0, 1, 3, 4, 3, 4, 5, 2, 2, 3]
    assert [node[:3] for node in batch.layout.nodes] == [
        (0, 3, -1),
        (3, 2, -1),
        (5, 2, 0),
        (7, 3, 0),
        (10, 1, 1),
        (11, 2, 1),
    ]
    assert batch.layout.max_sample == 6
    within, across = batch.layout.passes(None).unpack()
    cu_seqlens = batch.layout.passes(None).cu_seqlens
    assert cu_seqlens.dtype == torch.int32
    assert [x.tolist() for x in within.on(cu_seqlens)[:2]] == [[0, 3, 5, 7, 10, 11, 13]] * 2
    assert [x.tolist() for x in across.on(cu_seqlens)[:2]] == [[0, 5, 8], [0, 3, 5]]
    assert (within[:4], within.max_q, within.causal) == ((0, 13, 0, 13), 3, 1)
    assert (across[:4], across.max_q, across.max_k, across.causal) == ((5, 13, 0, 5), 5, 3, 0)
    assert batch.logit_index.tolist() == [2, 5, 2, 7, 8, 4, 4, 11]
    assert batch.target_ids.tolist() == [21, 22, 31, 32, 33, 41, 51, 52]
    assert batch.unpack_index.tolist() == [0, 1, 3, 4, 5, 6, 9, 10]
    assert batch.mask.tolist() == [[True, False, False], [True] * 3, [True, False, False], [True, True, False]]
    assert batch.advantages.tolist() == [[1, 2, 0], [-1, -1, -1], [0.5, 0, 0], [-0.5, -0.5, 0]]  # one a token
    assert batch.rollout_logprobs.tolist() == [[-0.5, -1, 0], [-0.5, -1, -1.5], [-0.5, 0, 0], [-0.5, -1, 0]]
    assert batch.rollout_logprobs.dtype == batch.advantages.dtype == torch.float32
    assert batch.repeated_tokens == (3 + 2) + (3 + 3) + (2 + 1) + (2 + 2)
    assert batch.counted_tokens == batch.packed_tokens == 13
    assert batch.old_logprobs is None


def test_repeated_prompts_pack_every_sample_as_a_sequence():
    batch = build_batch(worked_example(), share_prompts=False)
    assert batch.inputs["input_ids"].tolist() == [
        11,
        12,
        13,
        21,
        22,
        11,
        12,
        13,
        31,
        32,
        33,
        14,
        15,
        41,
        14,
        15,
        51,
        52,
    ]
    assert batch.inputs["position_ids"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 1, 2, 3]
    assert [node.length for node in batch.layout.nodes if node.length] == [5, 6, 3, 4]
    assert batch.logit_index.tolist() == [2, 3, 7, 8, 9, 12, 15, 16]
    shared = build_batch(worked_example())
    for name in ("target_ids", "unpack_index", "mask", "advantages", "rollout_logprobs"):
        assert torch.equal(getattr(batch, name), getattr(shared, name)), name
    assert batch.repeated_tokens == shared.repeated_tokens == batch.packed_tokens


@pytest.mark.parametrize("share_prompts", [True, False])
def test_every_target_is_predicted_by_the_row_before_it_in_its_own_sample(share_prompts):
    """Distinct tokens throughout, so that the row's token and position identify it."""
    trees = [tree([1, 2, 3], [[4, 5], [], [6]]), tree([7], [[], [8, 9, 10]]), tree([11, 12], [[], []])]
    batch = build_batch(trees, share_prompts=share_prompts)
    wanted = [(3, 2, 4), (4, 3, 5), (3, 2, 6), (7, 0, 8), (8, 1, 9), (9, 2, 10)]  # token before, its position, target
    rows = batch.logit_index
    ids, positions = (batch.inputs[name][rows].tolist() for name in ("input_ids", "position_ids"))
    got = zip(ids, positions, batch.target_ids.tolist(), strict=True)
    assert list(got) == wanted


def test_unpack_puts_values_in_their_rows_and_lets_gradients_through():
    batch = build_batch(worked_example())
    flat = torch.arange(1.0, 9.0, requires_grad=True)
    rows = batch.unpack(flat)
    assert rows.tolist() == [[1, 2, 0], [3, 4, 5], [6, 0, 0], [7, 8, 0]]
    (rows * torch.arange(12.0).view(4, 3)).sum().backward()
    assert flat.grad is not None
    assert flat.grad.tolist() == [0, 1, 3, 4, 5, 6, 9, 10]


def test_completions_of_no_and_of_one_token():
    batch = build_batch([tree([1, 2], [[], [3], []])])
    assert batch.inputs["input_ids"].tolist() == [1, 2, 3]
    assert [node.length for node in batch.layout.nodes] == [2, 0, 1, 0]
    assert (batch.logit_index.tolist(), batch.target_ids.tolist()) == ([1], [3])
    assert batch.mask.tolist() == [[False], [True], [False]]
    assert batch.unpack(torch.tensor([7.0])).tolist() == [[0], [7], [0]]
    nothing = build_batch([tree([1, 2], [[], []])])
    assert nothing.mask.shape == nothing.rollout_logprobs.shape == (2, 0)
    assert len(nothing.logit_index) == 0
    assert nothing.unpack(torch.zeros(0)).shape == (2, 0)
    assert nothing.advantages.shape == (2, 0)


def test_packed_tokens():
    first, second = worked_example()
    assert (packed_tokens(first), packed_tokens(second)) == (8, 5)
    assert (packed_tokens(first, share_prompts=False), packed_tokens(second, share_prompts=False)) == (11, 7)


def test_samples_of_a_group_that_share_a_prompt_are_one_tree():
    prompt, rewritten = [1, 2, 3], [1, 2, 9]
    a, b, c = sample(prompt, [4]), sample(list(prompt), [5]), sample(rewritten, [6, 7])
    other = sample(list(prompt), [8])
    trees = [
        Group(Prompt(0, "", prompt), [Episode([a], "", "stop"), Episode([b, c], "", "stop")]),
        Group(Prompt(1, "", list(prompt)), [Episode([other], "", "stop")]),
    ]
    assert trees_of(trees) == [Tree(prompt, [a, b]), Tree(rewritten, [c]), Tree(prompt, [other])]


def test_split_to_budget_counts_each_copy_of_the_prompt():
    whole = sized(0, 10, [4, 4, 4, 4])
    assert split_to_budget(whole, 26) == [whole]  # 10 + 16, to the token
    assert [len(p.samples) for p in split_to_budget(whole, 25)] == [3, 1]  # 22 tokens, 14 tokens
    assert [packed_tokens(p) for p in split_to_budget(whole, 21)] == [18, 18]
    assert [len(p.samples) for p in split_to_budget(whole, 28, share_prompts=False)] == [2, 2]
    assert [len(p.samples) for p in split_to_budget(whole, 27, share_prompts=False)] == [1] * 4


@pytest.mark.parametrize("share_prompts", [True, False])
def test_split_to_budget_refuses_a_sample_that_is_too_large(share_prompts):
    whole = sized(0, 10, [4, 5])
    assert len(split_to_budget(whole, 15, share_prompts)) == 2
    with pytest.raises(ValueError, match=r"a sample of 15 tokens does not fit train.token_budget=14"):
        split_to_budget(whole, 14, share_prompts)


GROUPS = st.lists(
    st.tuples(st.integers(1, 12), st.lists(st.integers(0, 20), min_size=1, max_size=6)), min_size=1, max_size=12
).map(lambda sizes: [sized(i, p, lengths) for i, (p, lengths) in enumerate(sizes)])


@settings(max_examples=60, deadline=None)
@given(GROUPS, st.integers(32, 90), st.booleans())
def test_split_and_fill_lose_nothing_and_keep_the_budget(trees, budget, share_prompts):
    def tokens(tree):  # counted here, not by packed_tokens
        behind = sum(len(s.token_ids) for s in tree.samples)
        return behind + len(tree.prompt_ids) * (1 if share_prompts else len(tree.samples))

    pieces = [piece for g in trees for piece in split_to_budget(g, budget, share_prompts)]
    assert [s for p in pieces for s in p.samples] == [s for g in trees for s in g.samples]
    bins = fill_micro_batches(pieces, budget, tokens)
    assert samples(g for b in bins for g in b) == samples(trees)
    assert all(0 < sum(map(tokens, b)) <= budget for b in bins)
    # First fit: no two bins could have been one.
    loads = sorted(sum(map(tokens, b)) for b in bins)
    assert len(loads) < 2 or loads[0] + loads[1] > budget


def test_fill_micro_batches_by_hand():
    trees = [sized(i, 1, [n - 1]) for i, n in enumerate([4, 7, 3, 6])]
    bins = fill_micro_batches(trees, 10)
    assert [[packed_tokens(g) for g in b] for b in bins] == [[7, 3], [6, 4]]
    with pytest.raises(ValueError, match="7 tokens does not fit a budget of 6"):
        fill_micro_batches(trees, 6)
    assert fill_micro_batches([], 6) == []


def test_fill_micro_batches_evens_out_costs_not_tokens():
    """Prompts of 8 cost 64, one-token prompts with 8 completion tokens cost 9: first fit alone would pair up the costly ones."""
    trees = [sized(i, p, [n]) for i, (p, n) in enumerate([(8, 1), (8, 1), (1, 8), (1, 8)])]

    def cost(g):
        return len(g.prompt_ids) ** 2 + len(g.samples[0].token_ids)

    bins = fill_micro_batches(trees, 18, packed_tokens, cost)
    assert sorted(sum(map(cost, b)) for b in bins) == [74, 74]
    assert sorted(sum(map(cost, b)) for b in _first_fit(trees, 18, packed_tokens)) == [18, 130]
    # Trees of 4, 6, 7 and 8 tokens that cost 10, 6, 5 and 2: by cost 12 and 11; by tokens, in order or in load, otherwise.
    a, b, c, d = (sized(i, 1, [n - 1]) for i, n in enumerate([4, 6, 7, 8]))
    costs = {4: 10, 6: 6, 7: 5, 8: 2}
    assert fill_micro_batches([a, b, c, d], 14, packed_tokens, lambda g: costs[packed_tokens(g)]) == [[a, d], [b, c]]
    # Where evening out finds no room, first fit stands: 6 + 4 and 5 + 5 fill two bins of 10, 6 + 5 would not fit.
    tight = [sized(i, 1, [n - 1]) for i, n in enumerate([6, 5, 5, 4])]
    assert [[packed_tokens(g) for g in b] for b in fill_micro_batches(tight, 10)] == [[6, 4], [5, 5]]


@settings(max_examples=60, deadline=None)
@given(GROUPS, st.integers(1, 5), st.integers(32, 90), st.booleans())
def test_share_out_gives_every_sample_to_one_rank_once(trees, world_size, budget, share_prompts):
    def tokens(g):
        return packed_tokens(g, share_prompts)

    plan = share_out(trees, world_size, budget, tokens, share_prompts=share_prompts)
    assert len(plan) == world_size
    assert len({len(batches) for batches in plan}) == 1  # equal rounds: collectives stay in step
    flat = [g for batches in plan for b in batches for g in b]
    wanted, got = samples(trees), samples(flat)
    fillers = got - wanted  # a filler is a copy of a sample
    assert got - fillers == wanted
    masked = [s for tree in flat for s in tree.samples if s.token_ids and not any(s.mask)]
    assert all(s.advantages == [0.0] * len(s.token_ids) == [0.0] * len(s.mask) for s in masked)
    assert sum(bool(s.token_ids) for g in trees for s in g.samples) == sum(
        any(s.mask) for tree in flat for s in tree.samples
    )
    assert all(b and sum(map(tokens, b)) <= budget for batches in plan for b in batches)
    for given_ in trees:  # nothing was changed in place
        assert all(all(s.mask) for s in given_.samples)


def test_the_costliest_micro_batch_comes_first_and_a_filler_is_the_shortest_sample_of_the_smallest_tree():
    smallest = sized(1, 1, [4, 3, 6])
    trees = [sized(0, 9, [6]), smallest, sized(2, 9, [7])]
    (first, filler), others = share_out(trees, 2, 16, packed_tokens)
    assert first == [trees[2]] and others == [[trees[0]], [smallest]]  # 16 tokens; 15 and 14
    shortest = replace(smallest.samples[1], mask=[False] * 3, advantages=[0.0] * 3)
    assert filler == [Tree([1], [shortest], is_filler=True)]
    counted, not_counted = (build_batch(trees) for trees in (first, filler))
    assert (counted.counted_tokens, counted.repeated_tokens, counted.packed_tokens) == (16, 16, 16)
    assert (not_counted.counted_tokens, not_counted.repeated_tokens, not_counted.packed_tokens) == (0, 0, 4)
    ten, six, five = (sized(i, 1, [n - 1]) for i, n in enumerate([10, 6, 5]))
    assert share_out([ten, six, five], 1, 16, packed_tokens) == [[[six, five], [ten]]]


def test_share_out_of_nothing():
    assert share_out([], 2, 100, packed_tokens) == [[], []]


def test_share_out_balances_long_tailed_lengths():
    """Log-normal lengths (sigma 1), 64 groups of 8 on 8 ranks: contiguous shares leave the fullest 1.3 times the mean."""
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(64, 8, generator=generator) + 5).exp().clamp(1, 4000).long().tolist()
    trees = [sized(i, 50, row) for i, row in enumerate(lengths)]
    plan = share_out(trees, 8, 16384, packed_tokens)
    loads = [sum(packed_tokens(g) for b in batches for g in b if not is_filler(g)) for batches in plan]
    contiguous = [sum(map(packed_tokens, trees[i : i + 8])) for i in range(0, 64, 8)]
    mean = sum(loads) / 8
    assert max(contiguous) / mean > 1.3
    assert max(loads) / mean < 1.05
