"""Packing: the worked example of batch.py by hand, budgets, and how a step is shared out among ranks."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgrpo.packing.balance import _first_fit, fill_micro_batches, select, share_out, split_to_budget
from pgrpo.packing.batch import build_batch, packed_tokens
from pgrpo.types import Completion, Group, Prompt


def completion(token_ids, mask=None, logprobs=None):
    logprobs = logprobs or [-0.5 * (i + 1) for i in range(len(token_ids))]
    return Completion(token_ids, logprobs, mask or [True] * len(token_ids), "stop", "")


def group(index, prompt, completions, advantages=None):
    n = len(completions)
    return Group(
        prompt=Prompt(index, "", prompt),
        completions=[c if isinstance(c, Completion) else completion(c) for c in completions],
        rewards=[float(i) for i in range(n)],
        reward_parts={"r": [float(i) for i in range(n)]},
        advantages=advantages or [0.25 * (i + 1) for i in range(n)],
    )


def sized(index, prompt_len, lengths):
    """A group whose every sample can be told apart: its advantage is unique."""
    return group(index, [1] * prompt_len, [[2] * n for n in lengths], [100.0 * index + i for i in range(len(lengths))])


def worked_example():
    return [
        group(0, [11, 12, 13], [completion([21, 22], [True, False]), [31, 32, 33]], [1.0, -1.0]),
        group(1, [14, 15], [[41], [51, 52]], [0.5, -0.5]),
    ]


def samples(groups):
    return Counter((g.prompt.index, a) for g in groups for a in g.advantages)


def test_the_worked_example():
    batch = build_batch(worked_example())
    assert batch.input_ids.tolist() == [11, 12, 13, 14, 15, 21, 22, 31, 32, 33, 41, 51, 52]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 3, 4, 3, 4, 5, 2, 2, 3]
    assert batch.layout.cu_seqlens.tolist() == [0, 3, 5, 7, 10, 11, 13]
    assert batch.layout.cu_seqlens_prefix.tolist() == [0, 3, 5]
    assert batch.layout.cu_seqlens_group.tolist() == [0, 5, 8]
    assert batch.layout.cu_seqlens.dtype == torch.int32
    assert batch.layout.sizes == (5, 3, 3, 5, 0)  # prefix rows, longest segment, prefix and group; no copies
    assert (batch.layout.sizes.prefix_rows, batch.layout.max_sample) == (5, 6)
    assert batch.logit_index.tolist() == [2, 5, 2, 7, 8, 4, 4, 11]
    assert batch.target_ids.tolist() == [21, 22, 31, 32, 33, 41, 51, 52]
    assert batch.unpack_index.tolist() == [0, 1, 3, 4, 5, 6, 9, 10]
    assert batch.mask.tolist() == [[True, False, False], [True] * 3, [True, False, False], [True, True, False]]
    assert batch.advantages.tolist() == [1.0, -1.0, 0.5, -0.5]
    assert batch.rollout_logprobs.tolist() == [[-0.5, -1, 0], [-0.5, -1, -1.5], [-0.5, 0, 0], [-0.5, -1, 0]]
    assert batch.rollout_logprobs.dtype == batch.advantages.dtype == torch.float32
    assert batch.repeated_tokens == (3 + 2) + (3 + 3) + (2 + 1) + (2 + 2)
    assert batch.old_logprobs is None


def test_repeated_prompts_pack_every_sample_as_a_sequence():
    batch = build_batch(worked_example(), share_prompts=False)
    assert batch.input_ids.tolist() == [11, 12, 13, 21, 22, 11, 12, 13, 31, 32, 33, 14, 15, 41, 14, 15, 51, 52]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 1, 2, 3]
    lengths = batch.layout.cu_seqlens.diff()
    assert lengths[lengths > 0].tolist() == [5, 6, 3, 4]
    assert batch.layout.sizes.prefix_rows == 0
    assert batch.logit_index.tolist() == [2, 3, 7, 8, 9, 12, 15, 16]
    shared = build_batch(worked_example())
    for name in ("target_ids", "unpack_index", "mask", "advantages", "rollout_logprobs"):
        assert torch.equal(getattr(batch, name), getattr(shared, name)), name
    assert batch.repeated_tokens == shared.repeated_tokens == len(batch.input_ids)


@pytest.mark.parametrize("share_prompts", [True, False])
def test_every_target_is_predicted_by_the_row_before_it_in_its_own_sample(share_prompts):
    """Distinct tokens throughout, so that the row's token and position identify it."""
    groups = [group(0, [1, 2, 3], [[4, 5], [], [6]]), group(1, [7], [[], [8, 9, 10]]), group(2, [11, 12], [[], []])]
    batch = build_batch(groups, share_prompts=share_prompts)
    wanted = [(3, 2, 4), (4, 3, 5), (3, 2, 6), (7, 0, 8), (8, 1, 9), (9, 2, 10)]  # token before, its position, target
    rows = batch.logit_index
    got = zip(batch.input_ids[rows].tolist(), batch.position_ids[rows].tolist(), batch.target_ids.tolist(), strict=True)
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
    batch = build_batch([group(0, [1, 2], [[], [3], []])])
    assert batch.input_ids.tolist() == [1, 2, 3]
    assert batch.layout.cu_seqlens.tolist() == [0, 2, 2, 3, 3]
    assert (batch.logit_index.tolist(), batch.target_ids.tolist()) == ([1], [3])
    assert batch.mask.tolist() == [[False], [True], [False]]
    assert batch.unpack(torch.tensor([7.0])).tolist() == [[0], [7], [0]]
    nothing = build_batch([group(0, [1, 2], [[], []])])
    assert nothing.mask.shape == nothing.rollout_logprobs.shape == (2, 0)
    assert len(nothing.logit_index) == 0
    assert nothing.unpack(torch.zeros(0)).shape == (2, 0)
    assert nothing.advantages.tolist() == [0.25, 0.5]


