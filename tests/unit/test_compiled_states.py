"""Layers with a state, whose parts are compiled: equal to uncompiled ones, and compiled once for all layers and batches."""

import random
from functools import partial
from typing import Any

import pytest
import torch
from test_kept import error, kept_batches, run
from test_layer_runs import random_batch, update
from torch._inductor.compile_fx import compile_fx
from torch.fx.node import map_aggregate
from torch.overrides import _pop_mode_temporarily
from transformers import AutoConfig, AutoModelForCausalLM

from pgrpo.admission.compare import tokens_as_samples
from pgrpo.admission.shrink import Small, shrink
from pgrpo.admission.twins import True64
from pgrpo.attention.hook import ATTENTION_NAME
from pgrpo.attention.layout import PackedLayout
from pgrpo.config import ModelConfig
from pgrpo.model import recompute as layers
from pgrpo.model.families import convolution, linear
from pgrpo.model.kept import kept_prefix
from pgrpo.model.lora import add_adapters
from pgrpo.model.policy import Policy
from pgrpo.packing.batch import build_batch
from pgrpo.packing.forest import Forest
from pgrpo.planning.dims import decoder_layers
from pgrpo.rollout.embedded.cache import DecodeCache
from pgrpo.training.long_samples import set_up_long_samples

compile_ = torch.compile

KINDS = {
    "qwen3_5_text": ["linear_attention", "linear_attention", "full_attention"],
    "qwen3_5_moe_text": ["linear_attention", "full_attention"],
    "olmo_hybrid": ["linear_attention", "linear_attention", "full_attention"],
    "lfm2": ["conv", "conv", "full_attention"],
    "qwen3": ["full_attention"],
}


def make_policy(name, mode: Any = "none", compiled=False, lora=False, chunks=1, small: Small | None = None):
    config = shrink(AutoConfig.for_model(name), small=small)
    config.layer_types = KINDS[name]
    config.num_hidden_layers = len(config.layer_types)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME).double().train()
    if lora:
        add_adapters(model, ModelConfig(path="-", lora_rank=4), seed=0)
    for parameter in model.parameters():  # norms and biases of ones and zeros hide mistakes
        parameter.data += 0.1 * torch.randn_like(parameter)
    policy, every = Policy(model), decoder_layers(model)
    layers.set_up_layers(every, [mode] * len(every), compiled=compiled)
    set_up_long_samples(every, [mode] * len(every), chunks)
    return policy


@pytest.fixture
def graphs():
    """How many graphs are compiled: a function that tells."""
    torch._dynamo.reset()
    layers.compile_dynamic.cache_clear()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    layers.compile_dynamic.cache_clear()


CASES = [
    # graphs: a norm, the MLP, the gated norm, the convolution, the layer with attention
    ("qwen3_5_text", "none", False, 1, 5, "aot_eager"),
    ("qwen3_5_text", "full", False, 3, 5, "eager"),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("qwen3_5_text", "full", False, 3, 5, "aot_eager"),
            # the first norm's input has no gradient, as nothing below it is trained
            ("qwen3_5_text", "attention", True, 1, 6, "aot_eager"),
            ("qwen3_5_text", "attention", False, 1, 5, "inductor"),
            ("qwen3_5_moe_text", "full", False, 1, 5, "aot_eager"),
            ("olmo_hybrid", "offload", False, 1, 5, "aot_eager"),
            ("lfm2", "attention", False, 1, 4, "aot_eager"),
        )
    ),
]


@pytest.mark.timeout(900)  # inductor compiles C++
@pytest.mark.parametrize(("name", "mode", "lora", "chunks", "count", "backend"), CASES)
def test_parts_are_exact_and_compiled_once_for_all_layers_and_batches(
    name, mode, lora, chunks, count, backend, monkeypatch, graphs
):
    runs = []
    monkeypatch.setattr(torch, "compile", lambda run, **how: runs.append(run) or compile_(run, backend=backend, **how))
    plain, compiled = make_policy(name, lora=lora), make_policy(name, mode, True, lora, chunks)
    rnd = random.Random(1)
    one = build_batch(Forest.of(tokens_as_samples([[*range(3, 13)]], [[[6, 7, 8]]])))  # no row has its taps elsewhere
    for batch in [random_batch(rnd) for _ in range(3)] + [one]:
        got, wanted = update(compiled, batch), update(plain, batch)
        assert (got[0] - wanted[0]).abs().max() < (1e-4 if backend == "inductor" else 1e-5)  # float32 inside
        for a, b in zip(got[1], wanted[1], strict=True):
            # inductor rounds what the model computes in float32 otherwise: seen are 3e-4, of decays whose terms cancel.
            # That it is rounding alone shows the test below, where the same in float64 agrees to 1e-12.
            assert (a - b).norm() <= (1e-3 if backend == "inductor" else 1e-5) * b.norm()
        assert graphs() == count
    if (
        chunks > 1
    ):  # batches of too few rows for parts: the layer with attention is compiled once more, MLPs elsewhere are not
        for rows in (2, 2 * chunks - 1, 2 * chunks):
            batch = build_batch(Forest.of(tokens_as_samples([[*range(3, 2 + rows)]], [[[6]]])))
            got, wanted = update(compiled, batch), update(plain, batch)
            assert (got[0] - wanted[0]).abs().max() < 1e-5 and error(got[1], wanted[1]) < 1e-5
            assert graphs() == count + 1
    assert not any("_in_parts" in run.__qualname__ for run in runs)  # activations of one part alone exist at a time


