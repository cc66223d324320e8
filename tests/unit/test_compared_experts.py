"""How often the engine chooses other experts than the policy: what the canary says of it, and who may ask."""

import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from making import asked_of_vllm
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from pgrpo.admission.compare import reference_logprobs, tokens_as_groups
from pgrpo.config import Config, ConfigError, ModelConfig, RolloutConfig
from pgrpo.distributed.world import World
from pgrpo.model.families.expert_products import recorded_choices
from pgrpo.model.lora import add_adapters
from pgrpo.model.policy import Policy, load_model
from pgrpo.model.recompute import set_up_layers
from pgrpo.model.weights import full_weights
from pgrpo.planning.dims import ModelDims, decoder_layers
from pgrpo.rollout.vllm import start
from pgrpo.rollout.vllm.canary import CanaryError
from pgrpo.rollout.vllm.engine import EngineError, VLLMEngine
from pgrpo.rollout.vllm.scores import Scores
from pgrpo.rollout.vllm.sharing import Sharers
from pgrpo.training import engine
from pgrpo.training.engine import Canary, _cannot_compare_experts, check_engine
from pgrpo.training.long_samples import set_up_long_samples
from pgrpo.types import Recompute, Sample

FAKES = Path(__file__).resolve().parents[1] / "fakes"
WORLD = World(0, 1, torch.device("cpu"))
EXPERTS, DENSE = 8, 1


@pytest.fixture
def policy(tmp_path):
    """Three layers; the second has no experts."""
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=40, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=EXPERTS, num_experts_per_tok=2,
        mlp_only_layers=[DENSE], initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    return Policy(load_model(ModelConfig(path=str(tmp_path / "model"))))


class Untouched:
    """An engine that is transformers' own model, sample by sample: given what a push carries, it says what its routers choose.
    ``change`` is done to the choices [R, layers, 2] of a sample."""

    def __init__(self, policy, folder, change=lambda choices: choices):
        policy.model.config.save_pretrained(folder)
        save_file(dict(full_weights(policy.model, torch.float32)), folder / "model.safetensors")
        self.model, self.change = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"), change

    @torch.no_grad()
    def score(self, samples):
        rows = []
        for sample in samples:
            found, hooks = {}, []
            for i, layer in enumerate(self.model.model.layers):
                if i != DENSE:
                    keep = partial(lambda i, found, *out: found.update({i: out[2][2]}), i, found)
                    hooks.append(layer.mlp.gate.register_forward_hook(keep))
            self.model(torch.tensor([sample.prompt_ids + sample.token_ids]))
            for hook in hooks:
                hook.remove()
            found[DENSE] = torch.zeros_like(found[0])
            first = len(sample.prompt_ids) - 1
            choices = torch.stack([found[i] for i in range(3)], 1)[first:-1].numpy()
            rows += list(self.change(choices.astype(np.uint8)))
        return Scores(reference_logprobs(self.model, samples).tolist(), rows)


def in_parts(policy, chunks):
    """The policy with its MLPs computed in so many parts of the rows."""
    layers = decoder_layers(policy.model)
    recompute: list[Recompute] = ["full"] * len(layers)
    set_up_layers(layers, recompute, compiled=False)
    set_up_long_samples(layers, recompute, chunks)
    return policy


def looked(policy, sampler, compare_experts=True):
    generator = torch.Generator().manual_seed(0)

    def ids(n):
        return torch.randint(2, 40, (n,), generator=generator).tolist()

    groups = tokens_as_groups([ids(6) for _ in range(8)], [[ids(5), ids(3)] for _ in range(8)])
    canary = Canary(WORLD, policy, sampler, every=1, most_tokens=4, compare_experts=compare_experts)
    canary.before_update(0, groups)
    canary.after_update()
    return canary.look()


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_sampler_with_the_same_weights_chooses_the_same_experts(chunks, policy, tmp_path):
    assert looked(in_parts(policy, chunks), Untouched(policy, tmp_path))["canary/expert_difference"] == 0.0


def test_a_push_with_adapters_beside_experts_makes_the_sampler_choose_as_the_policy_does(policy, tmp_path):
    model = policy.model
    add_adapters(model, ModelConfig(path=str(tmp_path / "model"), lora_rank=3, lora_targets=["experts"]), seed=0)
    initial = Untouched(policy, tmp_path)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    with pytest.raises(CanaryError, match="vLLM computes another function"):  # a push without the adapters
        looked(policy, initial)
    assert looked(policy, Untouched(policy, tmp_path))["canary/expert_difference"] == 0.0