def test_packed_tokens():
    first, second = worked_example()
    assert (packed_tokens(first), packed_tokens(second)) == (8, 5)
    assert (packed_tokens(first, share_prompts=False), packed_tokens(second, share_prompts=False)) == (11, 7)


def test_select_keeps_what_the_whole_group_decided():
    whole = sized(3, 2, [1, 2, 3])
    part = select(whole, [2, 0])
    assert [len(c.token_ids) for c in part.completions] == [3, 1]
    assert part.rewards == [2.0, 0.0]
    assert part.reward_parts == {"r": [2.0, 0.0]}
    assert part.advantages == [302.0, 300.0]


def test_split_to_budget_counts_each_copy_of_the_prompt():
    whole = sized(0, 10, [4, 4, 4, 4])
    assert split_to_budget(whole, 26) == [whole]  # 10 + 16, to the token
    assert [len(p.completions) for p in split_to_budget(whole, 25)] == [3, 1]  # 22 tokens, 14 tokens
    assert [packed_tokens(p) for p in split_to_budget(whole, 21)] == [18, 18]
    assert [len(p.completions) for p in split_to_budget(whole, 28, share_prompts=False)] == [2, 2]
    assert [len(p.completions) for p in split_to_budget(whole, 27, share_prompts=False)] == [1] * 4


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
def test_split_and_fill_lose_nothing_and_keep_the_budget(groups, budget, share_prompts):
    def tokens(g):  # counted here, not by packed_tokens
        completions = sum(len(c.token_ids) for c in g.completions)
        return completions + len(g.prompt.token_ids) * (1 if share_prompts else len(g.completions))

    pieces = [piece for g in groups for piece in split_to_budget(g, budget, share_prompts)]
    assert [(p.prompt.index, a) for p in pieces for a in p.advantages] == [
        (g.prompt.index, a) for g in groups for a in g.advantages
    ]
    bins = fill_micro_batches(pieces, budget, tokens)
    assert samples(g for b in bins for g in b) == samples(groups)
    assert all(0 < sum(map(tokens, b)) <= budget for b in bins)
    # First fit: no two bins could have been one.
    loads = sorted(sum(map(tokens, b)) for b in bins)
    assert len(loads) < 2 or loads[0] + loads[1] > budget


