"""Compiled and checkpointed layers give the gradients of plain ones, and recompute only what they say."""

import pickle
import random
import re
from collections import Counter
from functools import partial

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from pgrpo.admission.compare import tokens_as_samples
from pgrpo.attention.layout import unpack_calls
from pgrpo.config import ModelConfig
from pgrpo.model import recompute as layers
from pgrpo.model.lora import adapters_off, add_adapters
from pgrpo.model.policy import ATTENTION_NAME, Policy
from pgrpo.packing.batch import build_batch
from pgrpo.packing.forest import Forest
from pgrpo.planning.flops import GIB, ModelDims
from pgrpo.planning.memory import memory_plan

LAYERS = 3


def make_policy(recompute: layers.Recompute = "none", compiled=False, dtype=torch.float64, lora=False, targets=()):
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME).to(dtype).train()
    if lora:
        add_adapters(model, ModelConfig(path="-", lora_rank=4, lora_targets=list(targets)), seed=0)
        for parameter in model.parameters():  # new adapters change nothing
            parameter.data += 0.1 * parameter.requires_grad * torch.randn_like(parameter)
    layers.set_up_layers(model.model.layers, [recompute for _ in range(LAYERS)], compiled=compiled)
    return Policy(model)


def random_batch(rnd):
    def ids(most):
        return [rnd.randrange(3, 61) for _ in range(rnd.randint(2, most))]

    prompts = [ids(20) for _ in range(rnd.randint(1, 3))]
    completions = [[ids(9) for _ in range(rnd.randint(2, 5))] for _ in prompts]
    return build_batch(Forest.of(tokens_as_samples(prompts, completions)))


def update(policy, batch):
    logprobs = policy(batch).logprobs
    trained = [p for p in policy.parameters() if p.requires_grad]
    return logprobs.detach(), torch.autograd.grad(logprobs.square().sum(), trained)


@pytest.fixture
def kernel_calls(monkeypatch):
    """Forward and backward calls of the flash kernel, a layer's two forward calls being one."""
    from pgrpo.attention import grouped

    calls = {"varlen_forward": 0, "varlen_backward": 0}
    for name in calls:

        def counted(*args, name=name, call=getattr(grouped, name)):
            calls[name] += 1
            return call(*args)

        monkeypatch.setattr(grouped, name, counted)
    return calls


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("recompute", "forwards"), [("none", 1), ("matmuls", 1), ("attention", 1), ("full", 2)])
def test_checkpointing_changes_no_bit_and_attention_is_recomputed_only_under_full(
    recompute, forwards, lora, kernel_calls
):
    batch = random_batch(random.Random(0))
    logprobs, gradients = update(make_policy(recompute, lora=lora), batch)
    passes = len(unpack_calls(batch.layout.passes(None).table))
    assert kernel_calls == {"varlen_forward": passes * LAYERS * forwards, "varlen_backward": passes * LAYERS}
    wanted_logprobs, wanted = update(make_policy(lora=lora), batch)
    assert torch.equal(logprobs, wanted_logprobs)
    assert all(torch.equal(a, b) for a, b in zip(gradients, wanted, strict=True))


