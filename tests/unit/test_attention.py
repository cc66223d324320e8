"""Grouped attention against the dense fp64 reference and against one sample at a time, forward and backward."""

import random
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from making import flat_layout
from torch.fx.experimental import _config as fx_config

from pgrpo.attention.choose import AttentionChoice, Chosen
from pgrpo.attention.grouped import grouped_attention
from pgrpo.attention.hook import UnsupportedAttentionError, attending, attention_forward
from pgrpo.attention.kernels import cpu_flash
from pgrpo.attention.kernels.segments import Scores, Segments
from pgrpo.attention.layout import PackedLayout, ancestry, unpack_calls
from pgrpo.attention.merge import merge_
from pgrpo.attention.reference import attention_mask, reference_attention
from pgrpo.rollout.embedded.cache import NOTHING, DecodeCache

FLAT = [
    ([3, 2], [[2, 3], [1, 2]]),
    ([7], [[4, 4, 4]]),
    ([5, 1, 9], [[0, 1, 6], [3], [2, 2, 0, 8]]),
    ([4, 4], [[], [3, 0]]),
    ([6, 2], [[], []]),
    ([0, 0], [[5, 3], [4]]),
    ([0, 3], [[2, 1], [2]]),
]
NAMES = ("out", "dq", "dk", "dv", "dsinks")


def random_forest(seed: int) -> tuple[list[int], list[int]]:
    """Lengths and parents of up to 60 nodes in 1 to 6 depths."""
    rnd = random.Random(seed)
    parents, level = [], [-1]
    for _ in range(6 - seed % 6):
        level = [p for i, p in enumerate(level) for _ in range(rnd.randint(0, 2) + (i == 0))][:12]
        first = len(parents)
        parents += level
        level = list(range(first, len(parents)))
    return [rnd.randint(1, 6) for _ in parents], parents


def inputs(total: int, dtype: torch.dtype, heads=4, kv_heads=2, dim=16, value_dim=None, seed=0):
    """q, k, v, sinks and dout."""
    gen = torch.Generator().manual_seed(seed)
    value_dim = value_dim or dim
    shapes = [
        (total, heads, dim),
        (total, kv_heads, dim),
        (total, kv_heads, value_dim),
        (heads,),
        (total, heads, value_dim),
    ]
    return [torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype) for shape in shapes]


def run(function, tensors, dout):
    """Output and gradients."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = function(*leaves)
    gradients = torch.autograd.grad(out, leaves, dout, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves, strict=True))]


def grouped(layout, scale=0.25, *, has_sinks=False, **options):
    return lambda q, k, v, sinks: grouped_attention(
        q, k, v, layout, scale, sinks_H=sinks if has_sinks else None, **options
    )


def reference(layout, scale=0.25, *, has_sinks=False, **options):
    return lambda q, k, v, sinks: reference_attention(
        q, k, v, layout, scale, sinks_H=sinks if has_sinks else None, **options
    )[0]


def one_sample_at_a_time(lengths, parents, scale=0.25, *, window=None, softcap=None, has_sinks=False):
    """Every path from a root as a sequence of its own, in plain loops over queries; knows nothing of layouts."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]

    def rows(i):
        return [*(rows(parents[i]) if parents[i] >= 0 else []), *range(starts[i], starts[i] + lengths[i])]

    def attend(q, k, v, sinks):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        out = {}
        for i in range(len(lengths)):
            path = rows(i)
            for at in range(len(path) - lengths[i], len(path)):
                seen = path[max(0, at + 1 - window) if window else 0 : at + 1]
                scores = torch.einsum("hd,shd->hs", q[path[at]], k[seen]) * scale
                scores = softcap * torch.tanh(scores / softcap) if softcap else scores
                weights = scores.exp() / (scores.exp().sum(-1, True) + (sinks.exp()[:, None] if has_sinks else 0))
                out[path[at]] = torch.einsum("hs,shd->hd", weights, v[seen])
        return torch.stack([out[row] for row in range(len(q))])

    return attend


def assert_equal(got, want, limit=1e-13):
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert (a - b).abs().max() < limit, name


