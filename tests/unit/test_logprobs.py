"""Chunked log-probs against log_softmax of the full logits in float64."""

import textwrap

import pytest
import torch

from pgrpo.model import logit_rows, logprobs
from pgrpo.model.head import NEVER
from pgrpo.model.logprobs import TeacherRows, token_logprobs

L, E, V = 23, 8, 37


def inputs(dtype=torch.float64, rows=L, spread=1.0):
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(rows, E, generator=generator, dtype=torch.float64) * spread).to(dtype)
    weight = torch.randn(V, E, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(V, (rows,), generator=generator)
    dlogprobs = torch.randn(rows, generator=generator, dtype=torch.float64)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, dlogprobs


def reference(hidden, weight, targets, scale):
    logp = (hidden @ weight.T * scale).log_softmax(-1)
    return logp[torch.arange(len(targets)), targets], -(logp.exp() * logp).sum(-1)


# 1 row a chunk (also where one row alone is more than the limit), 5 (does not divide 23), 22 (leaves one), 23, more.
@pytest.mark.parametrize("logits_per_chunk", [1, 5 * V, 5 * V + V - 1, (L - 1) * V, L * V, 2**25])
@pytest.mark.parametrize("scale", [1.0, 0.3, 2.5])
def test_equals_log_softmax_of_full_logits(monkeypatch, logits_per_chunk, scale):
    monkeypatch.setitem(logprobs.LOGITS_PER_CHUNK, "cpu", logits_per_chunk)
    hidden, weight, targets, dlogprobs = inputs()
    got = token_logprobs(hidden, weight, targets, scale, entropy=True)
    wanted, entropy = reference(hidden, weight, targets, scale)
    assert got.entropy is not None
    assert got.logprobs.dtype == got.entropy.dtype == torch.float64
    torch.testing.assert_close(got.logprobs, wanted, rtol=0, atol=1e-13)
    torch.testing.assert_close(got.entropy, entropy, rtol=0, atol=1e-13)
    dentropy = dlogprobs.flip(0)
    assert got.entropy is not None
    for weight_of_logprobs, weight_of_entropy in ((1, 0), (0, 1), (1, 0.7)):
        got_grads, wanted_grads = (
            torch.autograd.grad(
                (weight_of_logprobs * a * dlogprobs + weight_of_entropy * b * dentropy).sum(),
                [hidden, weight],
                retain_graph=True,
            )
            for a, b in ((got.logprobs, got.entropy), (wanted, entropy))
        )
        for got_grad, wanted_grad in zip(got_grads, wanted_grads, strict=True):
            torch.testing.assert_close(got_grad, wanted_grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_gradient_of_the_entropy_alone_by_finite_differences(scale):
    hidden, weight, targets, dlogprobs = inputs(rows=3)

    def entropy(hidden):
        entropy = token_logprobs(hidden, weight.detach(), targets, scale, entropy=True).entropy
        assert entropy is not None
        return (entropy * dlogprobs).sum()

    gradient = torch.autograd.grad(entropy(hidden), hidden)[0]
    for i in range(hidden.numel()):
        step = torch.zeros(hidden.numel(), dtype=torch.float64)
        step[i] = 1e-5
        up, down = (entropy(hidden.detach() + sign * step.view(hidden.shape)).item() for sign in (1, -1))
        assert gradient.flatten()[i].item() == pytest.approx((up - down) / 2e-5, abs=1e-8)


def test_uniform_logits_by_hand():
    got = token_logprobs(torch.zeros(2, E), torch.ones(V, E), torch.tensor([0, V - 1]), entropy=True)
    assert got.entropy is not None
    log_v = torch.tensor(float(V)).log().item()
    assert got.logprobs.tolist() == pytest.approx([-log_v] * 2, abs=1e-6)
    assert got.entropy.tolist() == pytest.approx([log_v] * 2, abs=1e-6)


def test_entropy_is_optional():
    hidden, weight, targets, _ = inputs()
    assert token_logprobs(hidden, weight, targets).entropy is None


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient_and_the_other_the_same_one(frozen):
    hidden, weight, targets, dlogprobs = inputs()
    frozen_input, other = (hidden, weight) if frozen == "hidden" else (weight, hidden)
    wanted = torch.autograd.grad((reference(hidden, weight, targets, 1.0)[0] * dlogprobs).sum(), other)[0]
    frozen_input.requires_grad_(False)
    (token_logprobs(hidden, weight, targets).logprobs * dlogprobs).sum().backward()
    assert frozen_input.grad is None
    torch.testing.assert_close(other.grad, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("logits_per_chunk", [5 * V, 2**25])
def test_bfloat16_error_is_at_most_twice_that_of_a_plain_computation(monkeypatch, logits_per_chunk):
    monkeypatch.setitem(logprobs.LOGITS_PER_CHUNK, "cpu", logits_per_chunk)
    hidden, weight, targets, dlogprobs = inputs(torch.bfloat16, rows=400, spread=2.0)

    def run(function, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
        values = function(*leaves, targets, 0.7)
        values = values[0] if isinstance(values, tuple) else values
        return [values.detach(), *torch.autograd.grad((values.double() * dlogprobs[: len(values)]).sum(), leaves)]

    def error(got, exact):
        return ((got.double() - exact).norm() / exact.norm()).item()

    exact = run(reference, torch.float64)
    plain = run(reference, torch.bfloat16)
    got = run(token_logprobs, torch.bfloat16)
    assert got[0].dtype == torch.float32
    assert got[1].dtype == got[2].dtype == torch.bfloat16
    for name, g, p, e in zip(["logprobs", "dhidden", "dweight"], got, plain, exact, strict=True):
        assert error(g, e) <= 2 * error(p, e), name
    assert error(got[2], exact[2]) <= error(plain[2], exact[2]), "chunks are added up in float32"


def test_large_logits_do_not_overflow():
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    got = token_logprobs(hidden, torch.tensor([[1.0], [0.0]]), torch.tensor([0, 0]), entropy=True)
    got.logprobs.sum().backward()
    assert got.entropy is not None
    assert hidden.grad is not None
    assert got.logprobs.tolist() == [0.0, -1e4]
    assert got.entropy.tolist() == [0.0, 0.0]
    assert hidden.grad.tolist() == [[0.0], [1.0]]


def test_no_rows():
    hidden, weight, targets, _ = inputs(rows=0)
    got = token_logprobs(hidden, weight, targets, entropy=True)
    assert got.entropy is not None
    assert got.logprobs.shape == got.entropy.shape == (0,)
    got.logprobs.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.shape == (0, E)
    assert weight.grad.abs().sum() == 0


def test_peak_memory_is_far_below_the_full_logits(warm):
    """151936 tokens of vocabulary, 1024 rows, and a half of the usual logits a chunk: full float32 logits are 0.6 GB (and a plain
    forward and backward hold several)."""
    script = textwrap.dedent("""
        import resource, torch
        from pgrpo.model import logprobs
        torch.set_num_threads(1)
        logprobs.LOGITS_PER_CHUNK["cpu"] //= 2
        rows, hidden_size, vocabulary = 1024, 32, 151936
        hidden = torch.randn(rows, hidden_size, requires_grad=True)
        weight = torch.randn(vocabulary, hidden_size, requires_grad=True)
        targets = torch.randint(vocabulary, (rows,))
        logprobs.token_logprobs(hidden[:1], weight, targets[:1]).logprobs.sum().backward()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        logprobs.token_logprobs(hidden, weight, targets).logprobs.sum().backward()
        growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        print(growth / (rows * vocabulary * 4))
    """)
    done = warm.run(["-c", script])
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout) < 1 / 3


class PlainHead:
    """A teacher's head: ``scale * hidden @ weight.T``, and with a bias one that is computed by the model's own forward."""

    def __init__(self, weight, scale=1.0, bias=None):
        self.weight, self.scale, self.bias = weight, None if bias is not None else scale, bias

    def logits(self, hidden):
        return hidden @ self.weight.T + self.bias

    def ban(self, logits):
        return logits


def teacher_of(head, rows=L, temperature=1.5):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(rows, head.weight.shape[1], generator=generator, dtype=torch.float64)
    return TeacherRows(hidden.to(head.weight.dtype), head, (head.scale or 1.0) / temperature)  # pyright: ignore[reportArgumentType]


def wide_head(extra=0, **kind):
    """Of a wider model, whose vocabulary may have ``extra`` ids that no token has."""
    generator = torch.Generator().manual_seed(4)
    return PlainHead(torch.randn(V + extra, 2 * E, generator=generator, dtype=torch.float64), **kind)


@pytest.mark.parametrize("logits_per_chunk", [1, 5 * V, 2**25])
@pytest.mark.parametrize("extra", [0, 3])
def test_the_kl_to_a_teacher_equals_that_of_full_distributions(monkeypatch, logits_per_chunk, extra):
    monkeypatch.setitem(logprobs.LOGITS_PER_CHUNK, "cpu", logits_per_chunk)
    hidden, weight, targets, dlogprobs = inputs()
    for head in (
        wide_head(extra, scale=0.7),
        wide_head(extra, bias=torch.linspace(-1, 1, V + extra, dtype=torch.float64)),
    ):
        teacher = teacher_of(head)
        got = token_logprobs(hidden, weight, targets, 0.6, entropy=True, teacher=teacher)
        full = teacher.hidden_LE @ head.weight.T * 0.7 if head.bias is None else head.logits(teacher.hidden_LE)
        logq = (full / 1.5)[:, :V].log_softmax(-1)
        logp = (hidden @ weight.T * 0.6).log_softmax(-1)
        kl = torch.nn.functional.kl_div(logq, logp, reduction="none", log_target=True).sum(-1)
        assert got.kl is not None and got.entropy is not None
        torch.testing.assert_close(got.kl, kl, rtol=0, atol=1e-13)
        entropy = -(logp.exp() * logp).sum(-1)
        for a, b, c in ((0, 0, 1), (1, 0, 1), (0.5, -0.3, 0.7)):
            wanted = (a * logp[range(L), targets] + b * entropy + c * kl) @ dlogprobs
            found = (a * got.logprobs + b * got.entropy + c * got.kl) @ dlogprobs
            for x, y in zip(
                *(torch.autograd.grad(v, [hidden, weight], retain_graph=True) for v in (found, wanted)), strict=True
            ):
                torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_the_kl_to_itself_is_0_and_so_is_its_gradient():
    hidden, weight, targets, _ = inputs(torch.float32)
    teacher = teacher_of(PlainHead(weight.detach()), temperature=2.0)._replace(hidden_LE=hidden.detach())
    got = token_logprobs(hidden, weight, targets, 0.5, teacher=teacher)
    assert got.kl is not None
    assert got.kl.abs().max() < 1e-6
    assert torch.autograd.grad(got.kl.sum(), hidden)[0].abs().max() < 1e-6


def test_the_kl_of_a_head_with_a_bias(monkeypatch):
    """A policy whose logits its own forward computes: as one whose bias is a column of its head, behind a hidden state of 1."""
    monkeypatch.setitem(logprobs.LOGITS_PER_CHUNK, "cpu", 30 * V)
    hidden, weight, targets, dlogprobs = inputs()
    bias = torch.linspace(-2, 2, V, dtype=torch.float64).requires_grad_()
    teacher = teacher_of(wide_head())

    class Own:
        names = ("weight", "bias")
        parameters = (weight, bias)

        def __init__(self):
            self.weight = weight

        def logits(self, hidden, named):
            return hidden @ named["weight"].T + named["bias"]

    got = token_logprobs(hidden, Own(), targets, 0.6, entropy=True, teacher=teacher)  # pyright: ignore[reportArgumentType]
    wide = [torch.cat([x, y.view(-1, 1)], 1) for x, y in ((hidden, torch.ones(L, dtype=torch.float64)), (weight, bias))]
    wanted = token_logprobs(wide[0], wide[1], targets, 0.6, entropy=True, teacher=teacher)
    weights = torch.linspace(0.1, 1, L, dtype=torch.float64)
    grads = []
    for values in (got, wanted):
        assert values.kl is not None and values.entropy is not None
        loss = values.logprobs @ dlogprobs + 0.3 * values.entropy.sum() + values.kl @ weights
        grads.append(torch.autograd.grad(loss, [hidden, weight, bias], retain_graph=True))
    for x, y in zip((*got, *grads[0]), (*wanted, *grads[1]), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings(
    "ignore:invalid value"
)  # of the interpreter: -inf - -inf behind the vocabulary's end, which is not used
@pytest.mark.parametrize("vocabulary", [37, 5003])
def test_the_kernels_of_a_gpu_compute_the_same(vocabulary):
    """In Triton's interpreter: one block and several, the last one in part."""
    from pgrpo.model.kernels import logits as kernels

    generator = torch.Generator().manual_seed(0)
    x, y = 3 * torch.randn(2, 5, vocabulary, generator=generator)
    targets = torch.randint(vocabulary, (5,), generator=generator)
    dlogprobs, dentropy, dkl = torch.randn(3, 5, generator=generator)

    def close(got, wanted):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)

    for scale, teacher_scale in ((1.0, 1.0), (0.6, 1.7)):
        logprobs, lse, entropy = logit_rows.row_statistics(x.clone(), targets, scale, True)
        kl, teacher_lse = logit_rows.kl_statistics(x, y.clone(), scale, teacher_scale)
        close(kernels.row_statistics(x, targets, scale, True), (logprobs, lse, entropy))
        close(kernels.kl_statistics(x, y, scale, teacher_scale), (kl, teacher_lse))
        for entropies, has_kl in (
            (None, False),
            (None, True),
            ((entropy, dentropy), False),
            ((entropy, dentropy), True),
        ):
            wanted, got = (
                module.to_logit_gradient_(
                    x.clone(), targets, lse, dlogprobs, scale, entropies,
                    logit_rows.KlGradient(y.clone(), teacher_scale, teacher_lse, kl, dkl) if has_kl else None,
                )
                for module in (logit_rows, kernels)
            )  # fmt: skip
            close(got, wanted)


def fuse_products(monkeypatch):
    """Let Triton's interpreter subtract as a GPU does: from a product in float64 before it is rounded to float32."""
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    multiply, subtract = Builder.create_fmul, Builder.create_fsub

    def create_fmul(self, a, b):
        made = multiply(self, a, b)
        if made.data.dtype == "float32":
            made.attr["exact"] = a.data.astype("float64") * b.data
        return made

    def create_fsub(self, a, b):
        made = subtract(self, a, b)
        if "exact" in a.attr:
            made.data = (a.attr["exact"] - b.data).astype("float32")
        return made

    monkeypatch.setattr(Builder, "create_fmul", create_fmul)
    monkeypatch.setattr(Builder, "create_fsub", create_fsub)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")  # of the interpreter, as above
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernels_leave_banned_ids_out_at_any_temperature(dtype, monkeypatch):
    """Also where a GPU fuses the product with the temperature and the subtraction of the maximum."""
    from pgrpo.model.kernels import logits as kernels

    fuse_products(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    x, y = (3 * torch.randn(2, 3, V, generator=generator)).to(dtype)
    banned, targets = [5, 8], torch.tensor([0, 9, 36])
    x[:, banned] = y[:, banned] = NEVER
    kept = [i for i in range(V) if i not in banned]
    dlogprobs, dentropy, dkl = torch.randn(3, 3, generator=generator)
    for temperature in (0.3, 0.6, 0.7, 1.0, 1.1, 1.2, 1.5, 5.0, 20.0):
        scale = 1 / temperature
        p, q = (z[:, kept].double().mul(scale).log_softmax(-1) for z in (x, y))
        entropy, kl = -(p.exp() * p).sum(-1), (p.exp() * (p - q)).sum(-1)
        index = torch.tensor([kept.index(i) for i in targets.tolist()])
        logprobs, lse, got_entropy = kernels.row_statistics(x, targets, scale, True)
        got_kl, teacher_lse = kernels.kl_statistics(x, y, scale, scale)
        for got, wanted in ((logprobs, p[range(3), index]), (got_entropy, entropy), (got_kl, kl)):
            torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)
        kls = logit_rows.KlGradient(y.clone(), scale, teacher_lse, got_kl, dkl)
        gradient = kernels.to_logit_gradient_(x.clone(), targets, lse, dlogprobs, scale, (got_entropy, dentropy), kls)
        assert gradient.isfinite().all() and not gradient[:, banned].any()
