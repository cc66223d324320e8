"""Learning rates by hand, AdamW against its paper, clipping, and the optimizer's state as tensors."""

import math

import pytest
import torch
import transformers
from torch import nn

from pgrpo.config import OptimConfig
from pgrpo.training import offload
from pgrpo.training.optim import (
    build_optimizer,
    clip_gradients,
    learning_rate,
    load_optimizer_shards,
    optimizer_shards,
    set_learning_rate,
)


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 3))


def train(module, optimizer, steps, start=0, lr=1e-2):
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(7, (5,), generator=generator)
        set_learning_rate(optimizer, lr / (step + 1))
        module(ids).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("schedule", "warmup", "wanted"),
    [
        ("constant", 0, [8, 8, 8, 8, 8, 8]),
        ("constant", 4, [2, 4, 6, 8, 8, 8]),
        ("linear", 0, [8, 8 * 5 / 6, 8 * 4 / 6, 8 * 3 / 6, 8 * 2 / 6, 8 / 6]),
        ("linear", 2, [4, 8, 8, 6, 4, 2]),
        ("cosine", 0, [8 * (1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)]),
        ("cosine", 2, [4, 8, 8, 4 * (1 + math.sqrt(0.5)), 4, 4 * (1 - math.sqrt(0.5))]),
        ("linear", 6, [8 / 6, 16 / 6, 4, 32 / 6, 40 / 6, 8]),
    ],
)
def test_schedules_by_hand(schedule, warmup, wanted):
    config = OptimConfig(lr=8.0, schedule=schedule, warmup_steps=warmup)
    assert [learning_rate(config, step, 6) for step in range(6)] == pytest.approx(wanted, rel=1e-14)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 2])
def test_decay_reaches_zero_after_the_last_step(schedule, warmup):
    config = OptimConfig(lr=8.0, schedule=schedule, warmup_steps=warmup)
    assert learning_rate(config, 6, 6) == pytest.approx(0, abs=1e-15)


def test_set_learning_rate_reaches_every_group():
    optimizer = build_optimizer(model(), OptimConfig(lr=1.0))
    set_learning_rate(optimizer, 0.125)
    assert [g["lr"] for g in optimizer.param_groups] == [0.125, 0.125]


def test_only_matrices_decay_and_no_embeddings():
    module = model()
    optimizer = build_optimizer(module, OptimConfig(lr=0.5, weight_decay=0.1))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # no gradient: what is left is w <- w - lr * weight_decay * w
    for name, parameter in module.named_parameters():
        factor = 0.95 if name == "2.weight" else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor, rtol=1e-6, atol=0)
    assert before["1.weight"].ndim == before["2.bias"].ndim == 1


