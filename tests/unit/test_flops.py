"""FLOPs against torch's own counter, pairs against a loop, parameters and saved activations against transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from pgrpo.config import ModelConfig
from pgrpo.model.lora import add_adapters
from pgrpo.planning import flops, memory
from pgrpo.planning.flops import ModelDims
from pgrpo.planning.recompute import LayerPlan, fewest_recomputed_layers, most_gathered
from pgrpo.types import Recompute

ROOT = Path(__file__).parents[2]
QWEN3_4B = ModelDims.from_config(json.loads((ROOT / "benchmarks" / "qwen3_4b" / "config.json").read_text()))
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "pad_token_id": 0,
}
MODELS = {
    "llama": {},
    "llama tied, biased": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "qwen3": {"head_dim": 32, "tie_word_embeddings": True},
    "phi3": {},
    "mistral": {"head_dim": 8},
    "granite": {},
    "smollm3": {},
}


def make(name: str):
    config = AutoConfig.for_model(name.split()[0], **SIZES, **MODELS[name])
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


@pytest.mark.parametrize("name", MODELS)
def test_parameter_count_is_transformers_own(name: str) -> None:
    model = make(name)
    assert ModelDims.from_config(model.config).parameters == model.num_parameters()
    assert ModelDims.from_config(model.config.to_dict()).parameters == model.num_parameters()


def test_published_sizes() -> None:
    assert QWEN3_4B.parameters == 4_022_468_096


def test_sizes_of_mixtures_latent_attention_and_windows() -> None:
    """Worked out by hand: two of four experts are active, the first layer is dense, and values are smaller than keys."""
    small = SIZES | {
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
    }
    mla = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12}
    experts = {
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
    }
    config = AutoConfig.for_model("deepseek_v3", **small, **mla, **experts)
    dims = ModelDims.from_config(config)
    attention = 64 * 24 + 24 * 4 * 16 + 64 * (16 + 8) + 16 * 4 * (8 + 12) + 4 * 12 * 64
    dense, sparse = 3 * 64 * 160, 4 * 64 + (2 + 1) * 3 * 64 * 20
    assert (dims.head_dim, dims.value_dim, dims.kv_heads) == (16, 12, 4)
    assert dims.matrices == 2 * attention + dense + sparse
    assert dims.intermediate == 160
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    gemma = AutoConfig.for_model("gemma3_text", **SIZES, head_dim=16, sliding_window=8, layer_types=kinds)
    dims = ModelDims.from_config(gemma)
    assert (dims.windows, dims.norms, dims.head_norms) == ((8, 8, 0), 4, True)
    pair = 2 * 4 * 32
    full, windowed = 20 * 21 // 2, sum(min(i + 1, 8) for i in range(20))
    without = flops.forward_flops(replace(dims, windows=(0, 0, 0)), 12, [8])
    assert without - flops.forward_flops(dims, 12, [8]) == 2 * pair * (full - windowed)


def test_sizes_of_layers_with_a_state() -> None:
    """Worked out by hand. Two layers of Gated DeltaNet, whose values are larger than keys, a full layer; no pairs in the former."""
    linear = {
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
    }
    kinds = ["linear_attention", "linear_attention", "full_attention"]
    config = AutoConfig.for_model("qwen3_5_text", **SIZES, **linear, head_dim=16, layer_types=kinds)
    dims = ModelDims.from_config(config)
    keys, values = 2 * 8, 6 * 12
    convolved = 2 * keys + values
    delta = 64 * (convolved + values + 2 * 6) + 4 * convolved + values * 64
    attention = 64 * (2 * 4 * 16 + 2 * 2 * 16) + 4 * 16 * 64  # queries with gates
    assert dims.matrices == 2 * delta + attention + 3 * 3 * 64 * 160
    assert dims.windows == (0,)
    assert dims.state_flops == 2 * 6 * 7 * 8 * 12 and dims.state_elements == 2 * (6 * 8 * 12 + 4 * convolved)
    forward = flops.forward_flops(dims, 12, [8])
    pairs = 4 * 4 * 16 * (20 * 21 // 2)
    assert forward == 20 * (2 * dims.matrices + dims.state_flops) + pairs + 2 * 100 * 64 * 8
    cache = plan(dims, concurrent=4, group_size=2, prompt_tokens=12, completion_tokens=8).kv_cache * 2**30
    assert cache == (4 * 8 + 2 * 12) * 2 * 2 * 16 * 2 + 4 * 4 * dims.state_elements
    lfm = AutoConfig.for_model("lfm2", **SIZES, layer_types=["conv", "full_attention", "conv"], conv_L_cache=3)
    dims = ModelDims.from_config(lfm)
    assert dims.windows == (0,) and (dims.state_flops, dims.state_elements) == (0, 2 * 3 * 64)


@pytest.mark.parametrize(
    ("model_type", "sizes", "active", "stacked"),
    [
        (
            "qwen3_moe",
            {"num_experts": 8, "moe_intermediate_size": 20},
            2 * 3 * 64 * 20 + 8 * 64,
            ("down_proj", "gate_up_proj"),
        ),
        ("mixtral", {"num_local_experts": 8}, 2 * 3 * 64 * 160 + 8 * 64, ("down_proj", "gate_up_proj")),
        ("olmoe", {"num_experts": 8}, 2 * 3 * 64 * 160 + 8 * 64, ("down_proj", "gate_up_proj")),
        ("gpt_oss", {"num_local_experts": 8}, 2 * 3 * 64 * 160 + 8 * 64, ("down_proj", "gate_up_proj")),
    ],
)
def test_a_token_passes_its_active_experts_and_memory_holds_all(model_type, sizes, active, stacked) -> None:
    config = AutoConfig.for_model(model_type, **SIZES, **sizes, num_experts_per_tok=2, head_dim=16)
    dims = ModelDims.from_config(config)
    attention = 64 * 16 * (4 + 2 + 2) + 4 * 16 * 64
    assert dims.matrices - 3 * (attention + active) in (
        0,
        3 * 2 * (2 * 160 + 64),
    )  # gpt-oss has biases in two dimensions
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert dims.parameters == model.num_parameters() > dims.matrices * 2
    assert dims.stacked == stacked
    run: Any = {"token_budget": 1000, "dtype_bytes": 2, "recompute": ["full"] * dims.layers, "compiled": True}
    with_copies, without = (memory.memory_plan(d, **run) for d in (dims, replace(dims, active=0)))
    # a copy of each row for each of its experts, and what comes back for it
    copies = 1000 * 2 * 2 * dims.active * dims.hidden / memory.GIB
    assert dims.active == 2 and with_copies.layer_backward - without.layer_backward == pytest.approx(copies)
    assert plan(dims).weights == 4 * dims.parameters / 2**30


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_forward_flops_are_those_that_torch_counts(name: str) -> None:
    """One sequence, all of whose logits are computed: eager attention computes the full square, not its causal half."""
    length, model = 24, make(name)
    dims = ModelDims.from_config(model.config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, length, dtype=torch.long))
    per_pair = 4 * dims.layers * dims.heads * dims.head_dim
    above_diagonal = length * (length - 1) // 2
    ours = flops.forward_flops(dims, 0, [length]) + per_pair * above_diagonal
    assert counter.get_total_flops() == ours


def adapt(model, rank: int, targets: list[str]) -> int:
    """Put adapters into a model and count what is trained."""
    add_adapters(model, ModelConfig(path="-", lora_rank=rank, lora_targets=targets), seed=0)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("rank", [1, 7])
@pytest.mark.parametrize("name", MODELS)
def test_adapter_parameters_are_those_that_peft_makes(name: str, rank: int) -> None:
    dims = ModelDims.from_config(make(name).config)
    for targets in (list(dims.linear_layers), ["o_proj", "down_proj"]):
        assert flops.lora_parameter_count(dims, rank, targets) == adapt(make(name), rank, targets)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_flops_of_a_lora_update_are_those_that_torch_counts(name: str) -> None:
    """One sequence, as above. The first layer's inputs have no gradient, which torch knows and we do not: those products are
    added to what it counts."""
    length, rank, model = 24, 5, make(name)
    dims = ModelDims.from_config(model.config)
    adapters = adapt(model, rank, list(dims.linear_layers))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, length, dtype=torch.long)).logits.sum().backward()
    first = [
        shapes[0] for name, shapes in dims.linear_layers.items() if name in ("q_proj", "k_proj", "v_proj", "qkv_proj")
    ]
    no_gradient = sum(2 * length * (inputs * outputs + rank * inputs) for inputs, outputs in first)
    above_diagonal = 4 * dims.layers * dims.heads * dims.head_dim * length * (length - 1) // 2
    ours = flops.update_flops(dims, 0, [length], adapters=adapters) + 3 * above_diagonal
    assert counter.get_total_flops() + no_gradient == ours
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, length, dtype=torch.long))
    assert counter.get_total_flops() == flops.forward_flops(dims, 0, [length], adapters=adapters) + above_diagonal


@pytest.mark.parametrize(("prompt", "completions"), [(7, [3, 1, 5]), (1, [2]), (4, [0, 6])])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("window", [0, 1, 3, 50])
def test_attention_pairs_by_counting(prompt: int, completions: list[int], shared: bool, window: int) -> None:
    seen = set()
    for sample, length in enumerate(completions):
        name = [("prompt", i) if shared else (sample, i) for i in range(prompt)]
        name += [(sample, prompt + i) for i in range(length)]
        seen |= {(name[i], name[j]) for i in range(len(name)) for j in range(i + 1) if i - j < (window or 99)}
    work = flops.flat_work(prompt, completions, shared=shared)
    assert flops.pairs(work, window or None).sum() == len(seen)
    assert work.rows.sum() == len({query for query, _ in seen})


def test_head_counts_completion_tokens_only_and_update_is_three_forwards() -> None:
    dims = ModelDims.from_config(make("llama").config)
    wider = replace(dims, vocab=dims.vocab + 1)
    difference = flops.forward_flops(wider, 10, [3, 4]) - flops.forward_flops(dims, 10, [3, 4])
    assert difference == 2 * 64 * (3 + 4)
    assert flops.update_flops(dims, 10, [3, 4]) == 3 * flops.forward_flops(dims, 10, [3, 4])


def test_rho_and_the_ratio_of_flops_are_those_worked_out_by_hand() -> None:
    """Against rho and the ratio of FLOPs worked out for Qwen3-4B: prompt, completion, group -> both."""
    for prompt, completion, size, rho, ratio in [(8192, 1024, 4, 3.00, 2.78), (4096, 1024, 8, 3.33, 2.98)]:
        assert flops.rho(prompt, [completion] * size) == pytest.approx(rho, abs=0.005)
        assert flops.flop_ratio(QWEN3_4B, prompt, [completion] * size) == pytest.approx(ratio, abs=0.01)


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GeForce RTX 4090", 165),
    ],
)
def test_peak_and_mfu(name: str, tera: float) -> None:
    peak = flops.peak_flops(name)
    assert peak is not None
    assert peak == tera * 1e12
    assert flops.mfu(tera * 1e12, 2.0, peak) == 0.5


@pytest.mark.parametrize(
    "name",
    [
        "Some CPU", "", "NVIDIA L400", "NVIDIA A1000", "NVIDIA A10M", "NVIDIA A100X", "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA GB200", "NVIDIA H200 NVL",
    ],
)  # fmt: skip
def test_a_device_that_only_resembles_a_known_one_has_no_peak(name: str) -> None:
    assert flops.peak_flops(name) is None


@pytest.mark.parametrize(("rank", "least", "most"), [(0, 0.97, 1.03), (4, 0.8, 1.0)])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_autograd_keeps(
    name: str, dtype: torch.dtype, rank: int, least: float, most: float
) -> None:
    """The distinct tensors that a transformers layer saves, over the plan's bytes a token of one layer. Beside frozen norms and
    with adapters beside all matrices it saves a little less."""
    length, model = 64, make(name).to(dtype)
    model.set_attn_implementation("sdpa")
    dims = ModelDims.from_config(model.config)
    if rank:
        adapt(model, rank, list(dims.linear_layers))
        model.to(dtype)
    hidden = torch.randn(1, length, dims.hidden, dtype=dtype, requires_grad=True)
    rotary = model.model.rotary_emb(hidden, torch.arange(length)[None])
    constant = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *rotary)}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model.layers[0](hidden, position_embeddings=rotary)
    saved = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in constant)

    def activations(layers: int) -> float:
        return plan(replace(dims, layers=layers), recompute="none", dtype_bytes=dtype.itemsize).activations

    planned = (activations(2) - activations(1)) * flops.GIB
    assert least <= saved / length / planned <= most


def plan(dims: ModelDims, recompute: Recompute = "full", **changes) -> memory.MemoryPlan:
    """Of layers that all compute the same again."""
    sizes: dict[str, Any] = {"token_budget": 1, "dtype_bytes": 2} | changes
    return memory.memory_plan(dims, recompute=[recompute for _ in range(dims.layers)], **sizes)


def test_memory_plan() -> None:
    dims = QWEN3_4B
    one, eight = plan(dims, token_budget=8192), plan(dims, token_budget=8192, ranks=8)
    assert one.weights == pytest.approx(4 * 4_022_468_096 / 2**30)
    assert (one.gradients, one.moments, one.reference) == (one.weights, 2 * one.weights, 0)
    assert eight.weights == one.weights / 8
    assert eight.activations == one.activations
    # Two bytes a weight, and the embedding gathered beside them.
    root = 2 * 151936 * 2560 / 2**30
    assert plan(dims, reference=True).reference == pytest.approx(one.weights / 2 + root)
    assert plan(dims, reference=True, ranks=8).reference == pytest.approx(one.weights / 16 + root)
    assert plan(dims, reference=True, ref_offload=True).reference == pytest.approx(root)
    assert plan(dims, reference=True, dtype_bytes=4).reference == one.weights
    assert plan(dims, ref_offload=True).reference == 0
    assert plan(dims, token_budget=8192, recompute="none").activations > 10 * one.activations
    sampled = plan(dims, concurrent=64, group_size=8, prompt_tokens=512, completion_tokens=1024)
    assert sampled.kv_cache == (64 * 1024 + 8 * 512) * 2 * 36 * 8 * 128 * 2 / 2**30
    assert one.peak == max(one.update, one.optimizer_step, one.rollout)
    assert plan(dims, dtype_bytes=4).gathered == 0


def test_memory_plan_of_layers_that_stay_gathered() -> None:
    """Qwen3-4B's layer has 100,925,440 elements of matrices, in bfloat16. Two more are in use where one does not stay; where all
    do, these are among them. An update has them, and a rollout of the embedded engine."""
    dims = QWEN3_4B
    layer = 2 * (2560 * 128 * (32 + 8 + 8) + 32 * 128 * 2560 + 3 * 2560 * 9728) / flops.GIB
    assert layer == 2 * 100_925_440 / flops.GIB
    none = plan(dims)
    for count, more in ((0, 0), (1, 1), (2, 2), (19, 19), (34, 34), (35, 34), (36, 34)):
        some = plan(dims, stay_gathered=count)
        assert some.stay_gathered == pytest.approx(more * layer)
        assert some.update - none.update == pytest.approx(some.stay_gathered)
        assert (some.optimizer_step, some.rollout) == (none.optimizer_step, none.rollout)
    every: dict[str, Any] = {"stay_gathered": 36}
    assert plan(dims, dtype_bytes=4, **every) == plan(dims, dtype_bytes=4)  # FSDP2 shards nothing
    assert plan(dims, dtype_bytes=4, ranks=2, **every).stay_gathered == pytest.approx(2 * 34 * layer)
    lora = plan(dims, adapters=36 * 10**6, **every)
    assert lora.stay_gathered == pytest.approx(34 * (layer + 2 * 10**6 / flops.GIB))
    sampled: dict[str, Any] = {"concurrent": 8, "group_size": 8, "prompt_tokens": 512, "completion_tokens": 1024}
    assert plan(dims, **sampled, **every).rollout - plan(dims, **sampled).rollout == pytest.approx(34 * layer)
    assert plan(dims, trains=False, **every) == plan(dims, trains=False)  # an evaluation with vLLM
    assert plan(dims, trains=False, **sampled, **every).rollout == pytest.approx(
        plan(dims, trains=False, **sampled).rollout + 34 * layer
    )


def test_as_many_layers_stay_gathered_as_fit() -> None:
    dims, sizes = QWEN3_4B, {"token_budget": 12288, "dtype_bytes": 2, "compiled": True}
    given = LayerPlan(["full"] * 36, 4)
    peaks = [memory.memory_plan(dims, **given._replace(stay_gathered=n)._asdict(), **sizes).peak for n in (0, 7, 36)]
    for capacity, count in (
        (999.0, 36),
        (peaks[2], 36),
        (peaks[1] + 0.01, 7),
        (peaks[1] - 0.01, 6),
        (peaks[0], 0),
        (1.0, 0),
    ):
        assert most_gathered(dims, capacity, given, **sizes) == given._replace(stay_gathered=count)


def test_no_layer_recomputes_for_a_rollout_that_is_short_of_memory() -> None:
    """Of the embedded engine, whose peak is above an update's. As many layers stay gathered as it has room for."""
    dims, nothing = QWEN3_4B, ["none"] * 36
    sizes: dict[str, Any] = {"token_budget": 1024, "dtype_bytes": 2, "compiled": True, "offload": True}
    sizes |= {"concurrent": 256, "group_size": 8, "prompt_tokens": 512, "completion_tokens": 1024}
    for count, more in ((0, 0.0), (7, 0.0), (36, 9.0)):
        some = plan(dims, recompute="none", stay_gathered=count, **sizes)
        assert some.peak == some.rollout > some.update
        found = fewest_recomputed_layers(dims, some.rollout + more + 0.01, **sizes)
        assert found == (nothing, 1, count)


