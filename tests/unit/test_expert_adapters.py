"""LoRA beside stacked experts, against weights to which the adapters' products were added one expert at a time."""

import copy
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_expert_products import EXPERTS, ROWS, SIZES, make, module, outputs_and_gradients, random_inputs  # noqa: F401
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM

from pgrpo.admission.compare import reference_logprobs, tokens_as_samples
from pgrpo.admission.fits import check_lora
from pgrpo.commands.plan import plan_text
from pgrpo.config import Config, ConfigError, ModelConfig
from pgrpo.model.families import expert_products
from pgrpo.model.families.expert_adapters import adapter_of, add_expert_adapters
from pgrpo.model.lora import adapters_off, add_adapters, merge_adapters
from pgrpo.model.policy import Policy, load_model
from pgrpo.model.weights import full_weights, weight_names
from pgrpo.packing.batch import build_batch
from pgrpo.packing.forest import Forest
from pgrpo.planning import dims as planning_dims
from pgrpo.planning import flops
from pgrpo.planning.dims import ModelDims, stacked_matrices
from pgrpo.planning.hub import load_hf_config
from pgrpo.training.sums import work_flops

RANK, ALPHA = 3, 12.0
KINDS = ["qwen3_moe", "mixtral", "olmoe", "gpt_oss"]
SHARED = "qwen3_5_moe_text"


