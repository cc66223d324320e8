"""On a GPU: every kernel and way of passing against fp64, at most twice as far off as a plain bfloat16 computation."""

import pytest
import torch
from making import flat_layout

from pgrpo.attention.choose import AttentionChoice
from pgrpo.attention.grouped import grouped_attention
from pgrpo.attention.kernels import flash
from pgrpo.attention.kernels.flash import FASTEST_FIRST, choose_kernel, why_not
from pgrpo.attention.merge import copy_rows, merge_, sum_copies
from pgrpo.attention.reference import reference_attention
from pgrpo.model.logprobs import TeacherRows, token_logprobs

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
LENGTHS = [
    ([300, 1, 77], [[40, 0, 129], [1], [64, 300]]),
    ([513], [[256] * 8]),
    ([64, 64], [[700, 3], [512, 0, 1]]),
    ([0, 0], [[500, 3], [4]]),
    ([6, 2], [[], []]),
    ([5] * 33, [[3] * 8] * 33),  # 297 segments
]


def run(function, tensors, dout):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("way", ["between_depths", "copied_keys"])
@pytest.mark.parametrize("kernel", FASTEST_FIRST)
@pytest.mark.parametrize(("prefix_lens", "suffix_lens"), LENGTHS)
def test_attention(prefix_lens, suffix_lens, kernel, way, head_dim):
    if why := why_not(kernel, GPU, torch.bfloat16, head_dim):
        pytest.skip(why)
    torch.manual_seed(0)
    layout = flat_layout(prefix_lens, suffix_lens, GPU, AttentionChoice(kernel, way=way))
    total = layout.nodes[-1].end
    q, k, v, dout = (torch.randn(total, h, head_dim, device=GPU).bfloat16() for h in (8, 2, 2, 8))
    scale = head_dim**-0.5

    def reference(q, k, v):
        return reference_attention(q, k, v, layout, scale)[0]

    exact = run(reference, [x.double() for x in (q, k, v)], dout.double())
    plain = run(reference, (q, k, v), dout)
    got = run(lambda q, k, v: grouped_attention(q, k, v, layout, scale), (q, k, v), dout)
    for name, a, b, truth in zip(("out", "dq", "dk", "dv"), got, plain, exact, strict=True):
        error, allowed = (a - truth).norm() / truth.norm(), 2 * (b - truth).norm() / truth.norm()
        print(f"{kernel} {way} {prefix_lens} {name}: {error:.1e}, plain bfloat16 {allowed / 2:.1e}")
        assert error <= allowed, name


def test_flash4_compiles_once_for_segments_of_all_lengths_and_again_for_many():
    if why := why_not("flash4", GPU, torch.bfloat16, 64):
        pytest.skip(why)
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("on Blackwell short segments have kernels of their own")
    flash4 = flash._flash4()
    kernels = [flash4._flash_attn_fwd, flash4._flash_attn_bwd, flash4._bwd_preprocess, flash4._bwd_postprocess_convert]

    def compiled_for(groups, prompt, completions):
        choice = AttentionChoice("flash4", way="copied_keys")
        layout = flat_layout([prompt] * groups, [completions] * groups, GPU, choice)
        q, k, v, dout = (torch.randn(layout.nodes[-1].end, h, 64, device=GPU).bfloat16() for h in (6, 2, 2, 6))
        run(lambda q, k, v: grouped_attention(q, k, v, layout, 0.125), (q, k, v), dout)
        return [len(kernel.compile_cache.cache) for kernel in kernels]

    few = compiled_for(2, 300, [200, 100])
    assert all(few)
    for groups, prompt, completions in ((2, 100, [90, 30]), (1, 3, [2, 1]), (64, 10, [5, 6, 7])):  # 256 segments
        assert compiled_for(groups, prompt, completions) == few
    many = compiled_for(65, 10, [5, 6, 7])  # 260 segments
    assert many > few
    assert compiled_for(70, 300, [5, 6, 200]) == many


@pytest.mark.parametrize("dim", [64, 96, 128])
def test_the_merge_equals_its_specification_on_a_cpu(dim):
    out, out_p = (torch.randn(1000, 6, dim, device=GPU).bfloat16() for _ in range(2))
    lse, lse_p = (4 * torch.randn(6, 1500, device=GPU) for _ in range(2))
    lse, lse_p = lse[:, 500:], lse_p[:, :1000].contiguous()
    wanted, wanted_lse, *others = (x.double().cpu() for x in (out, lse, out_p, lse_p))
    merge_(wanted, wanted_lse, *others)  # on a CPU it is the specification
    merge_(out, lse, out_p, lse_p)
    assert (lse.cpu() - wanted_lse).abs().max() < 1e-5
    assert (out.cpu() - wanted).abs().max() <= 2**-8 * wanted.abs().max()