def test_memory_plan_of_checkpointing_and_offload() -> None:
    dims = QWEN3_4B
    attention = plan(dims, recompute="attention")
    # A token of a layer: its input (2560 bfloat16), attention's output (32 x 128 bfloat16) and log-sum-exps (32 float32).
    assert attention.activations == pytest.approx(36 * (2 * 2560 + 32 * (2 * 128 + 4)) / flops.GIB)
    assert plan(dims).activations == pytest.approx(36 * 2 * 2560 / flops.GIB)
    # The backward has one layer whole at a time, with gradients of two layers and of the head in bfloat16.
    whole_layer = plan(dims, recompute="none").activations / 36
    gradients = 2 * (2 * dims.layer_matrix + 151936 * 2560) / flops.GIB
    of_mlp = 3 * 2 * 9728 / flops.GIB  # gradients of gate, up and their product
    assert attention.layer_backward == pytest.approx(whole_layer + of_mlp + gradients)
    assert plan(dims, recompute="none").layer_backward == pytest.approx(of_mlp + gradients)
    # With their products, a compiled layer keeps q, k and v (48 heads), gate and up, and attention's output with its projection;
    # the backward has the rest of one layer beside these.
    modes: tuple[Recompute, ...] = ("none", "matmuls")
    compiled = {mode: plan(dims, recompute=mode, compiled=True) for mode in modes}
    products = 36 * 2 * (48 * 128 + 2 * 9728 + 2560) / flops.GIB
    assert compiled["matmuls"].activations == pytest.approx(attention.activations + products)
    uncompiled = plan(dims, recompute="matmuls").activations  # the MLP's output too, which nothing needs
    assert uncompiled == pytest.approx(compiled["matmuls"].activations + 36 * 2 * 2560 / flops.GIB)
    rest = (compiled["none"].activations - compiled["matmuls"].activations) / 36
    assert compiled["matmuls"].layer_backward == pytest.approx(rest + of_mlp + gradients)
    some: list[Recompute] = ["attention" if n < 35 else "matmuls" for n in range(36)]
    # The MLP of the last is whole: parts of others lower no peak
    whole, in_parts = (
        memory.memory_plan(dims, token_budget=9, dtype_bytes=2, compiled=True, recompute=some, mlp_chunks=n)
        for n in (1, 4)
    )
    assert whole == in_parts and whole.layer_backward > compiled["matmuls"].layer_backward
    parts: list[tuple[int, Recompute]] = [(5, "full"), (10, "attention"), (21, "none")]
    layers: list[Recompute] = [mode for count, mode in parts for _ in range(count)]
    mixed = memory.memory_plan(dims, token_budget=1, dtype_bytes=2, recompute=layers).activations
    assert mixed == pytest.approx(sum(count * plan(dims, recompute=mode).activations / 36 for count, mode in parts))
    offloaded = plan(dims, offload=True)
    assert (offloaded.moments, offloaded.weights, offloaded.gradients) == (0, attention.weights, attention.gradients)