def test_biases_of_stacked_experts_do_not_decay():
    """They have two dimensions, as matrices do."""
    config = transformers.GptOssConfig(
        vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, head_dim=4,
        num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    module = transformers.AutoModelForCausalLM.from_config(config)
    names = {id(p): name for name, p in module.named_parameters()}
    decays, stays = ({names[id(p)] for p in g["params"]} for g in build_optimizer(module, OptimConfig()).param_groups)
    stem = "model.layers.0.mlp.experts."
    assert module.get_parameter(f"{stem}down_proj_bias").ndim == 2
    assert {f"{stem}gate_up_proj_bias", f"{stem}down_proj_bias", "model.layers.0.mlp.router.bias"} <= stays
    assert {f"{stem}gate_up_proj", f"{stem}down_proj", "model.layers.0.mlp.router.weight"} <= decays


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_decays_unless_it_is_the_embedding(tied):
    settings = {
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "attention_bias": True,
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "tie_word_embeddings": tied}
    module = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3Config(**settings, **heads))
    names = {id(p): name for name, p in module.named_parameters()}
    decays, stays = ([names[id(p)] for p in g["params"]] for g in build_optimizer(module, OptimConfig()).param_groups)
    matrices = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
    matrices |= {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    wanted = {f"model.layers.0.{name}.weight" for name in matrices} | (set() if tied else {"lm_head.weight"})
    assert set(decays) == wanted
    assert "model.embed_tokens.weight" in stays
    assert set(stays) == set(names.values()) - wanted


def test_frozen_parameters_are_left_out():
    module = model()
    module[0].requires_grad_(False)
    optimizer = build_optimizer(module, OptimConfig())
    managed = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert managed == {id(p) for p in [*module[1].parameters(), *module[2].parameters()]}
    only_vectors = build_optimizer(nn.LayerNorm(3), OptimConfig())
    assert len(only_vectors.param_groups) == 1


def test_steps_are_those_of_the_paper():
    """AdamW, algorithm 2, for one weight in plain Python."""
    module = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        module.weight.fill_(0.7)
    config = OptimConfig(lr=0.03, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.2)
    optimizer = build_optimizer(module, config)
    weight, m, v = 0.7, 0.0, 0.0
    for t, gradient in enumerate([0.5, -2.0, 0.1, 3.0], start=1):
        module.weight.grad = torch.full((1, 1), gradient, dtype=torch.float64)
        optimizer.step()
        m = 0.8 * m + 0.2 * gradient
        v = 0.95 * v + 0.05 * gradient**2
        weight -= 0.03 * (m / (1 - 0.8**t) / (math.sqrt(v / (1 - 0.95**t)) + 1e-3) + 0.2 * weight)
        assert module.weight.item() == pytest.approx(weight, rel=1e-12)


@pytest.mark.parametrize(("max_norm", "scale"), [(6.5, 0.5), (13.0, 1.0), (20.0, 1.0), (0.0, 1.0)])
def test_clip_gradients(max_norm, scale):
    module = nn.Linear(2, 1)  # gradients (3, 4) and 12: norm 13
    module.weight.grad, module.bias.grad = torch.tensor([[3.0, 4.0]]), torch.tensor([12.0])
    assert clip_gradients(module, max_norm) == pytest.approx(13.0)
    assert module.weight.grad.flatten().tolist() == pytest.approx([3 * scale, 4 * scale], rel=1e-6)
    assert module.bias.grad.tolist() == pytest.approx([12 * scale], rel=1e-6)


def test_state_as_tensors_goes_on_bit_for_bit():
    config = OptimConfig(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    straight = model()
    straight_optimizer = build_optimizer(straight, config)
    train(straight, straight_optimizer, 3)
    saved = optimizer_shards(straight_optimizer, straight)
    saved = {name: shard.tensor.clone() for name, shard in saved.items()}
    weights = {name: tensor.clone() for name, tensor in straight.state_dict().items()}
    names = {name for name, _ in straight.named_parameters()}
    assert set(saved) == {f"{n}.{moment}" for n in names for moment in ("exp_avg", "exp_avg_sq", "step")}
    train(straight, straight_optimizer, 3, start=3)

    resumed = model(seed=1)
    resumed.load_state_dict(weights)
    resumed_optimizer = build_optimizer(resumed, config)
    load_optimizer_shards(resumed_optimizer, resumed, saved, lambda name, _: saved[name])
    train(resumed, resumed_optimizer, 3, start=3)
    for (name, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    final = optimizer_shards(resumed_optimizer, resumed)
    for name, shard in optimizer_shards(straight_optimizer, straight).items():
        assert torch.equal(shard.tensor, final[name].tensor), name
    assert saved["0.weight.step"].item() == 3  # loading made a copy
    assert final["0.weight.step"].tensor.item() == 6


def test_a_parameter_without_state_gets_none():
    module = model()
    optimizer = build_optimizer(module, OptimConfig())
    assert optimizer_shards(optimizer, module) == {}
    load_optimizer_shards(optimizer, module, {}, lambda name, _: torch.zeros(()))
    assert not optimizer.state


def test_moments_lie_apart_in_few_buffers_that_waste_little():
    """Sizes of Qwen3-4B: its embedding, and 36 layers. 30.0 GiB of moments, which one buffer each would make 38.5."""
    layer = [2560 * 4096, 2560 * 1024, 2560 * 1024, 4096 * 2560, *[2560 * 9728] * 3, 2560, 2560, 128, 128]
    sizes = [4 * n for n in [151936 * 2560, 2560, *layer * 36] for _ in range(2)]
    places, buffers = offload.pack(sizes)
    assert sum(buffers) < 1.05 * sum(sizes) and len(buffers) < 40
    assert all(n & (n - 1) == 0 for n in buffers)
    ends = dict.fromkeys(range(len(buffers)), 0)
    for (buffer, at), size in sorted(zip(places, sizes, strict=True)):
        assert at >= ends[buffer] and at % offload.ALIGNED == 0
        ends[buffer] = at + size
    assert all(ends[buffer] <= n for buffer, n in enumerate(buffers))
    assert offload.pack([4, 0, 800]) == ([(0, 1024), (0, 1280), (0, 0)], [2048])


def test_offloaded_moments_are_zero_and_their_own_and_reserved_once():
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(n)) for n in (3, 70, 0, 5)]
    optimizer = offload.OffloadedAdamW([{"params": parameters[:1]}, {"params": parameters[1:]}])
    optimizer.reserve()
    moments = [optimizer.init_state(p)[name] for p in parameters for name in offload.MOMENTS]
    assert [len(m) for m in moments] == [3, 3, 70, 70, 0, 0, 5, 5]
    assert not any(m.any() for m in moments)
    for i, moment in enumerate(moments):
        moment += i + 1
    assert [m.tolist() for m in moments] == [[i + 1.0] * len(m) for i, m in enumerate(moments)]
    optimizer.reserve()
    assert optimizer.init_state(parameters[3])["exp_avg_sq"].tolist() == [8.0] * 5