def test_rows_of_the_mask_by_hand():
    """Groups A (3; completions of 2 and 3) and B (2; of 1 and 2): the last token of a' sees A (0-2) and a' (7-9), nothing else."""
    mask = attention_mask(flat_layout([3, 2], [[2, 3], [1, 2]]))
    assert mask[9].nonzero().flatten().tolist() == [0, 1, 2, 7, 8, 9]
    assert mask[11].nonzero().flatten().tolist() == [3, 4, 11]
    # S S | A | B B b b | a a | a': a' is below A, which is below S
    forest = PackedLayout([2, 1, 4, 2, 1], [-1, 0, 0, 1, 1])
    assert attention_mask(forest)[9].nonzero().flatten().tolist() == [0, 1, 2, 9]
    assert attention_mask(forest)[5].nonzero().flatten().tolist() == [0, 1, 3, 4, 5]
    assert attention_mask(forest, window=2)[9].nonzero().flatten().tolist() == [2, 9]
    assert [(node.start, node.depth, node.offset) for node in forest.nodes] == [
        (0, 0, 0),
        (2, 1, 2),
        (3, 1, 2),
        (7, 2, 3),
        (9, 2, 3),
    ]


@pytest.mark.parametrize("way", ["between_depths", "copied_keys"])
@pytest.mark.parametrize(("prefix_lens", "suffix_lens"), FLAT)
def test_flat_groups_equal_the_dense_reference_in_fp64(prefix_lens, suffix_lens, way):
    layout = flat_layout(prefix_lens, suffix_lens, choice=AttentionChoice(way=way))
    is_shared = any(p and any(s) for p, s in zip(prefix_lens, suffix_lens, strict=True))
    calls = unpack_calls(layout.passes(None).table)
    assert len(calls) == (2 if way == "between_depths" and any(prefix_lens) and any(map(any, suffix_lens)) else 1)
    assert bool(calls[0].copied) == (way == "copied_keys" and is_shared)
    *tensors, dout = inputs(layout.nodes[-1].end, torch.float64)
    assert_equal(run(grouped(layout), tensors, dout), run(reference(layout), tensors, dout))


OPTIONS = {
    "plain": {},
    "window of 1": {"window": 1},
    "window of 4": {"window": 4},
    "window as long as the longest sample": {"window": 10_000},
    "soft-capped": {"softcap": 1.5},
    "sinks": {"has_sinks": True},
    "window, soft-capped, sinks": {"window": 3, "softcap": 0.7, "has_sinks": True},
}