@pytest.mark.parametrize(("prompt", "group_size"), [(8192, 4), (4096, 8)])
def test_what_compiled_layers_keep_is_what_was_measured_on_a_gpu(prompt: int, group_size: int) -> None:
    """Peaks of the benchmark without checkpointing and with attention kept differ by what only the former keeps."""
    dims = QWEN3_4B
    rows = json.loads((Path(__file__).parents[2] / "benchmarks" / "h100_policy.json").read_text())["rows"]
    shape = (prompt, 1024, group_size, "grouped")
    peaks = {
        row["checkpointing"]: row["peak_gib"]
        for row in rows
        if (row["prompt"], row["completion"], row["group_size"], row["method"]) == shape
    }
    sizes: dict[str, Any] = {"token_budget": prompt + group_size * 1024, "compiled": True}
    none, attention = (plan(dims, recompute=mode, **sizes).activations for mode in ("none", "attention"))
    planned = none - attention
    assert 0.95 < (peaks["none"] - peaks["attention"]) / planned < 1.05
    eager = plan(dims, recompute="none", **sizes | {"compiled": False}).activations
    assert eager > 1.5 * none


@pytest.mark.parametrize(
    ("file", "row"), [("multi_gpu.json", n) for n in range(5)] + [("h100_train_step.json", n) for n in range(4)]
)
def test_the_plan_of_an_update_is_what_was_measured_on_a_gpu(file: str, row: int) -> None:
    """At most 0.7 GiB more, and never less; 1.1 with replicas, of whose reductions the root's is the last."""
    dims = QWEN3_4B
    measured = json.loads((Path(__file__).parents[2] / "benchmarks" / file).read_text())["rows"][row]
    planned = memory.memory_plan(
        dims,
        token_budget=4096 + 8 * 1024,
        recompute=[mode for mode, count in measured["layers"].items() for _ in range(count)],
        stay_gathered=measured.get("stay_gathered", 0),
        dtype_bytes=2,
        compiled=True,
        ranks=measured.get("fsdp_size") or measured["ranks"],
        replicas=measured["ranks"] // (measured.get("fsdp_size") or measured["ranks"]),
        offload=measured["offload"] == "cpu",
        logit_chunk_bytes=2 * 4096 * 151936,  # half of the completions' tokens
    )
    assert 0 <= planned.update - measured["peak_gib"] < (1.1 if planned.reductions else 0.7)