def in_float64(graph, inputs):
    """Inductor, for a graph whose requests for float32 are answered in float64."""
    for node in graph.graph.nodes:
        node.target = "double" if (node.op, node.target) == ("call_method", "float") else node.target
        node.args, node.kwargs = (
            map_aggregate(x, lambda a: torch.float64 if a is torch.float32 else a) for x in (node.args, node.kwargs)
        )
    graph.recompile()
    return compile_fx(graph, inputs)


@pytest.mark.slow
@pytest.mark.timeout(900)  # inductor compiles C++
def test_inductor_differs_by_the_rounding_of_float32_alone(graphs, monkeypatch):
    def compile_64(run, **how):
        compiled_run = compile_(run, backend=in_float64, **how)

        def call(*args, **kwargs):
            with _pop_mode_temporarily():  # which would be traced
                return compiled_run(*args, **kwargs)

        return call

    monkeypatch.setattr(torch, "compile", compile_64)
    plain, compiled = make_policy("qwen3_5_text"), make_policy("qwen3_5_text", compiled=True)
    with True64():
        got, wanted = (update(policy, random_batch(random.Random(1))) for policy in (compiled, plain))
    assert graphs() == 5
    assert (got[0] - wanted[0]).abs().max() < 1e-12 and error(got[1], wanted[1]) < 1e-12
    assert all((a - b).norm() <= 1e-12 * b.norm() for a, b in zip(got[1], wanted[1], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "full"])
def test_a_kept_prefix_runs_uncompiled_and_its_passes_compile_no_part_again(mode, graphs, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(compile_, backend="aot_eager"))
    plain, compiled = make_policy("qwen3_5_text"), make_policy("qwen3_5_text", mode, True)
    _, span = kept_batches(plain)
    gradients = []
    for policy in (compiled, plain):
        policy.keep(span[0]).square().sum().backward()
        gradients.append([p.grad for p in policy.parameters() if p.grad is not None])
        policy.kept = None
    assert graphs() == 0
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    update(compiled, random_batch(random.Random(0)))
    assert graphs() == 5
    assert error(run(compiled, span)[1], run(plain, span)[1]) < 1e-5
    assert graphs() == 6  # the layer with attention, with keys and values in front


@pytest.mark.slow
def test_all_models_of_a_run_are_compiled_in_one_process(graphs, monkeypatch):
    """Policy, reference and teacher, with gradients and without, in passes of a kept prefix, and in those of a rank without one."""
    monkeypatch.setattr(torch, "compile", partial(compile_, backend="aot_eager"))
    policy, reference, teacher = (
        make_policy("qwen3_5_text", compiled=True, small=small) for small in (None, None, Small(width=96, head_dim=24))
    )
    reference.requires_grad_(False)
    teacher.requires_grad_(False)
    rnd = random.Random(0)
    batches = [random_batch(rnd), random_batch(rnd)]
    others = [build_batch(Forest.of(tokens_as_samples([[3]], [[[n]]]))) for n in (4, 5)]  # two rows
    for span in (batches[:1], batches[1:], kept_batches(policy)[1], batches, others):
        for model in (policy, reference, teacher):
            with torch.no_grad(), kept_prefix(model, span):
                for batch in span:
                    model(batch)
        run(policy, span)
    entries = torch._dynamo.eval_frame._debug_get_cache_entry_list
    assert len(entries(convolution._one_convolution.__code__)) <= 4
    assert len(entries(layers._plain.__code__)) >= 8


def test_forwards_without_gradients_are_compiled_too_but_not_a_few_tokens_and_no_rollout(graphs, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(compile_, backend="eager"))
    policy, batch = make_policy("qwen3_5_text", compiled=True), random_batch(random.Random(0))
    with torch.no_grad():
        rollout = DecodeCache(PackedLayout([3, 2], [-1, -1]), [1, 1], 4)
        inputs = {"input_ids": torch.tensor([3, 4, 5, 6, 7]), "position_ids": torch.tensor([0, 1, 2, 0, 1])}
        policy.next_logits(inputs, rollout, torch.tensor([2, 4]))
        assert graphs() == 0
        with layers.not_compiled():
            wanted = policy(batch).logprobs
        assert graphs() == 0
        assert torch.allclose(policy(batch).logprobs, wanted)
        assert graphs() == 5
    modes: list[Any] = ["none"] * 3
    layers.set_up_layers(decoder_layers(policy.model), modes, compiled=False)
    update(policy, batch)
    assert graphs() == 5


def test_what_is_compiled_is_said():
    for name, text in {
        "qwen3_5_text": "2 layers with a state: by transformers' functions in PyTorch; their norms, MLPs and convolutions are "
        "compiled, with a graph break at the recurrence of 2 of them",
        "lfm2": "2 layers with a state: by transformers' functions in PyTorch; their norms, MLPs and convolutions are compiled",
        "qwen3": "",
    }.items():
        assert linear.states_text(make_policy(name).model, torch.device("cpu"), compiled=True) == text
    assert "compiled" not in linear.states_text(make_policy("lfm2").model, torch.device("cpu"), compiled=False)
