"""Gated DeltaNet and short convolutions over forests: against the untouched model in float64, with controls that must fail, through
the plumbing of the GPU's kernels, and where a machine is refused."""

import inspect
import sys
from functools import partial
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from test_forest_exactness import random_samples
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen3_next import modeling_qwen3_next

from pgrpo.admission import linear as admission
from pgrpo.admission import on_device
from pgrpo.admission.compare import difference, gradients, reference_logprobs, tokens_as_samples
from pgrpo.admission.linear import check_linear
from pgrpo.admission.on_device import check_on_device
from pgrpo.admission.shrink import shrink
from pgrpo.admission.twins import True64, default_dtype
from pgrpo.admission.twins import twins as twins_of
from pgrpo.attention.choose import AttentionChoice
from pgrpo.attention.layout import PackedLayout
from pgrpo.config import ConfigError
from pgrpo.model.families import convolution, delta_rule, linear
from pgrpo.model.policy import Policy
from pgrpo.model.recompute import set_up_layers
from pgrpo.packing.batch import build_batch
from pgrpo.packing.forest import Forest
from pgrpo.planning.dims import decoder_layers

CPU = torch.device("cpu")
TORCH_RULE = inspect.unwrap(modeling_qwen3_next.torch_chunk_gated_delta_rule)
"""transformers' own, before any test replaces the functions of that file."""


@pytest.fixture(scope="module")
def twins():
    """Two layers with a state, so that the second one's inputs depend on the first one's state, and one with attention."""
    kinds = ["linear_attention", "linear_attention", "full_attention"]
    config = shrink(AutoConfig.for_model("qwen3_5_text"))
    config.num_hidden_layers, config.layer_types = 3, kinds
    with torch.random.fork_rng(devices=[]), default_dtype(torch.float64):
        yield twins_of(config, 0)


def compared(twins, samples, mode: Any = True64, attention=AttentionChoice()):
    untouched, grouped = twins
    with mode():
        policy = Policy(grouped, attention=attention)
        wanted = reference_logprobs(untouched, samples)
        batch = build_batch(Forest.of(samples), attention=policy.attention)
        return difference(policy, batch, wanted, gradients(wanted, untouched)), batch


def long_samples():
    """Prompts and completions that end before, on and behind the borders of chunks of 64."""
    generator = torch.Generator().manual_seed(0)

    def ids(n):
        return torch.randint(3, 60, (n,), generator=generator).tolist()

    begin = ids(64)
    prompts = [
        begin + ids(7),
        begin + ids(64),
        begin + ids(5),
        ids(63),
    ]  # short, long, short: two calls, in another order
    completions = [[ids(65), ids(1), ids(2)], [ids(9)], [ids(3), ids(20)], [ids(64), ids(130)]]
    return tokens_as_samples(prompts, completions)


@pytest.mark.parametrize("samples", [random_samples(5), long_samples()], ids=["deep", "long"])
def test_states_and_tails_follow_the_forest_and_so_do_the_gradients_of_every_parameter(twins, samples):
    untouched, grouped = twins
    found, batch = compared(twins, samples)
    assert batch.layout.nodes[-1].depth >= 2
    assert found.logprob < 1e-12 and found.gradient < 1e-12
    with True64():
        wanted = gradients(reference_logprobs(untouched, samples), untouched)
        got = gradients(Policy(grouped)(batch).logprobs, grouped)
    seen = set()
    for (name, _), a, b in zip(untouched.named_parameters(), got, wanted, strict=True):
        assert b.norm() > 0 and (a - b).norm() < 1e-11 * b.norm(), name
        seen.add(name.rpartition("linear_attn.")[2])
    assert {"A_log", "dt_bias", "conv1d.weight"} <= seen


def test_it_is_float32_that_rounds_without_true64(twins):
    found, _ = compared(twins, random_samples(5), mode=torch.enable_grad)
    assert 1e-9 < found.logprob < 1e-3


def no_parents_state(monkeypatch):
    depth = delta_rule._depth
    monkeypatch.setattr(delta_rule, "_depth", lambda nodes, parents, device: depth(nodes, None, device))


