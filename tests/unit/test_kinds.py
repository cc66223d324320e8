"""Models with windows, sinks, experts and states through whole runs: resume, LoRA, export, what a push carries, the canary."""

import json
import runpy
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_kept import count_kept
from test_resume import assert_equal_checkpoints, metrics, train
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from pgrpo import checkpoint
from pgrpo.admission.compare import reference_logprobs, tokens_as_groups
from pgrpo.admission.models import check_model
from pgrpo.commands.export import export
from pgrpo.config import ConfigError, ModelConfig
from pgrpo.distributed.world import World
from pgrpo.model.families import experts
from pgrpo.model.policy import Policy, load_model
from pgrpo.model.weights import full_weights, weight_names
from pgrpo.packing import balance
from pgrpo.packing.batch import build_batch
from pgrpo.packing.forest import Forest
from pgrpo.rollout.vllm.canary import CanaryError
from pgrpo.rollout.vllm.scores import Scores
from pgrpo.training.engine import Canary

SCRIPT = runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "make_tiny_model.py"))
KINDS = ["gemma3_text", "gpt_oss", "qwen3_5_text", "qwen3_moe"]


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    SCRIPT["make_model"](kind=request.param).save_pretrained(folder)
    SCRIPT["make_tokenizer"]().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_run_is_resumed_bit_for_bit_and_its_export_is_what_a_push_carries(folder, lora_rank, tmp_path, monkeypatch):
    """Prompts are kept for several passes, by the policy and by the reference. With LoRA, mixtures have adapters beside experts."""
    monkeypatch.setattr(balance, "KEEP_NS", 0.0)
    kept = count_kept(monkeypatch)
    changes = {"steps": 2, "checkpoint.every": 1, "optim.lr": 1e-2, "model.lora_rank": lora_rank, "loss.kl_coef": 0.1}
    changes |= {"train.token_budget": 20}
    if lora_rank and folder.name.startswith(("gpt_oss", "qwen3_moe")):
        changes["model.lora_targets"] = "[q_proj,experts]"
    run = train(folder, tmp_path / "run", **changes)
    assert len(kept) >= 4
    said, kind = (run / "log.txt").read_text(), folder.name
    if "model.lora_targets" in changes:
        saved, _ = checkpoint.load(run / "checkpoints" / "step_2")
        moved = [
            name
            for name, value in saved["model"].items()
            if ".experts.lora_" in name and "lora_B" in name and value.any()
        ]
        assert len(moved) == 2 * 2
    assert ("layers with a state: by transformers' functions in PyTorch" in said) == kind.startswith("qwen3_5_text")
    assert ("experts, 2 for a token" in said) == kind.startswith(("gpt_oss", "qwen3_moe"))
    (run / "checkpoints" / "step_2").rename(tmp_path / "step_2")  # as if the run had stopped after step 1
    before = metrics(run)
    train(folder, run, resume="auto", **changes)
    assert_equal_checkpoints(tmp_path / "step_2", run / "checkpoints" / "step_2")
    assert metrics(run) == before and all(row["grad_norm"] > 0 for row in before)
    assert before[1]["sampling/sampling_logp_difference/max"] < 1e-4  # the engine samples with the same weights
    out = export(run, tmp_path / "out")
    model = load_model(ModelConfig(path=str(out)))
    exported = load_file(out / "model.safetensors")
    assert {name for name in exported if name != "lm_head.weight"} == weight_names(model)
    pushed = dict(full_weights(model, torch.float32))
    assert pushed.keys() == weight_names(model)
    for name, tensor in pushed.items():
        assert torch.equal(tensor, exported[name]), name
    (prompts,) = tokens_as_groups([[3, 5, 12, 4, 13]], [[[3, 4], [7, 7, 1]]])
    untouched = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    got = Policy(model)(build_batch(Forest.of(prompts.samples))).logprobs
    assert (got - reference_logprobs(untouched, prompts.samples)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_5_moe"])
def test_the_language_model_of_a_published_checkpoint_trains_under_its_names(kind, tmp_path):
    """Qwen3.5 is published with a vision tower, which a run on text leaves out."""
    text = SCRIPT["make_model"](kind="qwen3_5_text").config.to_dict() | {"model_type": f"{kind}_text"}
    text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "tie_word_embeddings": False}
    text["vocab_size"] = 16  # the tokenizer of this type has a token more
    tower = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 4}
    tower["out_hidden_size"] = text["hidden_size"]
    config = AutoConfig.for_model(kind, text_config=text, vision_config=tower, tie_word_embeddings=False)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "model")
    SCRIPT["make_tokenizer"]().save_pretrained(tmp_path / "model")
    published = load_file(tmp_path / "model" / "model.safetensors")
    of_text = {name for name in published if "visual" not in name}
    assert len(published) > len(of_text) and "model.language_model.embed_tokens.weight" in of_text
    model = load_model(ModelConfig(path=str(tmp_path / "model")))
    pushed = dict(full_weights(model, torch.float32))
    assert pushed.keys() == weight_names(model) == of_text
    assert all(torch.equal(tensor, published[name]) for name, tensor in pushed.items())
    run = train(tmp_path / "model", tmp_path / "run", steps=4, **{"optim.lr": 1e-2})
    assert any(row.get("grad_norm", 0.0) > 0 for row in metrics(run))
    out = export(run, tmp_path / "out")  # a language model alone, whose names need no prefix
    exported = load_file(out / "model.safetensors")
    assert exported.keys() == {name.replace("model.language_model.", "model.") for name in of_text}
    name = "layers.0.linear_attn.in_proj_qkv.weight"
    assert not torch.equal(exported[f"model.{name}"], published[f"model.language_model.{name}"])
    assert json.loads((out / "config.json").read_text())["architectures"] == [type(model).__name__]
    again = dict(full_weights(load_model(ModelConfig(path=str(out))), torch.float32))
    assert all(torch.equal(again[name], tensor) for name, tensor in exported.items())