def test_copied_rows():
    source = torch.randint(70, (400,), device=GPU)
    source[:70] = torch.arange(70, device=GPU)
    order = source.argsort(stable=True).int()
    offsets = torch.zeros(71, dtype=torch.int32, device=GPU)
    offsets[1:] = source.bincount(minlength=70).cumsum(0)
    k, v = (torch.randn(70, 3, 96, device=GPU).bfloat16() for _ in range(2))
    assert all(torch.equal(a, b[source]) for a, b in zip(copy_rows(k, v, source), (k, v), strict=True))
    dk, dv = (torch.randn(400, 3, 96, device=GPU).bfloat16() for _ in range(2))
    for got, again, x in zip(*(sum_copies(dk, dv, source, order, offsets) for _ in range(2)), (dk, dv), strict=True):
        wanted = torch.zeros(70, 3, 96, device=GPU, dtype=torch.float64).index_add_(0, source, x.double())
        assert (got - wanted).abs().max() <= 2**-8 * wanted.abs().max()
        assert torch.equal(got, again)


@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("vocabulary", [1000, 49152, 151936])
def test_logprobs(vocabulary, scale, monkeypatch):
    """Two and a half chunks; log-probs, entropy and gradients, and nothing for a frozen head."""
    from pgrpo.model import logprobs

    monkeypatch.setitem(logprobs.LOGITS_PER_CHUNK, "cuda", 100 * vocabulary)
    torch.manual_seed(0)
    hidden, weight = torch.randn(250, 64, device=GPU).bfloat16(), torch.randn(vocabulary, 64, device=GPU).bfloat16()
    targets, dlogprobs = torch.randint(vocabulary, (250,), device=GPU), torch.randn(250, device=GPU)

    def reference(hidden, weight):
        logits = scale * (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
        return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)

    def ours(hidden, weight):
        return token_logprobs(hidden, weight, targets, scale).logprobs

    exact = run(reference, [hidden.double(), weight.double()], dlogprobs.double())
    plain = run(reference, [hidden, weight], dlogprobs)
    got = run(ours, [hidden, weight], dlogprobs)
    for name, a, b, truth in zip(("logprobs", "dhidden", "dweight"), got, plain, exact, strict=True):
        assert (a - truth).norm() <= 2 * (b - truth).norm(), name
    probs = (scale * (hidden @ weight.T).double()).softmax(-1)  # of logits in bfloat16, which are what ours are
    entropy = token_logprobs(hidden, weight, targets, scale, entropy=True).entropy
    assert entropy is not None
    assert (entropy - torch.special.entr(probs).sum(-1)).abs().max() < 1e-3

    def entropy_of(hidden, weight):
        logits = scale * (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
        return torch.special.entr(logits.softmax(-1)).sum(-1)

    def our_entropy(hidden, weight):
        return token_logprobs(hidden, weight, targets, scale, entropy=True).entropy

    exact = run(entropy_of, [hidden.double(), weight.double()], dlogprobs.double())
    plain, got = (run(f, [hidden, weight], dlogprobs) for f in (entropy_of, our_entropy))
    for name, a, b, truth in zip(("entropy", "dhidden", "dweight"), got, plain, exact, strict=True):
        assert (a - truth).norm() <= 2 * (b - truth).norm(), name
    teacher = Teacher(torch.randn(250, 96, device=GPU).bfloat16(), torch.randn(vocabulary, 96, device=GPU).bfloat16())

    def kl_of(hidden, weight):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logp = (scale * (hidden @ weight.T).to(dtype)).log_softmax(-1)
        logq = (scale * (teacher.hidden @ teacher.weight.T).to(dtype)).log_softmax(-1)
        return (logp.exp() * (logp - logq)).sum(-1)

    def our_kl(hidden, weight):
        rows = TeacherRows(teacher.hidden, teacher, scale)  # pyright: ignore[reportArgumentType]
        return token_logprobs(hidden, weight, targets, scale, teacher=rows).kl

    exact = run(kl_of, [hidden.double(), weight.double()], dlogprobs.double())
    plain, got = (run(f, [hidden, weight], dlogprobs) for f in (kl_of, our_kl))
    for name, a, b, truth in zip(("kl", "dhidden", "dweight"), got, plain, exact, strict=True):
        assert (a - truth).norm() <= 2 * (b - truth).norm(), name
    frozen = hidden.clone().requires_grad_()
    token_logprobs(frozen, weight, targets, scale).logprobs.sum().backward()
    assert frozen.grad is not None
    assert weight.grad is None


class Teacher:
    """Hidden states, and a head that is a plain matrix."""

    scale = 1.0

    def __init__(self, hidden, weight):
        self.hidden, self.weight = hidden, weight

    def ban(self, logits):
        return logits


def test_auto_says_why():
    with pytest.raises(ValueError, match=r"not flash4: .*; not builtin: head dim 264"):
        choose_kernel("auto", GPU, torch.bfloat16, 264)
    with pytest.raises(ValueError, match="float32"):
        choose_kernel("builtin", GPU, torch.float32, 128)