@pytest.mark.parametrize("way", ["between_depths", "copied_keys"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_forests_equal_the_reference_and_one_sample_at_a_time_in_fp64(seed, options, way):
    """Values wider or narrower than keys too. Every option changes the result, but for a window that hides nothing."""
    lengths, parents = random_forest(seed)
    layout = PackedLayout(lengths, parents, choice=AttentionChoice(way=way))
    *tensors, dout = inputs(sum(lengths), torch.float64, dim=8, value_dim=(8, 4, 12)[seed])
    got = run(grouped(layout, **options), tensors, dout)
    assert_equal(got, run(reference(layout, **options), tensors, dout))
    assert_equal(got, run(one_sample_at_a_time(lengths, parents, **options), tensors, dout))
    plain = grouped(layout)(*tensors)
    assert ((got[0] - plain).abs().max() < 1e-13) == (options in ({}, {"window": 10_000}))


def test_depths_are_mixed_by_their_cost():
    """A long root is read where it is, its short children are copied; the result is the same."""
    lengths, parents = [40, 2, 3, 6, 5, 4], [-1, 0, 0, 1, 1, 2]
    choice = AttentionChoice("builtin", 32, 8, 128, "auto")
    layout = PackedLayout([8192, 64, 64, 512, 512, 512], parents, choice=choice)
    assert [bool(call.copied) for call in unpack_calls(layout.passes(None).table)] == [True, False, False]

    class SecondDepth(AttentionChoice):
        def choose(self, depths):
            return Chosen(frozenset({1}), 0.0)

    layout = PackedLayout(lengths, parents, choice=SecondDepth())
    assert [bool(call.copied) for call in unpack_calls(layout.passes(None).table)] == [True, False, False]
    *tensors, dout = inputs(sum(lengths), torch.float64)
    assert_equal(run(grouped(layout), tensors, dout), run(reference(layout), tensors, dout))


@pytest.mark.parametrize("way", ["between_depths", "copied_keys"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"window": 24, "softcap": 2.0, "has_sinks": True}])
@pytest.mark.parametrize(("prefix_lens", "suffix_lens"), [([33, 20], [[20, 31], [11, 0, 22]]), ([128], [[40] * 8])])
def test_low_precision_error_is_at_most_twice_that_of_a_plain_computation(
    dtype, prefix_lens, suffix_lens, way, options
):
    layout = flat_layout(prefix_lens, suffix_lens, choice=AttentionChoice(way=way))
    *tensors, dout = inputs(layout.nodes[-1].end, dtype)
    exact = run(reference(layout, **options), [x.double() for x in tensors], dout.double())
    plain = run(reference(layout, **options), tensors, dout)
    got = run(grouped(layout, **options), tensors, dout)
    for name, a, b, truth in zip(NAMES, got, plain, exact, strict=True):
        assert (a - truth).norm() <= 2 * (b - truth).norm(), name


def test_nodes_without_rows_cost_no_copies():
    """A node of 5 rows above two of which one is empty, and an empty one above a node of 3."""
    nodes = PackedLayout([5, 0, 0, 4, 3], [-1, -1, 0, 0, 1]).nodes
    assert ancestry(nodes) == [(5, 5), (7, 0)]


def test_nodes_out_of_order_are_refused():
    with pytest.raises(ValueError, match="node 2 of depth 0 is behind one of depth 1"):
        PackedLayout([1, 1, 1], [-1, 0, -1])
    with pytest.raises(ValueError, match="node 3 of depth 1 is behind one of depth 1"):
        PackedLayout([1, 1, 1, 1], [-1, -1, 1, 0])


def test_rows_without_keys_do_not_change_a_merge():
    """FlashAttention-2 gives +inf as their log-sum-exp, the CPU kernel -inf."""
    q, k, v, _, _ = inputs(4, torch.float64, heads=2, kv_heads=2)
    out, lse = cpu_flash.forward(
        q, k, v, Segments(torch.tensor([0, 4]), torch.tensor([0, 4]), 4, 4), Scores(0.25, True)
    )
    for empty in (float("inf"), float("-inf")):
        merged, merged_lse = out.clone(), lse.clone()
        merge_(merged, merged_lse, torch.zeros_like(out), torch.full_like(lse, empty))
        assert torch.equal(merged, out)
        assert torch.equal(merged_lse, lse)


@pytest.mark.parametrize("has_sinks", [False, True])
def test_the_op_is_well_formed_for_compile_and_autograd(has_sinks):
    """PyTorch's own checks of a custom op: schema, fake tensors, autograd registration."""
    layout = flat_layout([3, 2], [[2, 3], [1, 2]])
    q, k, v, sinks, _ = (x.requires_grad_() for x in inputs(13, torch.float64, heads=2, kv_heads=1, dim=4, value_dim=3))
    passes = layout.passes(2)
    geometry = passes.table, passes.cu_seqlens, passes.copies.source, passes.copies.order, passes.copies.offsets
    op = torch.ops.pgrpo.grouped_attention.default
    torch.library.opcheck(op, (q, k, v, sinks if has_sinks else None, *geometry, 0.25, 2.0, "builtin"))
    function = grouped(layout, window=2, softcap=2.0, has_sinks=has_sinks)
    torch.autograd.gradcheck(function, (q, k, v, sinks) if has_sinks else (q, k, v, sinks.detach()))


@pytest.mark.parametrize("window", [None, 2])
def test_the_op_behind_a_kept_node_is_well_formed(window):
    """The first node, 3 rows, has keys and values but no queries."""
    layout = PackedLayout([3, 2, 3, 1], [-1, 0, 0, 1], has_front=True)
    q, k, v, _, _ = (x.requires_grad_() for x in inputs(9, torch.float64, heads=2, kv_heads=1, dim=4, value_dim=3))
    q = q.detach()[3:].requires_grad_()
    passes = layout.passes(window)
    geometry = passes.table, passes.cu_seqlens, passes.copies.source, passes.copies.order, passes.copies.offsets
    op = torch.ops.pgrpo.grouped_attention.default
    torch.library.opcheck(op, (q, k, v, None, *geometry, 0.25, 0.0, "builtin"))
    torch.autograd.gradcheck(lambda q, k, v: grouped_attention(q, k, v, layout, 0.25, window=window), (q, k, v))


def test_forests_of_any_shape_share_one_compilation_for_each_window():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()

    @partial(torch.compile, backend=counter, dynamic=True, fullgraph=True)
    def attend(tensors, layout, window):
        q, k, v, sinks = tensors
        return grouped_attention(q, k, v, layout, 0.25, window=window, softcap=2.0, sinks_H=sinks)

    for seed in range(12):
        lengths, parents = random_forest(seed)
        layout = PackedLayout(lengths, parents, choice=AttentionChoice(windows=(4, 100)))
        *tensors, _ = inputs(sum(lengths), torch.float64, dim=8, value_dim=4)
        with fx_config.patch(use_duck_shape=False):  # pyright: ignore[reportAttributeAccessIssue]
            for window in (None, 4, 100):
                got = attend(tensors, layout, window)
                want = reference(layout, window=window, softcap=2.0, has_sinks=True)(*tensors)
                assert (got - want).abs().max() < 1e-13
    assert counter.frame_count == 3
    with pytest.raises(Exception, match=r"without this sliding window"):
        attend(tensors, layout, 7)


def call_hook(**kwargs):
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in inputs(3, torch.float64)[:3])
    with attending(PackedLayout([3], [-1])):
        return attention_forward(torch.nn.Module(), q, k, v, None, **kwargs)[0]