def test_auto_checkpoints_as_few_layers_as_make_the_plan_fit() -> None:
    dims = QWEN3_4B
    sizes: dict[str, Any] = {"token_budget": 16384, "dtype_bytes": 2, "offload": True}

    def peak(recompute: Sequence[Recompute], stay_gathered: int = 0) -> float:
        return memory.memory_plan(dims, recompute=recompute, stay_gathered=stay_gathered, **sizes).peak

    cases: list[tuple[Recompute, Recompute, float]] = [("attention", "none", 73.0), ("full", "attention", 40.0)]
    for more, less, capacity in cases:
        recompute = fewest_recomputed_layers(dims, capacity, **sizes).recompute
        count = recompute.count(more)
        assert 0 < count < 36
        assert recompute == sorted(recompute, key=[more, less].index)
        fewer: list[Recompute] = [*recompute[1:], less]
        assert peak(recompute) <= capacity < peak(fewer)
    nothing: list[Recompute] = ["none"] * 36
    assert fewest_recomputed_layers(dims, peak(nothing, 36) + 0.1, **sizes) == (nothing, 1, 36)
    # No products are computed again so that a layer stays gathered.
    assert fewest_recomputed_layers(dims, peak(nothing, 36) - 0.1, **sizes) == (nothing, 1, 0)
    assert fewest_recomputed_layers(dims, 10.0, **sizes) == (["full"] * 36, 16, 0)  # nothing fits
    # Compiled layers keep their matrix products before they recompute these. What lies between is recomputed in as few as possible
    # while all stay gathered, and in all of them before one does not.
    sizes |= {"token_budget": 12288, "compiled": True}
    products: list[Recompute] = ["matmuls"] * 36
    all_gathered, none_gathered = (peak(products, count) for count in (36, 0))
    most = fewest_recomputed_layers(dims, all_gathered + 2, **sizes)
    count = most.recompute.count("matmuls")
    assert most == (["matmuls"] * count + ["none"] * (36 - count), 1, 36) and 0 < count < 36
    assert peak(most.recompute, 36) <= all_gathered + 2 < peak([*most.recompute[1:], "none"], 36)
    assert fewest_recomputed_layers(dims, all_gathered + 0.01, **sizes) == (products, 1, 36)
    for capacity in (all_gathered - 0.01, none_gathered + 0.01):
        assert fewest_recomputed_layers(dims, capacity, **sizes) == (products, 1, 0)
    some = fewest_recomputed_layers(dims, none_gathered - 0.01, **sizes)
    assert some == (["attention"] + ["matmuls"] * 35, 1, 0)
    for uses, changes in ((dims, {"adapters": 10**7}), (replace(dims, state_elements=1), {})):  # none of these
        assert set(fewest_recomputed_layers(uses, 50.0, **sizes | changes).recompute) == {"attention", "none"}


