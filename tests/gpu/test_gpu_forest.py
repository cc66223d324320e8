"""On a GPU: forests, sliding windows, sinks, soft-capped scores and unlike head dims, by every kernel against fp64; each at most
twice as far off as a plain bfloat16 computation."""

import pytest
import torch
from making import flat_layout

from pgrpo.attention.choose import AttentionChoice
from pgrpo.attention.grouped import grouped_attention
from pgrpo.attention.kernels.flash import FASTEST_FIRST, varlen_backward, varlen_forward, why_not
from pgrpo.attention.kernels.segments import Scores, Segments
from pgrpo.attention.layout import PackedLayout, cumulative
from pgrpo.attention.reference import reference_attention

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
FLAT = flat_layout([300, 77], [[40, 1, 129], [64, 300]])
DEEP = PackedLayout([260, 31, 40, 1, 129, 64, 200, 3, 150, 90], [-1, -1, 0, 0, 1, 2, 2, 3, 6, 6])
CASES = {
    "a forest": (DEEP, 128, 128, {}),
    "head dim 256": (FLAT, 256, 256, {}),
    "a window": (DEEP, 128, 128, {"window": 100}),
    "a window and sinks": (DEEP, 64, 64, {"window": 128, "has_sinks": True}),
    "sinks": (FLAT, 64, 64, {"has_sinks": True}),
    "soft-capped": (DEEP, 128, 128, {"softcap": 30.0}),
    "a window, soft-capped, head dim 256": (FLAT, 256, 256, {"window": 64, "softcap": 50.0}),
    "values of 128, keys of 192": (FLAT, 192, 128, {}),
    "values of 128, keys of 192, as many key heads as query heads": (FLAT, 192, 128, {"kv_heads": 8}),
    "values of 48, keys of 64": (FLAT, 64, 48, {}),
}


def run(function, tensors, dout):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*leaves)
    gradients = torch.autograd.grad(out, leaves, dout, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves, strict=True))]


@pytest.mark.parametrize("way", ["between_depths", "copied_keys"])
@pytest.mark.parametrize("kernel", FASTEST_FIRST)
@pytest.mark.parametrize("case", CASES)
def test_attention(case, kernel, way):
    shape, dim, value_dim, options = CASES[case]
    if why := why_not(kernel, GPU, torch.bfloat16, dim, value_dim, softcapped="softcap" in options):
        pytest.skip(why)
    if "window" in options and way == "copied_keys":
        pytest.skip("a window has one way")
    torch.manual_seed(0)
    lengths, parents = ([getattr(node, name) for node in shape.nodes] for name in ("length", "parent"))
    layout = PackedLayout(lengths, parents, GPU, AttentionChoice(kernel, way=way))
    options = dict(options)
    has_sinks, kv_heads = options.pop("has_sinks", False), options.pop("kv_heads", 2)
    total, scale = sum(lengths), dim**-0.5
    shapes = [(total, 8, dim), (total, kv_heads, dim), (total, kv_heads, value_dim), (8,), (total, 8, value_dim)]
    *tensors, dout = (torch.randn(s, device=GPU).bfloat16() for s in shapes)
    if "softcap" in options:
        tensors[0] *= 6  # scores of the cap's size

    def reference(q, k, v, sinks):
        return reference_attention(q, k, v, layout, scale, sinks_H=sinks if has_sinks else None, **options)[0]

    def ours(q, k, v, sinks):
        return grouped_attention(q, k, v, layout, scale, sinks_H=sinks if has_sinks else None, **options)

    exact = run(reference, [x.double() for x in tensors], dout.double())
    plain = run(reference, tensors, dout)
    got = run(ours, tensors, dout)
    for name, a, b, truth in zip(("out", "dq", "dk", "dv", "dsinks"), got, plain, exact, strict=True):
        size = truth.norm().clamp(min=1e-30)
        error, allowed = (a - truth).norm() / size, 2 * (b - truth).norm() / size
        print(f"{case}: {kernel} {way} {name}: {error:.1e}, plain bfloat16 {allowed / 2:.1e}")
        assert error <= allowed, name


@pytest.mark.parametrize("kernel", FASTEST_FIRST)
def test_rows_without_keys_and_keys_without_rows_have_no_gradient(kernel):
    """Segments (5 queries, no keys), (no queries, 7 keys), (9, 6). The log-sum-exp of the first is an infinity of either sign."""
    if why := why_not(kernel, GPU, torch.bfloat16, 128):
        pytest.skip(why)
    seg = Segments(cumulative([5, 0, 9], GPU), cumulative([0, 7, 6], GPU), 9, 7)
    q, k, v, dout = (torch.randn(n, h, 128, device=GPU).bfloat16() for n, h in ((14, 8), (13, 2), (13, 2), (14, 8)))
    out, lse = varlen_forward(q, k, v, seg, Scores(0.1), kernel)
    print(f"{kernel}: lse without keys {lse[0, 0].item()}")
    assert lse[:, :5].isinf().all()
    assert lse[:, 5:].isfinite().all()
    assert not out[:5].any()
    lse = lse.masked_fill(lse.isinf(), 3.0)  # as after a merge with other keys
    dq, dk, dv = varlen_backward(dout, q, k, v, out, lse, seg, Scores(0.1), kernel)
    assert not dq[:5].any()
    assert not dk[:7].any()
    assert not dv[:7].any()
    assert all(x.isfinite().all() for x in (dq, dk, dv))