def test_the_hook_hands_on_what_it_knows_and_refuses_the_rest_by_name():
    q, k, v, sinks, _ = inputs(3, torch.float64)
    got = call_hook(
        scaling=0.3, sliding_window=2, softcap=1.5, s_aux=sinks, position_ids=torch.arange(3), use_cache=False
    )
    want, _ = reference_attention(q, k, v, PackedLayout([3], [-1]), 0.3, window=2, softcap=1.5, sinks_H=sinks)
    assert (got[0] - want).abs().max() < 1e-13
    assert torch.equal(call_hook(position_bias=None), call_hook())
    with pytest.raises(UnsupportedAttentionError, match="'position_bias' is not supported"):
        call_hook(position_bias=torch.zeros(1))
    with pytest.raises(UnsupportedAttentionError, match="not causal"):
        call_hook(is_causal=False)
    with pytest.raises(UnsupportedAttentionError, match=r"dropout 0\.1"):
        call_hook(dropout=0.1)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_turn_behind_kept_keys_equals_the_packed_forest(options):
    """A prompt of 4 tokens and a turn of 5, whose last token nobody fed; then three more are told, beside a new prompt."""
    layout = flat_layout([12, 3], [[2], [2]])
    q, k, v, sinks, _ = inputs(layout.nodes[-1].end, torch.float64, value_dim=12)
    want = reference(layout, **options)(q, k, v, sinks)
    options = dict(options)
    sinks = sinks if options.pop("has_sinks", False) else None
    layer: Any = SimpleNamespace(layer_idx=0)

    def attend(cache, rows):
        return cache.attend(q[rows], k[rows], v[rows], 0.25, module=layer, sinks_H=sinks, **options)

    first = DecodeCache(PackedLayout([3, 4], [-1, -1]), [1, 1], 5)
    attend(first, [12, 13, 14, *range(4)])
    for t in range(4):
        attend(first, [15, 4 + t])
        first.advance()
    front = first.front(1, 4)
    assert front.rows == 8 and torch.equal(front.layers[0][0], k[:8]) and torch.equal(front.layers[0][1], v[:8])
    assert first.front(1, 0).rows == 4
    cache = DecodeCache(PackedLayout([12, 3], [-1, -1]), [1, 1], 2, [front, NOTHING])
    got = attend(cache, [*range(8, 12), 12, 13, 14])
    assert (got - want[8:15]).abs().max() < 1e-13
    for t in range(2):
        rows = [15 + t, 17 + t]
        assert (attend(cache, rows) - want[rows]).abs().max() < 1e-13
        cache.advance()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_decoding_step_by_step_equals_the_packed_forest(options):
    """Two prompts with two completions each; one completion leaves on the way."""
    prompts, steps, heads = [5, 3], 4, 4
    layout = flat_layout(prompts, [[steps, steps]] * 2)
    q, k, v, sinks, _ = inputs(layout.nodes[-1].end, torch.float64, value_dim=12)
    want = reference(layout, **options)(q, k, v, sinks)
    options = dict(options)
    sinks = sinks if options.pop("has_sinks", False) else None
    cache = DecodeCache(PackedLayout(prompts, [-1, -1]), [2, 2], steps)
    layer: Any = SimpleNamespace(layer_idx=0)
    got = cache.attend(q[:8], k[:8], v[:8], 0.25, module=layer, sinks_H=sinks, **options)
    assert (got - want[:8]).abs().max() < 1e-13
    starts = torch.tensor([node.start for node in layout.nodes[2:]])
    for t in range(steps):
        if t == 2:
            cache.keep(torch.tensor([0, 2, 3]))
            starts = starts[[0, 2, 3]]
        rows = starts + t
        got = cache.attend(q[rows], k[rows], v[rows], 0.25, module=layer, sinks_H=sinks, **options)
        cache.advance()
        assert got.shape == (len(rows), heads, 12)
        assert (got - want[rows]).abs().max() < 1e-13