LONG: dict[str, Any] = {"token_budget": 131_072 + 8 * 1024, "compiled": True, "dtype_bytes": 2}


def test_the_memory_plan_of_long_samples() -> None:
    """A token's input of a layer is 2560 bfloat16, in host memory with ``offload``, but for three on their way; the compiled MLP
    keeps gate, up and their product, 9728 bfloat16 each, and its backward has their gradients."""
    dims, tokens = QWEN3_4B, LONG["token_budget"] / flops.GIB
    full, offload = (plan(dims, recompute=mode, **LONG) for mode in ("full", "offload"))
    assert (full.host, offload.activations) == (0, 0)
    assert offload.host == full.activations == pytest.approx(36 * 2 * 2560 * tokens)
    assert offload.layer_backward - full.layer_backward == pytest.approx(3 * 2 * 2560 * tokens)
    parts = plan(dims, mlp_chunks=4, **LONG)
    assert full.layer_backward - parts.layer_backward == pytest.approx(
        (3 / 4 * 6 * 9728 - 2 * 2560) * 2 * tokens, rel=1e-3
    )
    assert plan(dims, recompute="attention", mlp_chunks=4, **LONG).layer_backward == parts.layer_backward
    assert plan(dims, recompute="none", mlp_chunks=4, **LONG) == plan(dims, recompute="none", **LONG)


