"""The proof at load: it finds models exact, sees what is wrong, and keeps what it found."""

import json
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, Gemma2Config, Llama4ForCausalLM

from pgrpo.admission import models as admission
from pgrpo.admission import proof as proving
from pgrpo.admission.compare import untouched_model
from pgrpo.admission.models import check_model
from pgrpo.admission.proof import proof_samples, prove
from pgrpo.admission.shrink import Small, shrink
from pgrpo.attention.hook import ATTENTION_NAME, attention_forward
from pgrpo.config import ConfigError
from pgrpo.model.policy import Policy

MECHANISMS = {
    "llama": "shared keys",
    "gemma2": "windows beside full layers, soft-capped scores and logits",
    "gemma3_text": "norms of heads, two kinds of RoPE",
    "gpt_oss": "sinks, a mixture of experts",
    "cohere2": "a scale of logits, layers without positions",
    "mistral": "a window in every layer",
    "deepseek_v3": "latent attention, values smaller than keys",
    "phi": "a bias of the head, half of each head with RoPE",
    "nemotron": "keywords that layers do not hand down",
    "gpt2": "learned positions",
    "qwen3_5_text": "linear attention",
    "qwen3_next": "linear attention, experts",
    "olmo_hybrid": "linear attention with negative eigenvalues",
    "lfm3": "short convolutions of width 7",
    "beam": "soft-capped logits that are asked for in float32",
}


@pytest.mark.parametrize("model_type", MECHANISMS)
def test_a_model_of_each_mechanism_is_exact_and_seeded_bugs_are_seen(model_type):
    began = time.thread_time()
    proof = prove(AutoConfig.for_model(model_type))
    assert time.thread_time() - began < 10  # seconds of one core, whatever else the machine does
    assert proof.refusal == ""
    assert proof.logprob < 1e-11 and proof.gradient < 1e-11
    assert len(proof.bugs) >= 3 and min(proof.bugs.values()) > 1e-2
    assert proof.not_kept == ""


def test_a_prefix_is_not_kept_where_log_probs_behind_it_are_others(monkeypatch):
    """Seeded: a layer that keeps nothing of its inputs, and one that attends twice. The model itself is exact all the same."""
    keep = Policy.keep

    def without_a_state(self, batch):
        last = keep(self, batch)
        self.kept = self.kept._replace(fronts=[[torch.zeros_like(x) for x in front] for front in self.kept.fronts])
        return last

    with monkeypatch.context() as patch:
        patch.setattr(Policy, "keep", without_a_state)
        proof = prove(AutoConfig.for_model("qwen3_5_text"))
    assert re.fullmatch(r"log-probs behind a kept prefix differ by \d\.\de[+-]\d\d nats", proof.not_kept)
    assert proof.refusal == "" and proof.logprob < 1e-11

    def twice(*args, **kwargs):
        attention_forward(*args, **kwargs)
        return attention_forward(*args, **kwargs)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(proving, "attention_forward", twice)
            proof = prove(AutoConfig.for_model("qwen3"))
    finally:
        AttentionInterface.register(ATTENTION_NAME, attention_forward)
    assert proof.not_kept == "layers do not each call attention once, or have one state" and proof.refusal == ""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (IndexError("of a kept beginning\nand more"), "IndexError: of a kept beginning"),
        (AssertionError(), "AssertionError: "),
        (RuntimeError(), "RuntimeError: "),
        (RuntimeError("layers attend twice"), "layers attend twice"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else None,
)
def test_a_model_whose_prefixes_cannot_be_kept_is_trained_without(error, reason, monkeypatch):
    def keep(*_):
        raise error

    monkeypatch.setattr(Policy, "keep", keep)
    proof = prove(AutoConfig.for_model("llama"))
    assert proof.refusal == "" and proof.not_kept == reason and len(proof.bugs) >= 3 and proof.logprob < 1e-11