class Pushed:
    """An engine that computes what it was given: a checkpoint of the tensors of a push, loaded into the untouched model."""

    def __init__(self, folder, policy):
        self.folder, self.policy = folder, policy
        policy.model.config.save_pretrained(folder)

    def push(self):
        save_file(dict(full_weights(self.policy.model, torch.float32)), self.folder / "model.safetensors")
        self.model = AutoModelForCausalLM.from_pretrained(self.folder, attn_implementation="eager")

    @torch.no_grad()
    def score(self, samples):
        return Scores(reference_logprobs(self.model, samples).tolist())


def test_the_canary_knows_new_weights_from_old(folder, tmp_path):
    policy = Policy(load_model(ModelConfig(path=str(folder))))
    generator = torch.Generator().manual_seed(0)

    def ids(n):
        return torch.randint(2, 14, (n,), generator=generator).tolist()

    groups = tokens_as_groups([ids(6) for _ in range(10)], [[ids(4) for _ in range(3)] for _ in range(10)])
    world, engine = World(0, 1, torch.device("cpu")), Pushed(tmp_path, policy)
    canary = Canary(world, policy, engine, every=1, most_tokens=4, compare_experts=False)

    def update():
        canary.before_update(0, groups)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        canary.after_update()

    update()
    engine.push()
    found = canary.look()
    assert abs(found["canary/slope"]) < 0.01 and found["canary/logp_difference"] < 1e-4
    update()
    with pytest.raises(CanaryError, match="still samples with the weights from before"):
        canary.look()


def test_what_is_said_of_experts_and_of_heads_that_are_not_trained():
    make = partial(SCRIPT["make_model"], kind="qwen3_moe")
    assert "4 experts, 2 for a token, computed in grouped products" in experts.experts_text(Policy(make()).model)
    assert experts.experts_text(SCRIPT["make_model"]()) == ""
    config = SCRIPT["make_model"](kind="qwen3_5_text").config
    assert experts.untrained_text(config) == ""
    config.mtp_num_hidden_layers = 1
    assert "multi-token prediction (1 layers) are not loaded, trained or exported" in experts.untrained_text(config)


def test_a_load_balancing_term_is_refused():
    config = SCRIPT["make_model"](kind="qwen3_moe").config
    for coefficient in (
        0.001,
        0.02,
    ):  # as published, of Qwen3-30B-A3B and Mixtral-8x7B: without the router's logits no term
        config.output_router_logits, config.router_aux_loss_coef = False, coefficient
        assert experts.balance_refusal(config) == ""
    config.output_router_logits, config.router_aux_loss_coef = True, 0.0
    assert experts.balance_refusal(config) == ""
    config.router_aux_loss_coef = 0.01
    with pytest.raises(
        ConfigError, match=r"^model\.path=m: output_router_logits=true with router_aux_loss_coef=0\.01: no load"
    ):
        check_model("m", config, 64)