@pytest.mark.parametrize(
    ("adapters", "chunks", "counted"),
    [(0, 1, 167_000), (0, 4, 87_000), (33_030_144, 1, 286_000), (33_030_144, 4, 141_000)],
)
def test_the_backward_of_a_layer_takes_what_was_counted(adapters: int, chunks: int, counted: int) -> None:
    """Bytes a token at the peak of a compiled layer's backward, by PyTorch's profiler on a CPU, with PyTorch 2.13. On an H100 they
    were 171,000 or more, for all weights and whole MLPs."""
    dims = QWEN3_4B
    whole, nothing = (
        plan(dims, adapters=adapters, mlp_chunks=chunks, **{**LONG, "token_budget": n}).layer_backward
        for n in (1000, 0)
    )
    assert 0.98 < (whole - nothing) * flops.GIB / 1000 / counted < 1.05


@pytest.mark.parametrize(("chunks", "counted"), [(1, 240_000), (4, 91_000)])
def test_the_plan_has_room_for_the_backward_of_a_layer_that_kept_its_attention(chunks: int, counted: int) -> None:
    """Counted as above, with LoRA: less than of a layer that is recomputed whole, whose attention's outputs come to it."""
    whole, nothing = (
        plan(
            QWEN3_4B, "attention", adapters=33_030_144, mlp_chunks=chunks, **{**LONG, "token_budget": n}
        ).layer_backward
        for n in (1000, 0)
    )
    assert (whole - nothing) * flops.GIB / 1000 > counted