def perturb(model):
    """New adapters add zero; these do not."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)


def matrices_of(adapter):
    return adapter.lora_A["default"].weight, adapter.lora_B["default"].weight


def summed(stack, name):
    """A stacked parameter plus ``alpha / rank * B @ A`` of each expert; differentiable."""
    a, b = matrices_of(adapter_of(stack, name))
    deltas = [ALPHA / RANK * (b[x] @ a[x]) for x in range(len(a))]
    return getattr(stack, name) + torch.stack([delta.T if stack.is_transposed else delta for delta in deltas])


@pytest.fixture(scope="module", params=[["gate_up_proj", "down_proj"], ["gate_up_proj"], ["down_proj"]], ids="-".join)
def adapted(request, module):  # noqa: F811
    """Experts, frozen, with matrices stored [outputs, inputs] or [inputs, outputs], and adapters beside them."""
    stack = copy.deepcopy(module).requires_grad_(False)
    torch.manual_seed(3)
    add_expert_adapters([stack], request.param, RANK, ALPHA)
    perturb(stack)
    return stack


def test_outputs_and_gradients_are_those_of_summed_weights(adapted):
    names = [name for name, _ in stacked_matrices(adapted) if adapter_of(adapted, name)]
    assert {n for n, p in adapted.named_parameters() if p.requires_grad} == {
        f"lora_{name}.lora_{matrix}.default.weight" for name in names for matrix in "AB"
    }

    def plain(*inputs):
        return functional_call(adapted, {name: summed(adapted, name) for name in names}, inputs)

    assert adapted.config._experts_implementation == "eager"  # transformers' loop over experts, which knows no adapters
    got = outputs_and_gradients(adapted, lambda *inputs: expert_products.forward(adapted, *inputs))
    want = outputs_and_gradients(adapted, plain)
    assert len(got) == len(want) == 3 + 2 * len(names)
    for a, b in zip(got, want, strict=True):
        assert b.abs().max() > 0.1 and (a - b).abs().max() < 1e-13 * b.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lower_precision_is_no_further_off_than_summed_weights(adapted, dtype):
    """Grouped products, of a rank that is padded for them, in the dtype of the rows, whatever the adapters are held in."""
    names = [name for name, _ in stacked_matrices(adapted) if adapter_of(adapted, name)]
    low = copy.deepcopy(adapted).to(dtype)

    def ours(*inputs):
        return expert_products.forward(low, *inputs)

    def plain(*inputs):
        return functional_call(low, {name: summed(low, name) for name in names}, inputs)

    exact = outputs_and_gradients(low.double(), plain)
    theirs = outputs_and_gradients(low.to(dtype), plain, dtype)
    for parameter in low.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    got = outputs_and_gradients(low, ours, dtype)
    for a, b, right in zip(got, theirs, exact, strict=True):
        errors = [(x.double() - right).norm() / right.norm() for x in (a, b)]
        assert errors[0] < 2 * errors[1] + 2e-6


@pytest.mark.parametrize("rank", [1, RANK, 8])
def test_low_precision_is_grouped_products_alone_at_any_rank(rank, monkeypatch):
    """One expert at a time the host would wait for the GPU."""
    calls = []
    real = torch.nn.functional.grouped_mm
    monkeypatch.setattr(
        torch.nn.functional, "grouped_mm", lambda *args, **kwargs: calls.append(args[1].shape) or real(*args, **kwargs)
    )
    monkeypatch.setattr(expert_products, "_spans", lambda _: pytest.fail("a loop over experts"))
    (stack,) = [m for m in make("qwen3_moe").modules() if hasattr(m, "_apply_gate")]
    stack.requires_grad_(False)
    add_expert_adapters([stack], ["gate_up_proj", "down_proj"], rank, ALPHA)
    outputs_and_gradients(stack.bfloat16(), lambda *x: expert_products.forward(stack, *x), torch.bfloat16)
    # Forward: one with each weight, two with each adapter. Backward: six for gradients of their inputs, four of what is trained.
    assert len(calls) == 6 + 6 + 4


def test_a_compiler_is_told_the_shapes_of_sorted_rows():
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    experts_S = random_inputs()[1].flatten().sort(stable=True).values
    ends_X = torch.searchsorted(experts_S, torch.arange(EXPERTS), right=True, out_int32=True)
    low = torch.randn(3 * ROWS, 4, dtype=torch.float64, requires_grad=True)
    second = torch.randn(EXPERTS, 24, 4, dtype=torch.float64, requires_grad=True)
    inputs = low, second, None, None, None, experts_S, ends_X, 1, False
    torch.library.opcheck(expert_products.expert_inputs, inputs, test_utils=checks)


def test_compiled_code_follows_lengths_and_adapters_that_are_off():
    (stack,) = [m for m in make("qwen3_moe").modules() if hasattr(m, "_apply_gate")]
    for parameter in stack.requires_grad_(False).parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    plain = copy.deepcopy(stack)
    add_expert_adapters([stack], ["down_proj"], RANK, ALPHA)
    perturb(stack)
    compiled = torch.compile(expert_products.forward, dynamic=True, fullgraph=True, backend="eager")
    for rows in (ROWS, 11):
        some = [x[:rows].detach() for x in random_inputs()]
        want = expert_products.forward(stack, *some)
        assert torch.equal(compiled(stack, *some), want)
        with adapters_off(stack):
            off = compiled(stack, *some)
        assert torch.equal(off, expert_products.forward(plain, *some)) and not torch.equal(off, want)


def samples():
    generator = torch.Generator().manual_seed(1)

    def ids(n):
        return torch.randint(3, 32, (n,), generator=generator).tolist()

    return tokens_as_samples([ids(9), ids(1)], [[ids(3), ids(5), ids(1)], [ids(7), ids(2)]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    def save(kind):
        folder = tmp_path_factory.mktemp(kind)
        extra = {"shared_expert_intermediate_size": 16, "layer_types": ["full_attention"]} if kind == SHARED else {}
        make(kind, initializer_range=0.2, eos_token_id=2, pad_token_id=0, **extra).save_pretrained(folder)
        return str(folder)

    return {kind: save(kind) for kind in [*KINDS, SHARED]}


def config_of(folder, targets):
    return ModelConfig(path=folder, lora_rank=RANK, lora_alpha=ALPHA, lora_targets=targets)


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_are_those_of_the_merged_model_and_of_what_an_engine_gets(kind, folders):
    config = config_of(folders[kind], ["q_proj", "experts"])
    model = load_model(config, dtype=torch.float64)
    add_adapters(model, config, seed=0)
    batch, initial = build_batch(Forest.of(samples())), Policy(load_model(config, dtype=torch.float64))
    policy = Policy(model)
    assert torch.equal(policy(batch).logprobs, initial(batch).logprobs)
    perturb(model)
    wanted = policy(batch).logprobs
    with suppress(KeyError), adapters_off(policy):
        assert torch.equal(policy(batch).logprobs, initial(batch).logprobs)
        raise KeyError  # they are on again after an error, too
    assert torch.equal(policy(batch).logprobs, wanted) and (wanted - initial(batch).logprobs).abs().max() > 0.1

    plain = AutoModelForCausalLM.from_pretrained(
        folders[kind], dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    stacks = [("model.layers.0.mlp.experts", name) for name in ("gate_up_proj", "down_proj")]
    with torch.no_grad():
        for path, name in stacks:
            plain.get_submodule(path).get_parameter(name).copy_(summed(model.get_submodule(path), name))
        linear = model.model.layers[0].self_attn.q_proj
        plain.model.layers[0].self_attn.q_proj.weight += (
            ALPHA / RANK * (linear.lora_B["default"].weight @ linear.lora_A["default"].weight)
        )
    assert (reference_logprobs(plain, samples()) - wanted).abs().max() < 1e-6

    got, names = dict(full_weights(model, torch.float32)), weight_names(model)
    assert got.keys() == names == weight_names(initial.model)
    for name, weight in full_weights(plain, torch.float32):
        torch.testing.assert_close(got[name], weight, rtol=1e-5, atol=1e-6)
    rounded = dict(full_weights(model, torch.bfloat16))
    assert all(weight.dtype == torch.bfloat16 for weight in rounded.values())
    assert all((rounded[n].float() - got[n]).abs().max() <= got[n].abs().max() / 128 for n in names)

    merge_adapters(model)
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert all(torch.allclose(p, plain.get_parameter(n), atol=1e-12) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", ["q_proj", "experts"])
def test_a_push_in_bfloat16_carries_what_young_adapters_add(name, folders):
    """Less than half a unit in the last place of most weights: to nearest, most of it would be lost."""
    config = config_of(folders["gpt_oss"], [name])
    model = load_model(config, torch.bfloat16)
    before = dict(full_weights(model, torch.float32))
    add_adapters(model, config, seed=0)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 3e-3 * torch.randn(parameter.shape, generator=generator)
    whole, pushed = (dict(full_weights(model, dtype)) for dtype in (torch.float32, torch.bfloat16))
    found = [n for n in whole if not torch.equal(whole[n], before[n])]
    assert len(found) == (1 if name == "q_proj" else 2)
    for n in found:
        change = whole[n] - before[n]
        carried, nearest = (
            (((x.float() - before[n]) * change).sum() / change.square().sum()).item()
            for x in (pushed[n], whole[n].bfloat16())
        )
        print(f"{n}: share of the change {carried:.2f}; to nearest {nearest:.2f}")
        assert carried == pytest.approx(1.0, abs=0.35) and nearest < 0.5


def test_adapters_come_from_the_seed_alone_and_are_float32_beside_bfloat16(folders):
    made = {}
    for number, seed in enumerate((5, 5, 6)):
        config = config_of(folders["gpt_oss"], ["experts"])
        model = load_model(config, torch.bfloat16)
        add_adapters(model, config, seed)
        made[number] = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        torch.rand(number + 3)  # whatever is drawn in between
    sizes = {name: tuple(p.shape) for name, p in made[0].items()}
    stem = "model.layers.0.mlp.experts.lora_"
    assert sizes == {
        f"{stem}gate_up_proj.lora_A.default.weight": (EXPERTS, RANK, 32),
        f"{stem}gate_up_proj.lora_B.default.weight": (EXPERTS, 48, RANK),
        f"{stem}down_proj.lora_A.default.weight": (EXPERTS, RANK, 24),
        f"{stem}down_proj.lora_B.default.weight": (EXPERTS, 32, RANK),
    }
    for name, value in made[0].items():
        assert value.dtype == torch.float32 and torch.equal(value, made[1][name])
        if "lora_A" in name:  # as peft's beside a linear layer of as many inputs
            assert not torch.equal(value, made[2][name])
            most = value.shape[-1] ** -0.5
            assert 0.9 * most < value.abs().max() <= most and value.std() == pytest.approx(most / 3**0.5, rel=0.1)
        else:
            assert not value.any()


@pytest.mark.parametrize(
    ("targets", "stacked", "linear"),
    [
        ([], (), 8),
        (["experts"], ("gate_up_proj", "down_proj"), 0),
        (["experts.down_proj", "q_proj"], ("down_proj",), 1),
        (["down_proj", "experts.gate_up_proj"], ("gate_up_proj",), 1),
    ],
)
def test_targets_name_linear_layers_or_experts(targets, stacked, linear, folders):
    """Qwen3.5's mixtures have a ``down_proj`` among the linear layers, of the shared expert, and one of the experts."""
    config = config_of(folders[SHARED], targets)
    model = load_model(config)
    dims = ModelDims.from_config(model.config)
    check_lora(config, dims)
    add_adapters(model, config, seed=0)
    found = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {name.split("experts.lora_")[1].split(".")[0] for name in found if ".experts." in name} == {*stacked}
    assert len([name for name in found if ".experts." not in name]) == 2 * linear
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert flops.adapter_parameters(config, dims) == count
    sizes = {"gate_up_proj": 32 + 48, "down_proj": 24 + 32}
    of_experts = RANK * sum(sizes[name] for name in stacked)
    assert flops.active_adapters(config, dims) == count - (EXPERTS - 3) * of_experts
    assert flops.adapter_parameters(replace(config, lora_rank=0), dims) == 0