@pytest.mark.parametrize(
    ("softcap", "has_sdpa", "wanted"), [(None, True, "sdpa"), (50.0, True, "eager"), (None, False, "eager")]
)
def test_the_untouched_model_computes_all_of_its_attention(softcap, has_sdpa, wanted):
    """sdpa has no soft-capping; some releases of transformers leave it out there without a word."""

    def make(attention) -> Any:
        if attention == "sdpa" and not has_sdpa:
            raise ValueError("no sdpa")
        text = Gemma2Config(attn_logit_softcapping=softcap)
        return SimpleNamespace(config=text, attention=attention)

    made: Any = untouched_model(make)
    assert made.attention == wanted


def test_the_time_limit_ends_a_proof_also_while_a_prefix_is_kept(monkeypatch):
    monkeypatch.setattr(Policy, "keep", lambda *_: time.sleep(60))
    monkeypatch.setattr(proving, "MOST_SECONDS", 4.0)
    assert "took longer than 4 s" in prove(AutoConfig.for_model("llama")).refusal


def test_every_length_lies_inside_the_proofs_samples_unless_no_sample_of_the_run_reaches_it():
    samples = [s.prompt_ids + s.token_ids for s in proof_samples(64)]
    shortest, longest = min(map(len, samples)), max(map(len, samples))
    config = AutoConfig.for_model("gemma3_text", sliding_window=512)
    assert shortest - 1 <= shrink(config, max_sample=513).sliding_window < longest
    assert shrink(config, max_sample=512).sliding_window > longest
    phi = AutoConfig.for_model("phi3", original_max_position_embeddings=4096)
    assert shortest < shrink(phi, max_sample=4097).original_max_position_embeddings < longest
    assert shrink(phi, max_sample=4096).original_max_position_embeddings > longest
    llama = AutoConfig.for_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    assert shortest < shrink(llama).max_position_embeddings < longest


def test_a_layer_of_every_kind_stays():
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    small = shrink(AutoConfig.for_model("gemma3_text", num_hidden_layers=12, layer_types=kinds * 2))
    assert (small.num_hidden_layers, small.layer_types) == (2, ["sliding_attention", "full_attention"])
    small = shrink(AutoConfig.for_model("deepseek_v3", num_hidden_layers=8, first_k_dense_replace=3))
    assert small.first_k_dense_replace == 1 < small.num_hidden_layers
    small = shrink(AutoConfig.for_model("smollm3", num_hidden_layers=8, no_rope_layers=[1, 1, 1, 0] * 2))
    assert sorted(small.no_rope_layers) == [0, 1]


@pytest.mark.parametrize(("heads", "kv_heads", "wanted"), [(8, 8, 4), (8, 2, 2), (8, 1, 1)])
def test_heads_share_keys_as_before(heads, kv_heads, wanted):
    config = AutoConfig.for_model("llama", num_attention_heads=heads, num_key_value_heads=kv_heads)
    assert shrink(config).num_key_value_heads == wanted
    assert shrink(config, small=Small(heads=8)).num_attention_heads == 8


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM

class RemoteConfig(LlamaConfig):
    model_type = "remote"

class RemoteModel(LlamaForCausalLM):
    config_class = RemoteConfig

    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids, **kwargs)
        output.logits = output.logits * {factor}
        return output
"""


@pytest.mark.parametrize(
    ("factor", "refusal"),
    [
        ("1.5", ""),
        ("(1 + 0 * self.model.layers[0].mlp.up_proj.weight.sum())", ""),
        ("input_ids.shape[1]", "hidden states are equal"),
    ],
)
def test_a_model_with_code_of_its_own_is_proven_alike(factor, refusal, tmp_path, monkeypatch):
    (tmp_path / "modeling_remote.py").write_text(REMOTE.format(factor=factor))
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    names = {"AutoConfig": "modeling_remote.RemoteConfig", "AutoModelForCausalLM": "modeling_remote.RemoteModel"}
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"auto_map": names, "model_type": "remote"}))
    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    proof = prove(config)
    assert refusal in proof.refusal and bool(refusal) == bool(proof.refusal)


@pytest.fixture
def proofs(tmp_path, monkeypatch):
    """Counts proofs; the folder that keeps them is new, and so is the process's memory of them."""
    made: list[str] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(admission, "_proven", {})

    def counted(config, max_sample):
        made.append(config.model_type)
        return prove(config, max_sample)

    monkeypatch.setattr(admission, "prove", counted)
    return made