@pytest.mark.parametrize("recompute", ["none", "attention"])
def test_checkpointing_keeps_less(recompute):
    """Bytes that autograd holds between forward and backward, the weights left out."""
    policy, batch, held = make_policy(recompute), random_batch(random.Random(0)), {}

    def pack(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        policy(batch)
    total = sum(held.values()) - sum(held.get(p.untyped_storage().data_ptr(), 0) for p in policy.parameters())
    tokens = batch.packed_tokens
    assert (total / tokens < 8 * LAYERS * 32 * 4) == (recompute == "attention")


SIZES = {
    "vocab_size": 61, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 4, "pad_token_id": 0,
}  # fmt: skip


def policy_of(kind, recompute, *, compiled=False, dtype=torch.float64):
    """Of two layers."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES, num_hidden_layers=2)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME).to(dtype).train()
    layers.set_up_layers(model.model.layers, [recompute] * 2, compiled=compiled)
    return Policy(model)


@pytest.mark.parametrize("kind", ["qwen3", "glm4", "qwen3_moe"])
def test_compiled_layers_keep_what_the_memory_plan_says(kind, monkeypatch):
    """With a norm in front of attention and MLP, with one behind both too, and of a mixture: bytes that the second layer keeps
    which the first one does not keep already, as it does positions."""
    torch._dynamo.reset()
    layers.compile_dynamic.cache_clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))
    policy = policy_of(kind, "matmuls", compiled=True, dtype=torch.bfloat16)
    batch, held = random_batch(random.Random(0)), [{}, {}]
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}

    def recorded(forward, found, *args, **kwargs):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: found.append(x) or x, lambda x: x):
            return forward(*args, **kwargs)

    for layer, found in zip(policy.model.model.layers, saved := ([], []), strict=True):
        layer.forward = partial(recorded, layer.forward, found)
    policy(batch)
    for found, tensors in zip(held, saved, strict=True):
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        found |= {at: size for at, size in storages.items() if at not in weights}
    kept = sum(size for at, size in held[1].items() if at not in held[0])
    dims = ModelDims.from_config(policy.model.config)
    modes: list[layers.Recompute] = ["matmuls", "matmuls"]
    planned = memory_plan(dims, recompute=modes, token_budget=1, dtype_bytes=2, compiled=True).activations * GIB / 2
    assert 0.98 < kept / batch.packed_tokens / planned < 1.08


@pytest.mark.parametrize("kind", ["qwen3", "gpt_oss", "qwen3_moe"])
def test_matmuls_computes_no_product_again(kind):
    """Nor the order of the copies of rows for experts, as products would be of rows in another order where a router's scores are
    as good as equal."""
    batch, found = random_batch(random.Random(0)), []
    for recompute in ("none", "matmuls"):
        policy = policy_of(kind, recompute)
        logprobs = policy(batch).logprobs
        with Operators() as run:
            logprobs.square().sum().backward()
        found.append((run.names, [p.grad for p in policy.parameters()]))
    (none, wanted), (names, gradients) = found
    assert all(torch.equal(a, b) for a, b in zip(gradients, wanted, strict=True))
    again = names - none
    assert sum(none.values()) > 50 and again["aten.silu.default"] + again["aten.sigmoid.default"] >= 2
    assert not [name for name in again if re.search(r"mm|expert|attention|sort\.", name)]


class Operators(TorchDispatchMode):
    """How often each was called."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[str(func)] += 1
        return func(*args, **kwargs or {})


def compilations():
    """How many compiled versions there are of each function that runs a layer."""
    entries = torch._dynamo.eval_frame._debug_get_cache_entry_list
    counts = {
        run: len(entries(getattr(layers, run).__code__))
        for run in ("_plain", "_all_but_matmuls", "_all_but_attention", "_everything")
    }
    return {run: count for run, count in counts.items() if count}


CASES = [("none", False), ("none", True), ("attention", True), ("matmuls", False)]
SLOW = [("none", True, "aot_eager"), ("matmuls", False, "aot_eager"), *((*case, "inductor") for case in CASES)]


@pytest.mark.timeout(900)  # inductor compiles C++, for half a minute
@pytest.mark.parametrize(
    ("recompute", "lora", "backend"),
    [
        ("none", False, "aot_eager"), ("none", True, "eager"), ("attention", True, "aot_eager"), ("attention", False, "inductor"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW),
    ],
)  # fmt: skip
def test_compiled_layers_are_exact_and_compiled_once_for_each_gradient_mode(recompute, lora, backend, monkeypatch):
    """What is traced, and when again, is the same with all backends; eager runs the traced graph without AOTAutograd."""
    torch._dynamo.reset()
    layers.compile_dynamic.cache_clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    targets = () if backend == "inductor" else ("q_proj", "down_proj")  # each that is traced takes seconds
    plain = make_policy(lora=lora, targets=targets)
    compiled = make_policy(recompute, compiled=True, lora=lora, targets=targets)
    rnd = random.Random(1)

    def compare(batch):
        got, wanted = update(compiled, batch), update(plain, batch)
        assert (got[0] - wanted[0]).abs().max() < 1e-5  # norms run in float32 in any model
        for a, b in zip(got[1], wanted[1], strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()
        with torch.no_grad():
            assert (compiled(batch).logprobs - wanted[0]).abs().max() < 1e-5
            if lora:
                with adapters_off(compiled), adapters_off(plain):
                    assert (compiled(batch).logprobs - plain(batch).logprobs).abs().max() < 1e-5

    compare(random_batch(rnd))
    # With a gradient and without; layers that keep attention run as plain ones where there is no gradient. With LoRA the first
    # layer's input has no gradient, and in the initial model the scale of the adapters is another number.
    counts = {
        "none": {"_plain": 2 + 2 * lora},
        "matmuls": {"_plain": 1, "_all_but_matmuls": 1},
        "attention": {"_plain": 1 + lora, "_all_but_attention": 1 + lora},
    }
    assert compilations() == counts[recompute]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(20):
        compare(random_batch(rnd))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_no_number_is_an_input_of_compiled_layers(monkeypatch):
    """On a GPU it would be a tensor on the CPU, which a C++ compiler is started for, and copied in each layer."""
    torch._dynamo.reset()
    layers.compile_dynamic.cache_clear()
    inputs = []

    def backend(graph, example_inputs):
        inputs.extend(x for x in example_inputs if isinstance(x, torch.Tensor))
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    update(make_policy("attention", compiled=True), random_batch(random.Random(0)))
    layers.compile_dynamic.cache_clear()
    assert len(inputs) > 10
    assert not [x for x in inputs if x.ndim == 0]


def test_what_is_saved_has_a_name_that_compiled_code_is_kept_under():
    from torch._functorch._aot_autograd.autograd_cache import _get_context_fn_cache_hash

    names = {_get_context_fn_cache_hash(save) for save in (layers.SAVE_ATTENTION, layers.SAVE_MATMULS)}
    assert len(names) == 2 and all(names)
    for save in (layers.SAVE_ATTENTION, layers.SAVE_MATMULS):  # PyTorch 2.11 pickles it, and cannot pickle operators
        (kept,) = save.args[0].args
        assert {type(op) for op in kept} == {str} and pickle.loads(pickle.dumps(save)).args[0].args == (kept,)


def test_not_compiled_runs_forwards_without_gradients_as_they_are(monkeypatch):
    torch._dynamo.reset()
    layers.compile_dynamic.cache_clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    policy, batch = make_policy(compiled=True), random_batch(random.Random(0))
    with torch.no_grad(), layers.not_compiled():
        logprobs = policy(batch).logprobs
    assert compilations() == {}
    with torch.no_grad():
        assert torch.allclose(policy(batch).logprobs, logprobs)
    assert compilations() == {"_plain": 1}
    layers.compile_dynamic.cache_clear()
