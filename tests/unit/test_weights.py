"""What an engine is given is what an export of the same policy would hold."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from pgrpo.config import ModelConfig
from pgrpo.distributed.fsdp import place
from pgrpo.distributed.world import World
from pgrpo.model.lora import add_adapters, merge_adapters
from pgrpo.model.weights import _round_stochastically, full_weights, weight_names
from pgrpo.planning.dims import decoder_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_in_the_order_of_the_layers(tiny_model, dtype):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    got = list(full_weights(model, dtype))
    wanted = dict(model.named_parameters())
    assert [name for name, _ in got] == list(wanted)
    assert {name for name, _ in got} == weight_names(model)
    assert all(t.dtype == dtype and torch.equal(t, wanted[n].detach().to(dtype)) for n, t in got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_merged(tiny_model, dtype):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype)
    names = weight_names(model)
    add_adapters(model, ModelConfig(path=str(tiny_model), lora_rank=4, lora_alpha=8.0), seed=0)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
    got = dict(full_weights(model, dtype))
    assert got.keys() == names == weight_names(model)
    merged = copy.deepcopy(model).float()
    merge_adapters(merged)
    changed = 0
    for name, weight in merged.named_parameters():
        torch.testing.assert_close(
            got[name], weight.detach().to(dtype), rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6
        )
        changed += not torch.equal(got[name], dict(model.named_parameters()).get(name, torch.empty(0)))
    assert changed > 10


@pytest.mark.parametrize("rank", [0, 4])
def test_one_rank_s_shards_are_whole(tiny_model, rank):
    """FSDP2 keeps float32 weights, also of one rank: they are cast, and given without DTensor."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    if rank:
        add_adapters(model, ModelConfig(path=str(tiny_model), lora_rank=rank), seed=0)
    before = [(name, weight.clone()) for name, weight in full_weights(model, torch.bfloat16)]
    try:
        place(model, decoder_layers(model), World(0, 1, torch.device("cpu")), torch.bfloat16)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        after = list(full_weights(model, torch.bfloat16))
    finally:
        dist.destroy_process_group()
    assert [name for name, _ in after] == [name for name, _ in before]
    for (_, weight), (_, wanted) in zip(after, before, strict=True):
        assert type(weight) is torch.Tensor and weight.dtype == torch.bfloat16 and torch.equal(weight, wanted)


def test_what_a_young_adapter_adds_is_in_the_sum():
    """A thousandth of the weights' size, which rounding to nearest would lose to 90 %."""
    torch.manual_seed(0)
    weight = (0.02 * torch.randn(1000, 1000)).bfloat16().float()
    delta = 1e-5 * torch.randn(1000, 1000).sign() * torch.rand(1000, 1000)
    rounded = _round_stochastically(weight + delta)
    assert torch.equal(rounded, rounded.bfloat16().float())
    share = ((rounded - weight) * delta).sum() / delta.square().sum()
    nearest = (((weight + delta).bfloat16().float() - weight) * delta).sum() / delta.square().sum()
    print(f"share of the change: {share:.3f}; to nearest {nearest:.3f}")
    assert share == pytest.approx(1.0, abs=0.05) and nearest < 0.5
    assert torch.equal(_round_stochastically(weight), weight)


def test_buffers_of_a_checkpoint_are_among_the_weights_in_their_own_precision():
    config = AutoConfig.for_model(
        "deepseek_v3", vocab_size=30, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=2,
        first_k_dense_replace=1, num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    got = dict(full_weights(model, torch.bfloat16))
    assert got.keys() == weight_names(model)
    buffers = {name for name, _ in model.named_buffers()} & got.keys()
    assert buffers == {"model.layers.1.mlp.gate.e_score_correction_bias"}
    assert all(got[name].dtype == torch.float32 for name in buffers)
