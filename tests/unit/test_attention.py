"""Grouped attention against the dense fp64 reference, forward and backward."""

import pytest
import torch

from pgrpo.attention.choose import AttentionChoice
from pgrpo.attention.grouped import grouped_attention
from pgrpo.attention.layout import PackedLayout
from pgrpo.attention.reference import attention_mask, reference_attention

LENGTHS = [
    ([3, 2], [[2, 3], [1, 2]]),
    ([7], [[4, 4, 4]]),
    ([5, 1, 9], [[0, 1, 6], [3], [2, 2, 0, 8]]),
    ([4, 4], [[], [3, 0]]),
    ([6, 2], [[], []]),
    ([0, 0], [[5, 3], [4]]),
]


def inputs(total: int, dtype: torch.dtype, heads=4, kv_heads=2, dim=16, seed=0):
    gen = torch.Generator().manual_seed(seed)
    shapes = [(total, heads, dim), (total, kv_heads, dim), (total, kv_heads, dim), (total, heads, dim)]
    return [torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype) for shape in shapes]


def run(function, tensors, dout):
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def test_one_row_of_the_mask_by_hand():
    """Row 9 of the worked example: the last token of a' sees prompt A (0-2) and a' (7-9), and nothing else."""
    layout = PackedLayout.from_lengths([3, 2], [[2, 3], [1, 2]])
    assert layout.cu_seqlens.tolist() == [0, 3, 5, 7, 10, 11, 13]
    assert layout.cu_seqlens_prefix.tolist() == [0, 3, 5]
    assert layout.cu_seqlens_group.tolist() == [0, 5, 8]
    assert attention_mask(layout)[9].nonzero().flatten().tolist() == [0, 1, 2, 7, 8, 9]
    assert attention_mask(layout)[11].nonzero().flatten().tolist() == [3, 4, 11]


@pytest.mark.parametrize("passes", ["two_passes", "copied_keys"])
@pytest.mark.parametrize(("prefix_lens", "suffix_lens"), LENGTHS)
def test_equals_the_dense_reference_in_fp64(prefix_lens, suffix_lens, passes):
    layout = PackedLayout.from_lengths(prefix_lens, suffix_lens, choice=AttentionChoice(passes=passes))
    assert bool(layout.sizes.longest_copy) == (passes == "copied_keys" and any(prefix_lens))
    q, k, v, dout = inputs(int(layout.cu_seqlens[-1]), torch.float64)
    got = run(lambda q, k, v: grouped_attention(q, k, v, layout, 0.25), (q, k, v), dout)
    want = run(lambda q, k, v: reference_attention(q, k, v, layout, 0.25)[0], (q, k, v), dout)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert (a - b).abs().max() < 1e-13, name


@pytest.mark.parametrize("passes", ["two_passes", "copied_keys"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("prefix_lens", "suffix_lens"), [([33, 20], [[20, 31], [11, 0, 22]]), ([128], [[40] * 8])])
def test_low_precision_error_is_at_most_twice_that_of_a_plain_computation(dtype, prefix_lens, suffix_lens, passes):
    layout = PackedLayout.from_lengths(prefix_lens, suffix_lens, choice=AttentionChoice(passes=passes))
    q, k, v, dout = inputs(int(layout.cu_seqlens[-1]), dtype)

    def reference(q, k, v):
        return reference_attention(q, k, v, layout, 0.25)[0]

    exact = run(reference, [x.double() for x in (q, k, v)], dout.double())
    plain = run(reference, (q, k, v), dout)
    got = run(lambda q, k, v: grouped_attention(q, k, v, layout, 0.25), (q, k, v), dout)
    for name, a, b, truth in zip(("out", "dq", "dk", "dv"), got, plain, exact, strict=True):
        assert (a - truth).norm() <= 2 * (b - truth).norm(), name


def test_the_op_is_well_formed_for_compile_and_autograd():
    """PyTorch's own checks of a custom op: schema, fake tensors, autograd registration."""
    layout = PackedLayout.from_lengths([3, 2], [[2, 3], [1, 2]])
    q, k, v, _ = (x.requires_grad_() for x in inputs(13, torch.float64, heads=2, kv_heads=1, dim=4))
    copies = (layout.copies.source, layout.copies.order, layout.copies.offsets, layout.copies.cu_seqlens)
    segments = (layout.cu_seqlens, layout.cu_seqlens_prefix, layout.cu_seqlens_group)
    op = torch.ops.pgrpo.grouped_attention.default
    torch.library.opcheck(op, (q, k, v, *segments, *copies, layout.size_tensor, 0.25, "builtin"))
    torch.autograd.gradcheck(lambda q, k, v: grouped_attention(q, k, v, layout, 0.25), (q, k, v))
