"""Experts as grouped products, against transformers' loop over experts."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from pgrpo.model.families import expert_products
from pgrpo.model.policy import Policy

SIZES = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_experts_per_tok": 3,
}  # fmt: skip
ROWS, EXPERTS = 37, 6


def make(kind, **changes):
    counts = {"num_experts": EXPERTS, "num_local_experts": EXPERTS, "n_routed_experts": EXPERTS}
    config = AutoConfig.for_model(kind, **{**SIZES, **counts, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    return model.double()


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def module(request):
    """With matrices stored [outputs, inputs]; and [inputs, outputs], with biases."""
    (found,) = [m for m in make(request.param).modules() if hasattr(m, "_apply_gate")]
    for parameter in found.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return found


def random_inputs(dtype=torch.float64):
    """Rows, of which none goes to expert 4 and all go to expert 2."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(ROWS, EXPERTS, generator=generator, dtype=torch.float64)
    scores[:, 4], scores[:, 2] = -1, 2 + scores[:, 2]
    weights, experts = scores.topk(3, -1)
    hidden = torch.randn(ROWS, 32, generator=generator, dtype=torch.float64)
    return hidden.to(dtype).requires_grad_(), experts, weights.to(dtype).requires_grad_()


def outputs_and_gradients(module, run, dtype=torch.float64):
    hidden, experts, weights = random_inputs(dtype)
    out = run(hidden, experts, weights)
    ramp = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    trained = [p for p in module.parameters() if p.requires_grad]
    return [out.detach(), *torch.autograd.grad((out.double() * ramp).sum(), [hidden, weights, *trained])]


def ours(module):
    return lambda *inputs: expert_products.forward(module, *inputs)


def test_outputs_and_gradients_are_those_of_a_loop_over_experts(module):
    got, want = outputs_and_gradients(module, ours(module)), outputs_and_gradients(module, module)
    assert len(got) == len(want) >= 5
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() < 1e-13 * b.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lower_precision_is_no_further_off_than_transformers_grouped_experts(module, dtype):
    low = copy.deepcopy(module).to(dtype)
    exact = outputs_and_gradients(low.double(), low)
    low = low.to(dtype)
    got = outputs_and_gradients(low, ours(low), dtype)
    low.config = copy.deepcopy(low.config)
    low.config._experts_implementation = "grouped_mm"
    theirs = outputs_and_gradients(low, low, dtype)
    for a, b, right in zip(got, theirs, exact, strict=True):
        assert a.dtype == dtype
        errors = [(x.double() - right).norm() / right.norm() for x in (a, b)]
        assert errors[0] < 2 * errors[1] + 2e-6


def test_frozen_experts_have_no_gradient(module, monkeypatch):
    frozen = copy.deepcopy(module).requires_grad_(False)
    monkeypatch.setattr(expert_products, "_outer", None)  # what computes the gradients of matrices
    got, want = outputs_and_gradients(frozen, ours(frozen)), outputs_and_gradients(module, module)[:3]
    assert all((a - b).abs().max() < 1e-13 * b.abs().max() for a, b in zip(got, want, strict=True))


def test_biases_of_frozen_matrices_have_a_gradient():
    (experts,) = [m for m in make("gpt_oss").modules() if hasattr(m, "_apply_gate")]
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.2)
    experts.requires_grad_(False).gate_up_proj_bias.requires_grad_()
    got, want = outputs_and_gradients(experts, ours(experts)), outputs_and_gradients(experts, experts)
    assert len(got) == len(want) == 4
    assert all((a - b).abs().max() < 1e-13 * b.abs().max() for a, b in zip(got, want, strict=True))


def test_a_compiler_is_told_the_shapes(module):
    hidden, experts, _ = random_inputs()
    experts, order = experts.flatten().sort(stable=True)
    rows, place = order // 3, order.argsort()
    ends = torch.searchsorted(experts, torch.arange(EXPERTS), right=True, out_int32=True)
    turned, bias = module.is_transposed, getattr(module, "gate_up_proj_bias", None)
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(
        expert_products.expert_inputs,
        (hidden, module.gate_up_proj, bias, rows, place, experts, ends, 3, turned), test_utils=checks,
    )  # fmt: skip
    inner = torch.randn(3 * ROWS, 24, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(
        expert_products.expert_outputs, (inner, module.down_proj, rows, place, ends, 3, turned), test_utils=checks
    )


def test_policies_compute_stacked_experts_so_and_leave_others_alone():
    model = make("qwen3_moe")
    Policy(model)
    assert model.config._experts_implementation == "pgrpo"
    model = make("qwen3_moe")
    model.model.layers[0].mlp.experts.has_post_expert_norm = True
    expert_products.use_products(model)
    assert model.config._experts_implementation == "eager"
