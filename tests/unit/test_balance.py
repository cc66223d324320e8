"""How a step's samples are divided into micro-batches and shared out among ranks."""

import itertools
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgrpo.attention.choose import AttentionChoice
from pgrpo.attention.reference import attention_mask
from pgrpo.packing import balance
from pgrpo.packing.balance import Piece, _first_fit, cut_tree, fill_micro_batches, share_out
from pgrpo.packing.batch import build_batch
from pgrpo.packing.forest import Forest, Sorted, Work, length
from pgrpo.planning.flops import pairs
from pgrpo.types import Sample

H100 = AttentionChoice("flash4", 32, 8, 128, "auto", flops_per_ns=36 * 450e3)
QWEN3_4B = 2 * 36 * 100_900_000  # FLOPs of a row's matrices in a forward


def rows(work: Work) -> np.ndarray:
    return work.rows.astype(float)


def flops(work: Work) -> np.ndarray:
    return 3.0 * (QWEN3_4B * work.rows + 4 * 36 * 4096 * pairs(work))


def group(index, prompt, lengths, beginning=()):
    """Samples that can be told apart by their version of the weights; their tokens differ from the first behind ``beginning``."""
    ids = [*beginning, *(10_000 + index for _ in range(prompt - len(beginning)))]
    return [
        Sample(ids, [100_000 + 100 * index + i] * n, [True] * n, [0.0] * n, 100 * index + i, [1.0] * n)
        for i, n in enumerate(lengths)
    ]


def versions(plan):
    return Counter(
        s.weights_version for batches in plan for forest in batches if not forest.is_filler for s in forest.samples
    )


def flat(plan):
    return [forest for batches in plan for forest in batches]


GROUPS = st.lists(
    st.tuples(st.integers(1, 12), st.lists(st.integers(0, 20), min_size=1, max_size=6), st.integers(0, 8)),
    min_size=1,
    max_size=12,
).map(
    lambda sizes: [
        s for i, (p, n, common) in enumerate(sizes) for s in group(i, p, n, [7, 8, 9, 7, 8, 9, 7, 8][: min(common, p)])
    ]
)


@settings(max_examples=60, deadline=None)
@given(GROUPS, st.integers(1, 5), st.integers(32, 90), st.sampled_from(["all", "by cost", "repeated"]))
def test_every_sample_goes_to_one_rank_once_and_no_forest_is_larger_than_the_budget(samples, ranks, budget, how):
    attention = replace(H100, flops_per_ns=1e5) if how == "by cost" else AttentionChoice()
    plan = share_out(samples, ranks, budget, rows, attention, is_shared=how != "repeated")
    assert len(plan) == ranks
    assert len({len(batches) for batches in plan}) == 1  # equal rounds: collectives stay in step
    assert versions(plan) == Counter(s.weights_version for s in samples)
    for forest in flat(plan):
        assert 0 < forest.rows <= budget
        assert forest.rows >= Forest.of(forest.samples).rows
        assert how != "repeated" or forest.is_filler or forest.rows == sum(map(length, forest.samples))
        assert not forest.is_filler or not any(any(s.mask) or any(s.advantages) for s in forest.samples)
        batch = build_batch(forest)
        ids, mask = batch.inputs["input_ids"].tolist(), attention_mask(batch.layout)
        seen = [[ids[j] for j in mask[row].nonzero().flatten().tolist()] for row in batch.logit_index.tolist()]
        paths = [(s.prompt_ids + s.token_ids, len(s.prompt_ids)) for s in forest.samples]
        assert seen == [path[:t] for path, prompt in paths for t in range(prompt, len(path))]
        order = [s.weights_version for s in forest.samples]
        assert order == sorted(order)  # as they were given
    assert all(all(s.mask) for s in samples)  # nothing was changed in place


def test_a_sample_larger_than_the_budget_is_refused():
    with pytest.raises(ValueError, match=r"a sample of 15 tokens does not fit train.token_budget=14"):
        share_out(group(0, 10, [4, 5]), 1, 14, rows)
    assert share_out(group(0, 10, [4, 5]), 1, 15, rows)[0][0].rows <= 15