def no_tail(monkeypatch):
    none = np.zeros(0, dtype=np.int64), np.zeros((0, 4), dtype=np.int64)
    monkeypatch.setattr(convolution, "_first_rows", lambda layout, width: none)


def a_parent_off(monkeypatch):
    depth = delta_rule._depth
    monkeypatch.setattr(
        delta_rule, "_depth", lambda nodes, parents, device: depth(nodes, parents and [0 for _ in parents], device)
    )


@pytest.mark.parametrize("bug", [no_parents_state, no_tail, a_parent_off])
def test_a_forest_without_its_parents_states_is_noticed(bug, twins, monkeypatch):
    bug(monkeypatch)
    found, _ = compared(twins, random_samples(5))
    assert found.logprob > 1e-2


@pytest.mark.parametrize("mode", ["matmuls", "attention", "full"])
def test_layers_that_compute_activations_again_give_the_same_bits(mode, twins):
    policy, layers = Policy(twins[1]), decoder_layers(twins[1])
    batch = build_batch(Forest.of(random_samples(5)), attention=policy.attention)
    wanted = gradients(policy(batch).logprobs, policy)
    set_up_layers(layers, [mode] * 3, compiled=False)
    modes = [cast(partial, layer.forward).args[2] for layer in layers]
    try:
        got = gradients(policy(batch).logprobs, policy)
    finally:
        for layer in layers:
            del layer.forward
    assert {*modes} == {mode, "full"}  # of those with a state nothing inside is kept
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_nodes_without_rows_hand_their_parents_state_down():
    torch.manual_seed(0)
    step = torch.rand(1, 9, 2, 4, dtype=torch.float64)
    xs = (step, step.flip(1), torch.rand(1, 9, 2, 3, dtype=torch.float64), -torch.rand(1, 9, 2, dtype=torch.float64))
    xs += (torch.rand(1, 9, 2, dtype=torch.float64),)
    # rows 0-2 | none | 3-5, 6-8: the middle node is empty
    layout = PackedLayout([3, 0, 3, 3], [-1, 0, 1, 1])
    with True64():
        out, states = delta_rule._forest_rule(layout, TORCH_RULE, xs, {}, final=True)
        for i, rows in enumerate(([0, 1, 2, 3, 4, 5], [0, 1, 2, 6, 7, 8])):
            q, k, v, g, beta = (x[:, rows] for x in xs)
            want, state = TORCH_RULE(q, k, v, g=g, beta=beta, output_final_state=True)
            assert (out[0, rows[3:]] - want[0, 3:]).abs().max() < 1e-12
            assert (states[i] - state[0]).abs().max() < 1e-12


def fake_fla(calls):
    """fla-core's function as it is documented, by transformers' own: one row of sequences, a state each."""
    rule = TORCH_RULE

    def chunk_gated_delta_rule(
        q, k, v, g, beta, initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu, use_qk_l2norm_in_kernel=False
    ):
        assert cu_seqlens_cpu.device == CPU and cu_seqlens_cpu.equal(cu_seqlens)
        assert cu_seqlens.dtype == torch.int64 and initial_state.dtype != torch.bfloat16
        assert len(q) == 1 and len(initial_state) == len(cu_seqlens) - 1 and cu_seqlens[-1] == q.shape[1]
        calls.append(len(initial_state))
        outs, states = [], []
        for i, (a, b) in enumerate(pairwise(cu_seqlens.tolist())):
            assert a < b
            own = (x[:, a:b] for x in (q, k, v))
            out, state = rule(
                *own, g=g[:, a:b], beta=beta[:, a:b], initial_state=initial_state[i : i + 1], output_final_state=True,
                use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            )  # fmt: skip
            outs.append(out)
            states.append(state)
        return torch.cat(outs, 1), torch.cat(states) if output_final_state else None

    module: Any = ModuleType("fla.ops.gated_delta_rule")
    module.chunk_gated_delta_rule = chunk_gated_delta_rule
    return {"fla": ModuleType("fla"), "fla.ops": ModuleType("fla.ops"), "fla.ops.gated_delta_rule": module}