def test_what_cannot_be_adapted_is_refused_by_name(caplog):
    caplog.set_level("INFO")
    qwen, llama4 = (
        ModelDims.from_config(AutoConfig.for_model(kind, **SIZES, num_experts=EXPERTS, num_local_experts=EXPERTS))
        for kind in ("qwen3_moe", "llama4_text")
    )
    for name in ("gate_up_proj", "experts.up_proj"):
        wanted = (
            rf"^model\.lora_targets: '{name}' is no linear layer of m; it may be q_proj, k_proj, v_proj, o_proj, experts, "
            r"experts\.gate_up_proj, experts\.down_proj; an empty list means all linear layers$"
        )
        with pytest.raises(ConfigError, match=wanted):
            check_lora(ModelConfig(path="m", lora_rank=2, lora_targets=["q_proj", name]), qwen)
    for name in ("experts", "experts.down_proj"):
        with pytest.raises(
            ConfigError, match=rf"^model\.lora_targets: '{name}': experts of m get no adapters, as only"
        ):
            check_lora(ModelConfig(path="m", lora_rank=2, lora_targets=[name]), llama4)
    check_lora(ModelConfig(path="m", lora_rank=2, lora_targets=["q_proj", "experts"]), qwen)
    assert not caplog.text
    check_lora(ModelConfig(path="m", lora_rank=2), qwen)
    assert (
        "LoRA: the experts (down_proj, gate_up_proj) are not trained, they have no adapters; model.lora_targets=["
        in caplog.text
    )
    assert "o_proj,experts] gives them some" in caplog.text
    check_lora(ModelConfig(path="m", lora_rank=2), llama4)
    assert caplog.text.endswith("they have no adapters\n")