def test_share_out_of_nothing():
    assert share_out([], 2, 100, rows) == [[], []]


def test_a_group_larger_than_the_budget_is_split_and_its_prompt_computed_again():
    samples = group(0, 10, [4, 4, 4, 4])
    assert [f.rows for f in share_out(samples, 1, 26, rows)[0]] == [26]  # to the token
    assert [f.rows for f in share_out(samples, 1, 25, rows)[0]] == [18, 18]  # even, not 22 and 14
    assert [f.rows for f in share_out(samples, 1, 28, rows, is_shared=False)[0]] == [28, 28]
    assert [f.rows for f in share_out(samples, 1, 27, rows, is_shared=False)[0]] == [14] * 4


def test_cuts_compute_as_little_again_as_possible():
    """Two prompts of 10 and 2 own tokens below a beginning of 8; budget 30: the cut is between the prompts, not inside one."""
    samples = group(0, 18, [3, 3, 3], [7] * 8) + group(1, 10, [3, 3, 3], [7] * 8)
    order = Sorted.of(samples)
    kept = order.kept(order.runs(1))
    assert kept.tolist() == [0, 18, 18, 8, 10, 10]
    assert cut_tree(order.lengths, kept, 30) == [0, 3, 6]
    for seed in range(30):  # against all ways to cut
        rnd = np.random.default_rng(seed)
        lengths = rnd.integers(3, 12, 7)
        kept = np.minimum(rnd.integers(0, 9, 7), np.minimum(lengths, np.roll(lengths, 1)))
        kept[0], limit = 0, 20

        def pieces(cuts, lengths=lengths, kept=kept):
            runs = [slice(a, b) for a, b in itertools.pairwise(cuts)]
            return [int((lengths[run] - kept[run]).sum() + kept[run.start]) for run in runs]

        ways = [[0, *(i + 1 for i in range(6) if ways >> i & 1), 7] for ways in range(64)]
        fit = [pieces(cuts) for cuts in ways if max(pieces(cuts)) <= limit]
        best = min(fit, key=lambda sizes: (sum(sizes), sum(x * x for x in sizes)))
        got = pieces(cut_tree(lengths, kept, limit))
        assert (sum(got), sum(x * x for x in got)) == (sum(best), sum(x * x for x in best))


def test_groups_with_a_common_beginning_lie_together_and_its_worth_decides():
    """32 prompts share 4,096 tokens and have 512 of their own; a model of 4B parameters on an H100, budget 32,768."""
    samples = [s for i in range(32) for s in group(i, 4608, [512] * 8, range(4096))]
    (plan,) = share_out(samples, 1, 32_768, flops, H100)
    assert sum(f.rows for f in plan) == 32 * 9 * 512 + 4096 * len(plan)
    assert len(plan) == 6
    by_prompt = [s for i in range(32) for s in group(i, 4608, [512] * 8)]
    assert sum(f.rows for f in share_out(by_prompt, 1, 32_768, flops, H100)[0]) == 32 * (4608 + 8 * 512)
    # A chat template's 5 tokens are not worth a pass for every layer: each prompt is a root of its own.
    template = [s for i in range(8) for s in group(i, 605, [200] * 8, range(5))]
    (few,) = share_out(template, 1, 32_768, flops, H100)
    assert sum(f.rows for f in few) == 8 * (605 + 1600)
    assert {len(set(f.parents)) for f in few} == {9}
    (all_,) = share_out(template, 1, 32_768, flops)
    assert sum(f.rows for f in all_) == 8 * (600 + 1600) + 5


def test_a_beginning_of_all_samples_does_not_make_ranks_wait():
    """Eight ranks, one tree that fits one budget: it is cut, and no rank has more than a tenth above the mean."""
    samples = [s for i in range(32) for s in group(i, 1200, [random.Random(i).randint(100, 900)] * 8, range(1000))]
    plan = share_out(samples, 8, 131_072, flops, H100)
    loads = [sum(f.rows for f in batches if not f.is_filler) for batches in plan]
    assert max(loads) < 1.1 * sum(loads) / 8