def test_the_gpus_way_is_one_call_a_depth(twins, monkeypatch):
    calls = []
    for name, module in fake_fla(calls).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(delta_rule, "_in_buckets", delta_rule._on_gpu)
    found, batch = compared(twins, random_samples(5))
    assert found.logprob < 1e-12 and found.gradient < 1e-12
    depths = batch.layout.nodes[-1].depth + 1
    assert len(calls) == 2 * depths and sum(calls) == 2 * len(batch.layout.nodes)


WRONG = r"wrong on Hopper with Triton 3\.6\.0 \(3\.4\.0 to before 3\.7\.1\): "


@pytest.mark.parametrize(
    ("installed", "triton", "capability", "nvcc", "environment", "message"),
    [
        ({"fla"}, "3.7.1", (9, 0), False, {}, None),
        ({"fla", "tilelang"}, "3.6.0", (9, 0), True, {}, None),
        ({"fla"}, "3.6.0", (8, 0), False, {}, None),
        ({"fla"}, "3.3.1", (9, 0), False, {}, None),
        (set(), "3.7.1", (9, 0), True, {}, r"needs fla-core on a GPU: pip install -e '\.\[linear\]'"),
        ({"fla"}, "3.6.0", (9, 0), True, {}, WRONG + "install tilelang"),
        ({"fla", "tilelang"}, "3.6.0", (9, 0), False, {}, WRONG + "install CUDA's compiler nvcc for tilelang"),
        ({"fla", "tilelang"}, "3.6.0", (9, 0), True, {"FLA_TILELANG": "0"}, WRONG + "unset FLA_TILELANG"),
        ({"fla", "tilelang"}, "3.6.0", (9, 0), True, {"FLA_DISABLE_BACKEND_DISPATCH": "1"}, WRONG + "unset FLA_"),
    ],
)
def test_a_gpu_that_cannot_train_linear_attention_is_refused(
    installed, triton, capability, nvcc, environment, message, monkeypatch
):
    monkeypatch.setattr(
        admission, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: name in installed or None))
    )
    monkeypatch.setattr(admission, "version", lambda _: triton)
    utils: Any = ModuleType("fla.utils")
    utils.has_usable_nvcc = lambda: nvcc
    monkeypatch.setitem(sys.modules, "fla", ModuleType("fla"))
    monkeypatch.setitem(sys.modules, "fla.utils", utils)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    hybrid, gpu = AutoConfig.for_model("qwen3_5_text"), torch.device("cuda")
    check_linear("m", hybrid, CPU)
    check_linear("m", AutoConfig.for_model("qwen3"), gpu)
    if message is None:
        check_linear("m", hybrid, gpu)
    else:
        with pytest.raises(ConfigError, match=r"model\.path=m: .*" + message):
            check_linear("m", hybrid, gpu)


def test_gradients_in_bfloat16_are_compared_too_before_a_model_is_trained_on_a_device(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(on_device, "COMPLETION_TOKENS", 12)
    config = shrink(AutoConfig.for_model("qwen3_5_text"))
    prompts = [list(range(3, 40)), list(range(5, 30))]
    check_on_device("m", config, prompts, AttentionChoice(), CPU)
    assert "; gradients of linear attention and experts " in caplog.text
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    run = delta_rule._in_buckets

    def wrong_backward(depth, function, xs, *rest):
        """Outputs are right; keys get no gradient."""
        q, k, *others = xs
        return run(depth, function, (q, k.detach(), *others), *rest)

    monkeypatch.setattr(delta_rule, "_in_buckets", wrong_backward)
    with pytest.raises(ConfigError, match=r"gradients .* \(relative\), .* more than twice"):
        check_on_device("m", config, prompts, AttentionChoice(), CPU)


def test_only_models_with_states_are_touched():
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(shrink(AutoConfig.for_model("qwen3")))
        hybrid = AutoModelForCausalLM.from_config(shrink(AutoConfig.for_model("qwen3_5_text")))
    assert linear.follow_states(plain) == []
    assert [type(m).__name__ for m in linear.follow_states(hybrid)] == ["Qwen3_5GatedDeltaNet"]
    assert linear.follow_states(hybrid) and len(hybrid.model.layers[0].linear_attn._forward_pre_hooks) == 1
