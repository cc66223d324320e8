"""On a GPU: adapters beside stacked experts in grouped products, against weights to which they were added in float64."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM

from pgrpo.model.families import expert_products
from pgrpo.model.families.expert_adapters import add_expert_adapters
from pgrpo.planning.dims import is_stack

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
EXPERTS, ACTIVE, ROWS = 16, 4, 700
NAMES = ("gate_up_proj", "down_proj")


def make_stack(kind, rank):
    config = AutoConfig.for_model(
        kind, vocab_size=64, hidden_size=512, intermediate_size=256, moe_intermediate_size=256, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=EXPERTS, num_local_experts=EXPERTS,
        num_experts_per_tok=ACTIVE,
    )  # fmt: skip
    torch.manual_seed(0)
    (stack,) = [m for m in AutoModelForCausalLM.from_config(config).modules() if is_stack(m)]
    stack.config._experts_implementation = "eager"
    add_expert_adapters([stack], NAMES, rank, 2.0 * rank)
    for name, parameter in stack.named_parameters():
        nn.init.normal_(parameter, std=0.04)
        parameter.requires_grad_("lora_" in name)
    return stack.to(GPU, torch.bfloat16)


def outputs_and_gradients(stack, run, dtype):
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(ROWS, EXPERTS, generator=generator)
    scores[:, 4], scores[:, 2] = -1, 2 + scores[:, 2]  # no row goes to expert 4, and all go to expert 2
    weights, experts = scores.softmax(-1).topk(ACTIVE, -1)
    hidden = torch.randn(ROWS, 512, generator=generator).to(GPU, dtype).requires_grad_()
    weights = weights.to(GPU, dtype).requires_grad_()
    out = run(stack, hidden, experts.to(GPU), weights)
    ramp = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=GPU).view_as(out)
    trained = [p for p in stack.parameters() if p.requires_grad]
    return [out.detach(), *torch.autograd.grad((out.double() * ramp).sum(), [hidden, weights, *trained])]


def summed(stack, *inputs):
    weights = {}
    for name in NAMES:
        adapter = getattr(stack, f"lora_{name}")
        delta = 2.0 * adapter.lora_B["default"].weight @ adapter.lora_A["default"].weight
        weights[name] = getattr(stack, name) + (delta.mT if stack.is_transposed else delta)
    return functional_call(stack, weights, inputs)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rank", [1, 8, 16, 64])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_bfloat16_is_no_further_off_than_summed_weights(kind, rank, compiled):
    stack = make_stack(kind, rank)
    ours = torch.compile(expert_products.forward, dynamic=True, fullgraph=True) if compiled else expert_products.forward
    exact = outputs_and_gradients(copy.deepcopy(stack).double(), summed, torch.float64)
    plain = outputs_and_gradients(stack, summed, torch.bfloat16)
    got, again = (outputs_and_gradients(stack, ours, torch.bfloat16) for _ in range(2))
    assert len(got) == 3 + 4
    for a, b, right, same in zip(got, plain, exact, again, strict=True):
        errors = [((x.double() - right).norm() / right.norm()).item() for x in (a, b)]
        print(f"{kind}, rank {rank}: {errors[0]:.1e}, plain {errors[1]:.1e}")
        # Of rank 1, B's gradient sums rows times one number each, whose rounding to bf16 sums over weights do not have.
        most = (4 if rank == 1 else 2) * errors[1] + 2e-3
        assert a.dtype == torch.bfloat16 and errors[0] < most and torch.equal(a, same)
