"""Inputs of layers in host memory, and MLPs in parts: the same gradients, and what they are for."""

import random
from functools import partial

import pytest
import torch
import transformers
from test_layer_runs import LAYERS, compilations, make_policy, random_batch, update

from pgrpo.admission.compare import tokens_as_samples
from pgrpo.attention.hook import ATTENTION_NAME
from pgrpo.model import recompute as layers
from pgrpo.model.policy import Policy
from pgrpo.packing.batch import build_batch
from pgrpo.packing.forest import Forest
from pgrpo.training import long_samples
from pgrpo.training.long_samples import HostInputs, piece_sizes, set_up_long_samples
from pgrpo.types import Recompute


def long_policy(recompute, chunks=1, **kwargs):
    policy = make_policy(recompute, **kwargs)
    set_up_long_samples(policy.model.model.layers, [recompute] * LAYERS, chunks)
    return policy


def overwrite_inputs(policy):
    """What enters the layers of a forward, whose memory ``wipe()`` overwrites."""
    inputs = []
    for layer in policy.model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))

    def wipe():
        for x in inputs:
            x.data.fill_(float("nan"))

    return wipe


@pytest.mark.parametrize(("lora", "compiled"), [(False, False), (True, False), (True, True)])
def test_the_backward_reads_inputs_from_host_memory(lora, compiled, monkeypatch):
    """Bit for bit the gradients of ``full``, also when the inputs on the device are gone. Nothing else is copied."""
    monkeypatch.setattr(long_samples, "SMALLEST_PIECE", 256)  # so that tensors are cut
    kept, keep = [], HostInputs._keep
    monkeypatch.setattr(HostInputs, "_keep", lambda self, x: kept.append(x.shape) or keep(self, x))
    layers.compile_dynamic.cache_clear()
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    rnd = random.Random(0)
    policy, other = (f("offload", lora=lora, compiled=compiled) for f in (long_policy, make_policy))
    wipe = overwrite_inputs(policy)
    for batch in [random_batch(rnd) for _ in range(2)]:
        logprobs = policy(batch).logprobs
        wipe()
        got = torch.autograd.grad(logprobs.square().sum(), [p for p in policy.parameters() if p.requires_grad])
        wanted_logprobs, wanted = update(other, batch)
        assert torch.equal(logprobs, wanted_logprobs)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert len(kept) == 2 * LAYERS
    if compiled:
        assert compilations() == {"_everything": 1 + lora}
    layers.compile_dynamic.cache_clear()


def test_pinned_memory_is_hardly_more_than_what_it_holds():
    """139,264 rows of 2,560 bfloat16: 680 MiB, which would be 1,024 as one piece."""
    for elements in (139_264 * 2560, 270_337 * 2560, 5, 0):
        sizes = piece_sizes(elements, 2)
        taken = sum(1 << max(0, 2 * size - 1).bit_length() for size in sizes)
        assert sum(sizes) == elements and 2 * elements <= taken + (elements == 0) < 2 * elements + 2**20


def test_without_it_the_backward_reads_them_where_they_are():
    policy = make_policy("full")
    wipe = overwrite_inputs(policy)
    logprobs = policy(random_batch(random.Random(0))).logprobs
    wipe()
    gradients = torch.autograd.grad(logprobs.sum(), list(policy.parameters()))
    assert any(gradient.isnan().any() for gradient in gradients)


@pytest.mark.parametrize(
    ("recompute", "lora", "backend"),
    [
        ("full", False, None), ("offload", True, None), ("offload", False, "eager"), ("attention", True, None),
        ("attention", False, "eager"),
        pytest.param("offload", False, "aot_eager", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_an_mlp_in_parts(recompute, backend, lora, monkeypatch):
    """Exact but for the order of sums; no part has more than its share of the rows, and each is computed three times, but for the
    last of a layer, which nothing is computed from again."""
    layers.compile_dynamic.cache_clear()
    torch._dynamo.reset()
    compiled = backend is not None
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    policy, batch = long_policy(recompute, 3, lora=lora, compiled=compiled), random_batch(random.Random(3))
    rows: list[int] = []
    if not compiled:
        policy.model.model.layers[1].mlp.up_proj.register_forward_hook(lambda _, args, out: rows.append(out.shape[1]))
    got, want = update(policy, batch), update(make_policy(lora=lora), batch)
    assert (got[0] - want[0]).abs().max() < 1e-6  # norms run in float32 in any model
    for a, b in zip(got[1], want[1], strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()
    if not compiled:
        total = batch.packed_tokens
        assert max(rows) == total - 2 * (total // 3) and len(rows) == 8
        with torch.no_grad():
            assert torch.equal(policy(batch).logprobs, got[0])
        assert len(rows) == 11
    else:
        others = [random_batch(rnd) for rnd in map(random.Random, range(4, 12))]
        assert {b.packed_tokens % 3 for b in others} == {0, 1, 2}
        for other in others:
            update(policy, other)
        run = "_all_but_attention" if recompute == "attention" else "_everything"
        assert compilations() == {run: 1}  # for all layers and numbers of rows
        for count in (2, 5, 6):  # below 6 not in parts of at least 2
            other = build_batch(Forest.of(tokens_as_samples([[*range(3, 2 + count)]], [[[6]]])))
            got, want = update(policy, other), update(make_policy(lora=lora), other)
            assert (got[0] - want[0]).abs().max() < 1e-6
            assert compilations() == {run: 2}
    layers.compile_dynamic.cache_clear()


def test_only_mlps_that_are_recomputed_are_in_parts():
    layers = long_policy("none").model.model.layers
    set_up_long_samples(layers, ["none", "matmuls", "attention"], 4)
    assert [hasattr(layer.mlp, "whole") for layer in layers] == [False, False, True]


def test_a_mixture_of_experts_in_parts():
    """Its block returns what the router says of each row too."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=61, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, initializer_range=0.2, num_local_experts=4, num_experts_per_tok=2, sliding_window=5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    config._experts_implementation = "eager"  # others compute in half precision only
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME).double().train()
    policy, batch = Policy(model), random_batch(random.Random(1))
    want = update(policy, batch)
    recompute: list[Recompute] = ["full", "full"]
    layers.set_up_layers(model.model.layers, recompute, compiled=False)
    set_up_long_samples(model.model.layers, recompute, 3)
    got = update(policy, batch)
    assert (got[0] - want[0]).abs().max() < 1e-6
    for a, b in zip(got[1], want[1], strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()
