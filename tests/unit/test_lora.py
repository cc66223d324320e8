"""LoRA against peft on the untouched transformers model, and what a run trains, keeps, saves and exports."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from pgrpo import checkpoint
from pgrpo.admission.compare import gradients, reference_logprobs, tokens_as_samples
from pgrpo.admission.fits import check_lora
from pgrpo.checkpoint import CheckpointError
from pgrpo.commands.evaluate import evaluate
from pgrpo.commands.export import export
from pgrpo.commands.plan import plan
from pgrpo.config import Config, ConfigError, ModelConfig, load_config, to_yaml
from pgrpo.distributed.fsdp import place, reshard
from pgrpo.distributed.world import start
from pgrpo.grpo import grpo_step
from pgrpo.model.lora import adapters_off, add_adapters, merge_adapters
from pgrpo.model.policy import Policy, load_model
from pgrpo.packing.batch import build_batch
from pgrpo.packing.forest import Forest
from pgrpo.planning.flops import ModelDims
from pgrpo.training.build import Parts, build
from pgrpo.training.caller import Given
from pgrpo.training.checkpointing import Checkpoints, _model_of
from pgrpo.training.place import place_policy
from pgrpo.training.progress import Progress

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.2, "tie_word_embeddings": True,
}  # fmt: skip
RANK, ALPHA = 3, 12.0
TYPES = ("granite", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")


def whole(tensor):
    """Of all shards, without a gradient."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def make_model(model_type: str, path: Path) -> str:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **SMALL)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return str(path)