def test_a_proof_is_kept_until_something_that_it_depends_on_changes(proofs, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    config = AutoConfig.for_model("llama", num_hidden_layers=3)
    first = check_model("m", config, 64)
    assert "exact on a small copy of this model: log-probs differ by" in caplog.text
    assert check_model("m", AutoConfig.for_model("llama", num_hidden_layers=3, hidden_size=2048), 64) == first
    monkeypatch.setattr(admission, "_proven", {})
    caplog.clear()
    assert check_model("m", config, 64) == first, "another process reads the file"
    assert proofs == ["llama"] and str(first) in caplog.text
    check_model("m", AutoConfig.for_model("llama", num_hidden_layers=5), 64)  # its code may know of the fourth layer
    check_model("m", config, 80)  # and of 64 tokens
    check_model("m", AutoConfig.for_model("llama", attention_bias=True), 64)
    monkeypatch.setattr(admission.transformers, "__version__", "9.9")
    check_model("m", config, 64)
    monkeypatch.setattr(admission, "_proven", {})
    shutil.rmtree(tmp_path / "pgrpo")
    check_model("m", config, 64)
    assert proofs == ["llama"] * 6
    for file in Path(tmp_path).rglob("*.json"):
        file.write_text("{damaged")
    monkeypatch.setattr(admission, "_proven", {})
    assert check_model("m", config, 64).refusal == ""


def test_a_refusal_is_not_kept(proofs, tmp_path):
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"model\.path=m: grouped attention is not proven on this mamba model"):
            check_model("m", AutoConfig.for_model("mamba"), 64)
    assert not list(Path(tmp_path).rglob("*.json"))


def test_the_proof_leaves_random_numbers_and_defaults_alone():
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    prove(AutoConfig.for_model("llama"))
    assert torch.equal(state, torch.get_rng_state()) and torch.get_default_dtype() == dtype
    model = AutoModelForCausalLM.from_config(shrink(AutoConfig.for_model("llama")))
    assert model(torch.tensor([[1, 2]])).logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("model_type", "refusal"),
    [
        ("phi4_multimodal", r"more than 10,000,000 parameters: audio_config\.hidden_size=1024 of its config was not"),
        (
            "blt",
            r"with Embedding\.weight of \[3000012, 64\] it has more than 10,000,000 parameters: a size in its code was not",
        ),
        ("rwkv", r"more than 10,000,000 parameters: hidden_size=4096 of its config was not made smaller"),
        ("phimoe", r"differs by \d\.\de-01 nats from one call to the next: in training it is random"),
    ],
)
def test_why_a_type_is_refused(model_type, refusal):
    proof = prove(AutoConfig.for_model(model_type))
    assert re.search(refusal, proof.refusal) and proof.seconds < 20


def test_a_model_that_differs_alike_in_every_call_is_not_called_random():
    proof = prove(AutoConfig.for_model("minimax"))
    assert "log-probs differ" in proof.refusal and "itself differs" not in proof.refusal


def test_chunked_attention_is_refused_where_a_sample_is_longer_than_a_chunk(monkeypatch):
    """transformers' Llama 4 names a decoder that it does not have; with the right name chunks (8,192 tokens) are what is wrong."""
    config = AutoConfig.for_model("llama4_text")
    assert "its head is not computed from what its base_model returns" in prove(config).refusal
    monkeypatch.setattr(Llama4ForCausalLM, "base_model_prefix", "model")
    found = re.match(r"log-probs differ from the untouched model's by (\S+) nats.*self_attn", prove(config).refusal)
    assert found and float(found[1]) > 0.1
    assert prove(config, max_sample=1000).refusal == ""