def test_the_plan_of_long_samples_is_what_was_measured_on_a_gpu() -> None:
    """Never less, and of adapters at most 3.5 GiB more. Gradients of all weights are counted beside activations, of which most are
    freed before."""
    dims = QWEN3_4B
    rows = json.loads((Path(__file__).parents[2] / "benchmarks" / "h100_long_context.json").read_text())["rows"]
    assert {(row["prompt"], bool(row["lora_rank"]), row["ranks"]) for row in rows} >= {
        (2**18, False, 1),
        (2**17, False, 2),
    }
    for row in rows:
        lora = row["lora_rank"]
        planned = memory.memory_plan(
            dims,
            token_budget=row["prompt"] + row["group_size"] * row["completion"],
            recompute=[mode for mode, count in row["layers"].items() for _ in range(count)],
            stay_gathered=row.get("stay_gathered", 0),
            dtype_bytes=2,
            compiled=True,
            mlp_chunks=row["mlp_chunks"],
            ranks=row["ranks"],
            together=row["together"],
            offload=row["offload"] == "cpu",
            adapters=flops.lora_parameter_count(dims, lora, dims.linear_layers),
        )
        assert 0 <= planned.update - row["peak_gib"] < (3.5 if lora else 16), row["command"]


def test_ranks_that_compute_a_batch_together_divide_its_rows() -> None:
    """Each holds queries, keys and values twice around the exchange of rows for heads: (32 + 2 * 8) * 128 bfloat16 a token. With 16
    ranks each key/value head is there twice."""
    dims, rows = QWEN3_4B, LONG["token_budget"] / 4 / flops.GIB
    one, four = plan(dims, **LONG), plan(dims, together=4, **LONG)
    assert four.activations == pytest.approx(one.activations / 4)
    nothing: dict[str, Any] = {**LONG, "token_budget": 0}
    constant = plan(dims, **nothing).layer_backward
    exchanged = 2 * 2 * (32 + 2 * 8) * 128 * rows
    assert four.layer_backward - constant == pytest.approx((one.layer_backward - constant) / 4 + exchanged)
    two, sixteen = (plan(dims, together=n, recompute="none", **LONG).activations * n for n in (2, 16))
    assert sixteen - two == pytest.approx(36 * 2 * 2 * 8 * 128 * LONG["token_budget"] / flops.GIB)
    one, four, sixteen = (plan(dims, together=n, kept_tokens=1024, **LONG).kept for n in (1, 4, 16))
    assert one == pytest.approx(2 * 36 * 2 * 8 * 128 * 2 * 1024 / flops.GIB) and (four, sixteen) == (one / 4, one / 8)