@pytest.mark.parametrize("chunks", [1, 3])
def test_nothing_is_recorded_unless_it_is_compared(chunks, policy, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("experts were recorded")

    monkeypatch.setattr(engine, "recorded_choices", refuse)

    class Logprobs(Untouched):
        def score(self, samples):
            return Scores(super().score(samples).logprobs)

    found = looked(in_parts(policy, chunks), Logprobs(policy, tmp_path), compare_experts=False)
    assert found["canary/logp_difference"] < 1e-4 and "canary/expert_difference" not in found


def test_choices_of_some_of_the_rows_are_refused(policy, tmp_path, monkeypatch):
    @contextmanager
    def of_half_the_rows():
        found = []
        with recorded_choices() as choices:
            yield found
        found += [(module, experts[::2]) for module, experts in choices]

    monkeypatch.setattr(engine, "recorded_choices", of_half_the_rows)
    with pytest.raises(RuntimeError, match=r"^the canary saw experts of \d+ rows of a batch of \d+"):
        looked(policy, Untouched(policy, tmp_path))


@pytest.mark.parametrize("chunks", [1, 3])
def test_other_choices_are_counted_whatever_their_order(chunks, policy, tmp_path):
    def change(choices):
        changed = choices[:, :, ::-1].copy()  # the same experts in another order
        others = [next(x for x in range(EXPERTS) if x not in row[2]) for row in choices]
        changed[:, 2, 0] = others  # one of two choices, in one of two layers with experts
        changed[:, DENSE] = 99
        return changed

    assert looked(in_parts(policy, chunks), Untouched(policy, tmp_path, change))[
        "canary/expert_difference"
    ] == pytest.approx(0.25)


@pytest.mark.parametrize("release", ["together", "apart", "a row short", "none"])
def test_the_engine_gives_the_choices_of_the_rows_that_predict_completions(release):
    """vLLM 0.32 gives those of a prompt and of all sampled tokens but the last together; releases before it, the prompt's apart."""
    engine: Any = VLLMEngine.__new__(VLLMEngine)
    engine.is_awake, engine.sharers, engine.compares_experts = True, Sharers(WORLD, 1), True

    def run(asked, seed, take):
        for i, (given, _) in enumerate(asked):
            prompt = given["prompt_token_ids"]
            logprobs = [None, *({t: SimpleNamespace(logprob=-t)} for t in prompt[1:])]
            choices = np.array(prompt, dtype=np.uint8)[:, None, None]  # of each row, what it reads
            given = SimpleNamespace(prompt_logprobs=logprobs, outputs=[SimpleNamespace(routed_experts=choices)])
            if release == "apart":
                given.prompt_routed_experts, given.outputs[0].routed_experts = choices, choices[:0]
            elif release != "together":
                given.outputs[0].routed_experts = choices[1:] if release == "a row short" else None
            take(i, given)

    engine.requests = SimpleNamespace(run=run)
    samples = [Sample([7, 8], [9, 10], [True] * 2, [0.0] * 2), Sample([3], [4], [True], [0.0])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "package", lambda: SimpleNamespace(SamplingParams=dict))
        if release in ("a row short", "none"):
            with pytest.raises(
                EngineError, match=r"experts of \d rows of a prompt of 4: set rollout\.compare_experts=false"
            ):
                engine.score(samples)
            return
        scores = engine.score(samples)
        engine.compares_experts = False
        assert engine.score(samples) == Scores([-9, -10, -4], None)
    assert scores.logprobs == [-9, -10, -4] and [x.item() for x in scores.experts] == [8, 9, 3]


@pytest.mark.parametrize("compares", [True, False])
def test_vllm_is_asked_for_its_choices_only_if_they_are_compared(compares, monkeypatch):
    config = Config(model=ModelConfig(path="m"), rollout=RolloutConfig(engine="vllm", compare_experts=compares))
    asked = asked_of_vllm(monkeypatch, config)
    assert asked.get("enable_return_routed_experts", False) is compares


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("qwen3", {}, "m has no experts that transformers stacks"),
        ("qwen3_moe", {"canary_every": 0}, r"the canary compares them, and rollout\.canary_every=0 is off"),
        ("qwen3_moe", {"engine": "embedded"}, "True has no effect on the embedded engine"),
        ("qwen3_moe", {}, "vLLM does not tell its choices on a CPU"),
    ],
)
def test_who_cannot_compare_is_told_why(kind, changes, reason, monkeypatch):
    monkeypatch.syspath_prepend(FAKES)
    dims = ModelDims.from_config(AutoConfig.for_model(kind, num_hidden_layers=1))
    config = Config(model=ModelConfig(path="m"))
    config.rollout = RolloutConfig(**{"engine": "vllm", "compare_experts": True, **changes})
    try:
        with pytest.raises(ConfigError, match=rf"^rollout\.compare_experts: .*{reason}"):
            check_engine(config, dims, WORLD)
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
            del sys.modules[name]
    if not changes and kind == "qwen3_moe":
        assert not _cannot_compare_experts(config, dims, World(0, 1, torch.device("cuda")))