def test_experts_that_another_code_computes_get_no_adapters(monkeypatch):
    """Those with a norm behind each expert: adapters beside them would have no effect."""
    monkeypatch.setattr(planning_dims, "normed_experts", lambda _: True)
    hf_config = AutoConfig.for_model("qwen3_moe", **SIZES | {"hidden_size": 48}, num_experts=EXPERTS)
    with pytest.raises(ConfigError, match=r"'experts': experts of m get no adapters"):
        check_lora(ModelConfig(path="m", lora_rank=2, lora_targets=["experts"]), ModelDims.from_config(hf_config))


def test_work_counts_the_adapters_of_active_experts_alone(folders):
    """A product in the forward, and two in the backward: of the gradient of its input, and its own."""
    rows, active = 5 + 3 + 4, 3
    work = flops.flat_work(5, [3, 4])
    found = []
    for targets in (["experts"], ["q_proj"]):
        config = Config(model=config_of(folders["qwen3_moe"], targets))
        learner: Any = SimpleNamespace(config=config, dims=ModelDims.from_config(load_hf_config(config.model)))
        found.append(work_flops(learner, work))
    elements = RANK * active * ((32 + 48) + (24 + 32)) - RANK * (32 + 32)
    assert found[0] - found[1] == 3 * 2 * rows * elements


def test_the_plan_counts_all_adapters_but_the_work_of_active_ones(folders):
    config = Config(model=config_of(folders["qwen3_moe"], ["experts"]))
    sizes, one = ModelDims.from_config(load_hf_config(config.model)), RANK * ((32 + 48) + (24 + 32))
    completions = [config.max_sampled_tokens] * config.rollout.group_size
    group = flops.update_flops(sizes, config.data.max_prompt_tokens, completions, adapters=3 * one)
    text = plan_text(config)
    assert f"LoRA trains {EXPERTS * one:,} beside them" in text
    assert f"work          {config.rollout.prompts_per_step * group / 1e12:,.3g} TFLOP" in text