def test_the_costliest_micro_batch_comes_first_and_a_filler_is_the_shortest_sample():
    samples = group(0, 9, [6]) + group(1, 1, [4, 3, 6]) + group(2, 9, [7])
    (first, filler), others = share_out(samples, 2, 16, rows)
    assert [s.weights_version for s in first.samples] == [200]
    assert [[s.weights_version for s in f.samples] for f in others] == [[0], [100, 101, 102]]  # 15 and 14 rows
    assert filler == replace(Forest.of([replace(samples[2], mask=[False] * 3, advantages=[0.0] * 3)]), is_filler=True)
    ten, six, five = (group(i, 1, [n - 1]) for i, n in enumerate([10, 6, 5]))
    assert [[s.weights_version for s in f.samples] for f in share_out(ten + six + five, 1, 16, rows)[0]] == [
        [100, 200],
        [0],
    ]


def pieces(*sizes):
    return [Piece(i, i + 1, size, cost) for i, (size, cost) in enumerate(sizes)]


def test_fill_micro_batches_evens_out_costs_not_tokens():
    """Two of cost 64 and two of 9: first fit alone would pair up the costly ones."""
    made = pieces((9, 64.0), (9, 64.0), (9, 9.0), (9, 9.0))
    assert [sum(p.cost for p in b) for b in fill_micro_batches(made, 18)] == [73, 73]
    assert sorted(b.cost for b in _first_fit(made, 18)) == [18, 128]
    made = pieces(
        (4, 10.0), (6, 6.0), (7, 5.0), (8, 2.0)
    )  # by cost 12 and 11; by tokens, in order or in load, otherwise
    assert [[p.rows for p in b] for b in fill_micro_batches(made, 14)] == [[4, 8], [6, 7]]
    # Where evening out finds no room, first fit stands: 6 + 4 and 5 + 5 fill two bins of 10, 6 + 5 would not fit.
    tight = pieces(*((n, float(n)) for n in (6, 5, 5, 4)))
    assert [[p.rows for p in b] for b in fill_micro_batches(tight, 10)] == [[6, 4], [5, 5]]
    assert fill_micro_batches([], 6) == []


def test_long_tailed_lengths_are_balanced():
    """Log-normal lengths (sigma 1), 64 groups of 8 on 8 ranks: contiguous shares leave the fullest 1.3 times the mean."""
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(64, 8, generator=generator) + 5).exp().clamp(1, 4000).long().tolist()
    samples = [s for i, row in enumerate(lengths) for s in group(i, 50, row)]
    plan = share_out(samples, 8, 16384, rows)
    loads = [sum(f.rows for f in batches if not f.is_filler) for batches in plan]
    contiguous = [sum(50 + sum(row) for row in lengths[i : i + 8]) for i in range(0, 64, 8)]
    assert max(contiguous) / (sum(loads) / 8) > 1.3
    assert max(loads) / (sum(loads) / 8) < 1.05


@pytest.mark.parametrize(("most_kept", "budget"), [(0, 14), (2, 16)])
def test_samples_that_would_share_less_without_others_share_everything(most_kept, budget, monkeypatch):
    """Two samples share two tokens, which a third has for its prompt: with it these are a node, whatever the least that is shared;
    without it a forest would repeat them, be larger than the budget, or have two roots, of which none could be kept."""
    monkeypatch.setattr(balance, "LEAST_SHARED", (4,))
    samples = [
        Sample([1, 2, 5, 5], [8, 8, 8, 9], [True] * 4, [0.0] * 4),
        Sample([1, 2, 6, 6], [8, 8, 8, 9], [True] * 4, [0.0] * 4),
        Sample([1, 2], [7] * 12, [True] * 12, [0.0] * 12),
    ]
    assert Forest.of(samples[:2], 4).rows == 16 and Forest.of(samples, 4).rows == 26
    (plan,) = share_out(samples, 1, budget, rows, most_kept=most_kept)
    assert sorted(f.rows for f in plan) == [14, 14] and {f.kept for f in plan} == {most_kept}
    assert all(f.parents.count(-1) == 1 for f in plan)