def test_fill_micro_batches_by_hand():
    groups = [sized(i, 1, [n - 1]) for i, n in enumerate([4, 7, 3, 6])]
    bins = fill_micro_batches(groups, 10)
    assert [[packed_tokens(g) for g in b] for b in bins] == [[7, 3], [6, 4]]
    with pytest.raises(ValueError, match="7 tokens does not fit a budget of 6"):
        fill_micro_batches(groups, 6)
    assert fill_micro_batches([], 6) == []


def test_fill_micro_batches_evens_out_costs_not_tokens():
    """Prompts of 8 cost 64, one-token prompts with 8 completion tokens cost 9: first fit alone would pair up the costly ones."""
    groups = [sized(i, p, [n]) for i, (p, n) in enumerate([(8, 1), (8, 1), (1, 8), (1, 8)])]

    def cost(g):
        return len(g.prompt.token_ids) ** 2 + len(g.completions[0].token_ids)

    bins = fill_micro_batches(groups, 18, packed_tokens, cost)
    assert sorted(sum(map(cost, b)) for b in bins) == [74, 74]
    assert sorted(sum(map(cost, b)) for b in _first_fit(groups, 18, packed_tokens)) == [18, 130]
    # Where evening out finds no room, first fit stands: 6 + 4 and 5 + 5 fill two bins of 10, 6 + 5 would not fit.
    tight = [sized(i, 1, [n - 1]) for i, n in enumerate([6, 5, 5, 4])]
    assert [[packed_tokens(g) for g in b] for b in fill_micro_batches(tight, 10)] == [[6, 4], [5, 5]]


@settings(max_examples=60, deadline=None)
@given(GROUPS, st.integers(1, 5), st.integers(32, 90), st.booleans())
def test_share_out_gives_every_sample_to_one_rank_once(groups, world_size, budget, share_prompts):
    def tokens(g):
        return packed_tokens(g, share_prompts)

    plan = share_out(groups, world_size, budget, tokens, share_prompts=share_prompts)
    assert len(plan) == world_size
    assert len({len(batches) for batches in plan}) == 1  # equal rounds: collectives stay in step
    flat = [g for batches in plan for b in batches for g in b]
    real = [g for g in flat if g.rewards != [None]]
    assert samples(real) == samples(groups)
    for filler in (g for g in flat if g.rewards == [None]):
        assert filler.advantages == [0.0]
        assert [any(c.mask) for c in filler.completions] == [False]
        assert len(filler.completions[0].mask) == len(filler.completions[0].token_ids)
    assert all(b and sum(map(tokens, b)) <= budget for batches in plan for b in batches)
    for group_ in groups:  # nothing was changed in place
        assert all(all(c.mask) for c in group_.completions)


def test_share_out_of_nothing():
    assert share_out([], 2, 100, packed_tokens) == [[], []]


def test_share_out_balances_long_tailed_lengths():
    """Log-normal lengths (sigma 1), 64 groups of 8 on 8 ranks: contiguous shares leave the fullest 1.3 times the mean."""
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(64, 8, generator=generator) + 5).exp().clamp(1, 4000).long().tolist()
    groups = [sized(i, 50, row) for i, row in enumerate(lengths)]
    plan = share_out(groups, 8, 16384, packed_tokens)
    loads = [sum(packed_tokens(g) for b in batches for g in b if g.rewards != [None]) for batches in plan]
    contiguous = [sum(map(packed_tokens, groups[i : i + 8])) for i in range(0, 64, 8)]
    mean = sum(loads) / 8
    assert max(contiguous) / mean > 1.3
    assert max(loads) / mean < 1.05