def test_auto_offloads_and_cuts_mlps_where_that_is_needed() -> None:
    dims = QWEN3_4B
    sizes: dict[str, Any] = LONG | {"offload": True}

    def auto(gib: float, host: float) -> tuple[dict[str, int], int]:
        modes, chunks, _ = fewest_recomputed_layers(dims, gib, host_gib=host, **sizes)
        return {mode: modes.count(mode) for mode in modes}, chunks

    assert auto(600, 100) == ({"none": 36}, 1)
    assert auto(68.9, 100) == auto(68.9, 0) == ({"full": 36}, 4)
    # 32 heads of 128 bfloat16 and a float32 log-sum-exp: 1.08 GiB a layer. Whole MLPs leave no layer its attention.
    of_attention = 32 * (2 * 128 + 4) * LONG["token_budget"] / flops.GIB
    cut = plan(dims, mlp_chunks=4, **sizes).peak
    assert auto(cut + 5.1 * of_attention, 100) == ({"full": 31, "attention": 5}, 4)
    whole = plan(dims, **sizes).peak
    assert (
        auto(whole - 0.1, 0)[0]["attention"] == int((whole - 0.1 - cut) / of_attention) and auto(whole - 0.1, 0)[1] == 4
    )
    assert auto(whole + 0.1, 0) == ({"full": 36}, 1)
    modes, chunks = auto(60, 100)
    assert set(modes) == {"offload", "full"} and chunks == 4
    assert auto(47, 100)[1] == 4 and auto(47, 100)[0]["offload"] > 30
    assert auto(43, 100)[1] == 16
    assert auto(60, 0.5 * 36 * 2 * 2560 * LONG["token_budget"] / flops.GIB)[0].get("offload", 0) <= 18
    fixed = fewest_recomputed_layers(dims, 68, host_gib=0, mlp_chunks=1, **sizes)
    assert fixed == (["full"] * 36, 1, 0)
    without = fewest_recomputed_layers(replace(dims, has_mlp=False), 10, host_gib=100, **sizes)
    assert without.mlp_chunks == 1


def test_auto_cuts_mlps_only_where_that_spares_something() -> None:
    """Where the log-probs are the peak, parts of MLPs change nothing. Uncompiled layers and layers with a state compute parts a
    third time (test_long_samples.py), and offload first."""
    dims = QWEN3_4B
    short = fewest_recomputed_layers(
        dims, 68, host_gib=100, token_budget=16_384, compiled=True, dtype_bytes=2, logit_chunk_bytes=2**32
    )
    assert {*short.recompute} == {"full", "offload"} and short.mlp_chunks == 1
    sizes = LONG | {"offload": True}
    compiled = fewest_recomputed_layers(dims, 75, host_gib=100, **sizes)
    assert ({*compiled.recompute}, compiled.mlp_chunks) == ({"full", "attention"}, 4)
    for uncut, changes in ((dims, {"compiled": False}), (replace(dims, state_elements=1), {})):
        for host in (100, 0):
            found = fewest_recomputed_layers(uncut, 75, host_gib=host, **sizes | changes)
            assert ({*found.recompute}, found.mlp_chunks) == (({"full", "offload"}, 1) if host else ({"full"}, 4))


def test_memory_plan_of_lora() -> None:
    """Two bytes a frozen weight in bfloat16; gradients, moments and the head's gradient only of what is trained."""
    dims = QWEN3_4B
    adapters = flops.lora_parameter_count(dims, 16, dims.linear_layers)
    assert adapters == 36 * 16 * (2 * (2560 + 4096) + 2 * (2560 + 1024) + 3 * (2560 + 9728)) == 33_030_144
    lora, all_weights = plan(dims, adapters=adapters, reference=True, ranks=2), plan(dims, ranks=2)
    assert lora.weights == pytest.approx((2 * 4_022_468_096 + 4 * adapters) / 2 / 2**30)
    assert (lora.gradients, lora.moments) == (4 * adapters / 2 / 2**30, 8 * adapters / 2 / 2**30)
    assert lora.reference == 0
    assert all_weights.logprobs - lora.logprobs == 151936 * 2560 * 6 / 2**30
    layers = 2 * (dims.layer_matrix + adapters // 36)
    assert lora.gathered == pytest.approx(2 * (151936 * 2560 + layers) / 2**30)
    whole_layer, gradients = plan(dims, recompute="none").activations / 36, 2 * (2 * adapters // 36) / 2**30
    beside = 2 * (8 * 9728 + 4 * 2560) / 2**30
    assert lora.layer_backward == pytest.approx(whole_layer + beside + gradients)
    assert lora.activations == all_weights.activations
    in_float32 = plan(dims, adapters=adapters, dtype_bytes=4)
    assert (in_float32.gathered, in_float32.adam_scratch) == (0, in_float32.gradients)
    assert in_float32.weights == pytest.approx(4 * (4_022_468_096 + adapters) / 2**30)
    assert plan(dims, adapters=adapters, offload=True).moments == 0
    assert plan(dims, adapters=adapters, token_budget=8192).peak < plan(dims, token_budget=8192).peak / 4