def perturb(model: torch.nn.Module) -> None:
    """New adapters change nothing; these do."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)


def adapted_policy(path: str, targets: list[str], dtype: torch.dtype = torch.float64) -> Policy:
    config = ModelConfig(path=path, lora_rank=RANK, lora_alpha=ALPHA, lora_targets=targets)
    model = load_model(config, dtype=dtype)
    add_adapters(model, config, seed=0)
    perturb(model)
    return Policy(model)


def adapters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """By the names that they have in a model without a wrapper."""
    named = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters()}
    return {name: p for name, p in named.items() if p.requires_grad}


def untouched(path: str, policy: Policy, targets: list[str]) -> tuple[peft.PeftModel, torch.nn.Module]:
    """peft's own wrapper on the model as transformers loads it, with the policy's adapters; and the model inside."""
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="sdpa")
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets or "all-linear")  # pyright: ignore[reportArgumentType]
    wrapped = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    own, given = adapters(wrapped), adapters(policy.model)
    assert list(own) == list(given)
    for name, parameter in own.items():
        parameter.data.copy_(given[name].data)
    return wrapped, base  # pyright: ignore[reportReturnType]


def samples():
    generator = torch.Generator().manual_seed(1)

    def ids(n: int) -> list[int]:
        return torch.randint(3, 61, (n,), generator=generator).tolist()

    return tokens_as_samples([ids(9), ids(1)], [[ids(3), ids(5), ids(0), ids(1)], [ids(7), ids(2)]])


@pytest.mark.parametrize("targets", [[], ["o_proj", "down_proj"]], ids=["all", "two"])
@pytest.mark.parametrize("model_type", TYPES)
def test_float64_equals_peft_on_the_untouched_model(model_type, targets, tmp_path):
    path = make_model(model_type, tmp_path)
    policy = adapted_policy(path, targets)
    wrapped, base = untouched(path, policy, targets)
    wanted = reference_logprobs(base, samples())
    with wrapped.disable_adapter():
        assert (reference_logprobs(base, samples()) - wanted).abs().max() > 0.1
    got = policy(build_batch(Forest.of(samples()))).logprobs
    assert (got - wanted).abs().max() <= 1e-6
    for name, grad, want in zip(adapters(base), gradients(got, policy), gradients(wanted, base), strict=True):
        assert (grad - want).norm() <= 1e-5 * want.norm(), name
        assert want.norm() > 0, name


@pytest.mark.parametrize("targets", [[], ["qkv_proj"]], ids=["all", "one"])
def test_merged_weights_give_the_adapted_log_probs(targets, tmp_path):
    policy = adapted_policy(make_model("phi3", tmp_path), targets)
    wanted = policy(build_batch(Forest.of(samples()))).logprobs
    merge_adapters(policy.model)
    plain = AutoModelForCausalLM.from_config(policy.model.config, dtype=torch.float64, attn_implementation="sdpa")
    plain.load_state_dict(policy.model.state_dict(), strict=True)
    assert (reference_logprobs(plain, samples()) - wanted).abs().max() <= 1e-6


def test_without_adapters_is_the_initial_model_bit_for_bit(tmp_path):
    path = make_model("qwen3", tmp_path)
    policy, batch = adapted_policy(path, []), build_batch(Forest.of(samples()))
    before = policy(batch).logprobs
    initial = Policy(load_model(ModelConfig(path=path), dtype=torch.float64))
    with adapters_off(policy):
        assert torch.equal(policy(batch).logprobs, initial(batch).logprobs)
    assert torch.equal(policy(batch).logprobs, before)


def test_new_adapters_change_nothing_and_come_from_the_seed_alone(tmp_path):
    path = make_model("llama", tmp_path)
    made: dict[str, dict[str, torch.Tensor]] = {}
    for name, seed in (("one", 5), ("same", 5), ("other", 6)):
        config = ModelConfig(path=path, lora_rank=RANK)
        model = load_model(config)
        initial = Policy(model)(build_batch(Forest.of(samples()))).logprobs
        torch.rand(3)  # whatever was drawn before
        state = torch.get_rng_state()
        add_adapters(model, config, seed)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(Policy(model)(build_batch(Forest.of(samples()))).logprobs, initial)
        made[name] = {k: p.detach() for k, p in adapters(model).items()}
    assert all(torch.equal(p, made["same"][k]) for k, p in made["one"].items())
    assert not any(torch.equal(p, made["other"][k]) for k, p in made["one"].items() if "lora_A" in k)


def test_a_layer_that_is_not_there_and_a_missing_peft_are_refused(monkeypatch):
    dims = ModelDims.from_config(transformers.AutoConfig.for_model("phi3", **SMALL))
    config = ModelConfig(path="some/phi3", lora_rank=4, lora_targets=["o_proj", "q_proj"])
    wanted = (
        r"^model.lora_targets: 'q_proj' is no linear layer of some/phi3; it may be o_proj, qkv_proj, gate_up_proj, "
        "down_proj; an empty list means all linear layers$"
    )
    with pytest.raises(ConfigError, match=wanted):
        check_lora(config, dims)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^model.lora_rank=4: LoRA needs peft: pip install -e '\.\[lora\]'$"):
        check_lora(config, dims)
    check_lora(ModelConfig(path="some/phi3"), dims)


@pytest.fixture(scope="module")
def tiny(tiny_model) -> Path:
    return tiny_model


def digits(completions, **_):
    return [float(sum(c == "1" for c in text)) for text in completions]


def run_config(tiny: Path, run_dir: Path, **changes: Any) -> Config:
    keys = {
        "model.path": tiny, "run_dir": run_dir, "train.steps": 3, "rollout.prompts_per_step": 4, "rollout.group_size": 4,
        "model.lora_rank": 4, "optim.lr": 1e-2, "eval.every": 0, "eval.rows": 8, "track.console": "false", **changes,
    }  # fmt: skip
    return load_config("quickstart", [f"{key}={value}" for key, value in keys.items()])


def save(run_dir: Path, parts: Parts, progress: Progress) -> None:
    checkpoints = Checkpoints(run_dir / "checkpoints", parts.learner, parts.stream, progress)
    checkpoints.save({})
    checkpoints.wait()


def test_a_run_and_its_plan_refuse_a_wrong_layer_before_weights_are_read(tiny, tmp_path, monkeypatch):
    config = run_config(tiny, tmp_path, **{"model.lora_targets": "[lm_head]"})
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with start() as world, pytest.raises(ConfigError, match=r"model\.lora_targets: 'lm_head' is no linear layer"):
        build(config, world)
    with pytest.raises(ConfigError, match=r"model\.lora_targets: 'lm_head' is no linear layer"):
        plan(config)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_trains_saves_and_exports_adapters_on_frozen_weights(dtype, tiny, tmp_path):
    torch.set_num_threads(1)
    config = run_config(tiny, tmp_path, **{"model.dtype": dtype, "loss.kl_coef": 0.05})
    held = getattr(torch, dtype)
    initial = AutoModelForCausalLM.from_pretrained(tiny, dtype=held).state_dict()
    (tmp_path / "config.yaml").write_text(f"model: {{path: {tiny}, dtype: {dtype}, lora_rank: 4}}\n")
    with start() as world, build(config, world, Given([digits])) as parts:
        progress = Progress()
        steps = [grpo_step(parts, progress)[1] for _ in range(3)]
        progress.step = 3
        save(tmp_path, parts, progress)
        reshard(parts.policy)
        frozen = {n: whole(p) for n, p in parts.policy.model.named_parameters() if not p.requires_grad}
        assert frozen
        for name, weight in frozen.items():
            assert weight.dtype == held
            assert torch.equal(weight, initial[name.replace(".base_layer", "")]), name
        sample = tokens_as_samples([[4, 6, 12, 5]], [[[3, 4], [7, 7, 1]]])
        adapted = parts.policy(build_batch(Forest.of(sample))).logprobs.detach()
        with adapters_off(parts.policy):
            off = parts.policy(build_batch(Forest.of(sample))).logprobs.detach()
    assert steps[0]["kl"] == 0 < steps[1]["kl"] < steps[2]["kl"]
    # The engine samples with the adapters: its log-probs are the policy's after two updates.
    assert steps[2]["sampling/sampling_logp_difference/max"] < {"float32": 1e-4, "bfloat16": 0.05}[dtype]
    assert (adapted - off).abs().max() > 0.1
    saved, _ = checkpoint.load(tmp_path / "checkpoints" / "step_3")
    assert len(saved["model"]) == 2 * 2 * 7  # two matrices beside each of seven layers, twice
    assert all(".lora_" in name and t.dtype == torch.float32 for name, t in saved["model"].items())
    assert len(saved["optimizer"]) == 3 * len(saved["model"])

    exported = AutoModelForCausalLM.from_pretrained(export(tmp_path, tmp_path / "out"), attn_implementation="sdpa")
    for name, weight in exported.state_dict().items():
        base = initial[name].float()
        if (a := saved["model"].get(name.replace("weight", "lora_A.default.weight"))) is not None:
            base += 32.0 / 4 * saved["model"][name.replace("weight", "lora_B.default.weight")] @ a
        assert (weight - base).abs().max() <= 1e-6, name
    got = reference_logprobs(exported, sample)
    assert (got - adapted).abs().max() <= {"float32": 1e-5, "bfloat16": 0.05}[dtype]
    assert not list(tmp_path.glob("out/adapter*"))


def test_eval_reads_the_adapters_of_a_checkpoint_and_refuses_others(tiny, tmp_path):
    torch.set_num_threads(1)
    config = run_config(tiny, tmp_path)
    with start() as world, build(config, world, Given([digits])) as parts:
        for parameter in parts.policy.parameters():
            parameter.data += 0.3 * parameter.requires_grad  # so that it says something else than the model
        save(tmp_path, parts, Progress())
    folder = str(tmp_path / "checkpoints" / "step_0")
    plain, trained = evaluate(config), evaluate(config, folder)
    assert plain["eval/completions/mean_length"] != trained["eval/completions/mean_length"]
    for other, message in (
        ({"model.lora_rank": 8}, r"lora_rank: .*lora_A.* is \[4, 64\] in the checkpoint, \[8, 64\] here"),
        ({"model.lora_rank": 0}, r"of other model.lora_\* keys: .* are in one of the two only"),
        (
            {"model.lora_targets": "[q_proj]"},
            rf"of other model.lora_\* keys: .* only; set what its run had: model.path=\"{tiny}\", model.lora_rank=4$",
        ),
    ):
        with pytest.raises(CheckpointError, match=message):
            evaluate(run_config(tiny, tmp_path, **other), folder)
    (tmp_path / "config.yaml").write_text(f"model: {{path: {tiny}, lora_rank: 8}}\n")
    with pytest.raises(CheckpointError, match=r"these are not adapters of .*: .*size mismatch"):
        export(tmp_path, tmp_path / "out")
    (tmp_path / "config.yaml").write_text(f"model: {{path: {tiny}, lora_rank: 4, lora_targets: [q_proj]}}\n")
    with pytest.raises(CheckpointError, match="are not in both"):
        export(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_run_had_can_be_pasted_into_a_shell(tiny, tmp_path):
    its = run_config(tiny, tmp_path, **{"model.lora_targets": "[q_proj,v_proj]"})
    saved: Any = SimpleNamespace(scalars={"config": to_yaml(its)})
    keys = shlex.split(_model_of(saved).removeprefix("set what its run had: ").replace(", ", " "))
    assert load_config("quickstart", keys).model == its.model


def test_a_sharded_bfloat16_policy_computes_what_a_plain_bfloat16_copy_computes(tmp_path):
    path, batch = make_model("qwen3", tmp_path), build_batch(Forest.of(samples()))
    policy, plain = (adapted_policy(path, [], torch.bfloat16) for _ in range(2))
    for parameter in plain.parameters():  # RoPE's frequencies stay float32, which .to() would not leave so
        parameter.data = parameter.data.to(torch.bfloat16)
    wanted = plain(batch).logprobs
    with start() as world:
        place(policy, policy.model.base_model.layers, world, torch.bfloat16)  # pyright: ignore[reportArgumentType]
        logprobs = policy(batch).logprobs
        logprobs.sum().backward()
        got = {name: whole(p.grad) for name, p in policy.named_parameters() if p.grad is not None}
    assert torch.equal(logprobs, wanted)
    wanted.sum().backward()
    assert list(got) == [name for name, p in plain.named_parameters() if p.requires_grad]
    for name, p in plain.named_parameters():
        if p.grad is not None:
            assert got[name].dtype == torch.float32
            assert torch.equal(got[name], p.grad.float()), name


def test_a_frozen_model_takes_two_bytes_a_weight_in_bfloat16(tiny, tmp_path):
    with start() as world:
        policy = place_policy(run_config(tiny, tmp_path, **{"model.dtype": "bfloat16"}), world)
        sizes = [(p.requires_grad, p.element_size()) for p in policy.parameters()]
    assert set(sizes) == {(False, 2), (True, 4)}
