"""Models that come with code of their own are proven by what they compute: each is exact, or refused with a number and a place."""

import json
import re
import threading
import time
from pathlib import Path

import pytest
from transformers import AutoConfig

from pgrpo.admission import models as admission
from pgrpo.admission import proof as proving
from pgrpo.admission.models import check_model
from pgrpo.admission.reach import LONG
from pgrpo.config import ConfigError
from pgrpo.planning import hub

CONFIGURATION = """
from transformers import LlamaConfig

class CustomConfig(LlamaConfig):
    model_type = "custom"
"""
MODELING = """
import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama import modeling_llama as llama
from .configuration_custom import CustomConfig

class Decoder(llama.LlamaModel):
    counted = 0

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        {before}
        return super().forward(input_ids, attention_mask, position_ids, past_key_values, **kwargs)

class CustomModel(LlamaForCausalLM):
    config_class = CustomConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = Decoder(config)
        {init}
        self.post_init()

    def forward(self, input_ids=None, past_key_values=None, **kwargs):
        output = super().forward(input_ids, past_key_values=past_key_values, **kwargs)
        {after}
        return output

{more}
"""
LAYER = """
class Layer(nn.Module):
    def __init__(self, config, layer, index):
        super().__init__()
        self.config, self.layer, self.index = config, layer, index
        self.norm = nn.BatchNorm1d(config.hidden_size)

    def forward(self, hidden_states, **kwargs):
        config, index = self.config, self.index
        {body}
        return self.layer(hidden_states, **kwargs)
"""
IN_LAYERS = "self.model.layers = nn.ModuleList(Layer(config, layer, i) for i, layer in enumerate(self.model.layers))"


def write(folder: Path, *, layer="", values=None, init="", before="", after="", more="") -> None:
    (folder / "configuration_custom.py").write_text(CONFIGURATION)
    if layer:
        init, more = IN_LAYERS, LAYER.format(body=layer)
    parts = {"init": init or "pass", "before": before or "pass", "after": after or "pass", "more": more}
    (folder / "modeling_custom.py").write_text(MODELING.format(**parts))
    names = {"AutoConfig": "configuration_custom.CustomConfig", "AutoModelForCausalLM": "modeling_custom.CustomModel"}
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    sizes |= {"max_position_embeddings": 8192, "auto_map": names, "model_type": "custom"}
    (folder / "config.json").write_text(json.dumps(sizes | (values or {})))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(admission, "_proven", {})
    folder = tmp_path / re.sub(r"\W", "_", tmp_path.name)
    folder.mkdir()
    return folder


def config_of(folder: Path):
    return AutoConfig.from_pretrained(folder, trust_remote_code=True)


BEYOND = "hidden_states = hidden_states * (1 if hidden_states.shape[1] <= {length} else 1.5)"
OWN_ATTENTION = """
class Own(nn.Module):
    def __init__(self, old):
        super().__init__()
        self.old = old

    def forward(self, hidden_states, position_embeddings, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.old.head_dim)
        q, k, v = (getattr(self.old, n)(hidden_states).view(shape).transpose(1, 2) for n in ("q_proj", "k_proj", "v_proj"))
        q, k = llama.apply_rotary_pos_emb(q, k, *position_embeddings)
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.old.o_proj(out.transpose(1, 2).flatten(2)), None
"""
REFUSED = {
    "positions from the attention mask": (
        {
            "before": "position_ids = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).cumsum(-1) - 1"
        },
        r"log-probs differ .* hidden states part in",
    ),
    "a mean over the sequence": (
        {"layer": "hidden_states = hidden_states + hidden_states.mean(1, keepdim=True)"},
        r"log-probs differ .* hidden states part in model\.layers\.0",
    ),
    "a norm over rows": (
        {"layer": "hidden_states = self.norm(hidden_states.flatten(0, 1)).view_as(hidden_states)"},
        r"log-probs differ .* hidden states part in model\.layers\.0",
    ),
    "attention of its own": (
        {"init": "for layer in self.model.layers: layer.self_attn = Own(layer.self_attn)", "more": OWN_ATTENTION},
        r"does not call the hook .* log-probs differ",
    ),
    "attention of its own in one layer of many": (
        {
            "init": "self.model.layers[5:6] and setattr(self.model.layers[5], 'self_attn', Own(self.model.layers[5].self_attn))",
            "more": OWN_ATTENTION,
            "values": {"num_hidden_layers": 6},
        },
        r"log-probs differ .* in a copy with all of its 6 layers .* hidden states part in model\.layers\.5",
    ),
    "a layer that mixes rows by its number": (
        {
            "layer": "hidden_states = hidden_states * (1 + (hidden_states.mean() if index == 9 else 0))",
            "values": {"num_hidden_layers": 10},
        },
        r"in a copy with all of its 10 layers .* hidden states part in model\.layers\.9",
    ),
    "a length in its code": (
        {"layer": "hidden_states = hidden_states * (1 if hidden_states.shape[1] <= 1024 else 1.5)"},
        rf"in samples of {LONG} tokens",
    ),
    "a length of an unusual name": (
        {"layer": BEYOND.format(length="config.local_span"), "values": {"local_span": 4096}},
        r"log-probs differ .* hidden states part in model\.layers\.0",
    ),
    "windows in a list of layers": (
        {"layer": BEYOND.format(length="config.windows[index]"), "values": {"windows": [4096, 4096]}},
        r"log-probs differ .* hidden states part in model\.layers\.0",
    ),
    "noise": (
        {"layer": "hidden_states = hidden_states + 0.01 * torch.randn_like(hidden_states)"},
        r"log-probs differ .* untouched model itself differs by \d\.\de-0[1-3] nats .*: in training it is random",
    ),
    "a scale of logits by calls": (
        {"before": "self.counted += 1", "after": "output.logits = output.logits * (1 + 0.01 * self.model.counted)"},
        r"log-probs differ .* hidden states are equal; the untouched model itself differs by .* changes with each call",
    ),
    "a size of an unknown name": (
        {
            "init": "self.table = nn.Linear(config.tower['rows'], 2500, bias=False)",
            "values": {"tower": {"rows": 4001}},
        },
        r"not small: with Linear\.weight of \[2500, 4001\] it has more than 10,000,000 parameters: tower\.rows=4001 of its config "
        "was not made smaller",
    ),
    "a size in its code": (
        {"init": "self.table = nn.Parameter(torch.empty(10**4, 10**4))"},
        r"with CustomModel\.table of \[10000, 10000\] .* a size in its code was not made smaller",
    ),
    "a path for caches only": (
        {"before": "assert past_key_values is not None, 'no cache'"},
        r"a small copy of it does not run: AssertionError: no cache",
    ),
    "a word that attention does not know": (
        {"before": "kwargs['bias_of_positions'] = 1.0"},
        r"UnsupportedAttentionError: attention with 'bias_of_positions' is not supported",
    ),
}
EXACT = {
    "a constant in a layer": {"layer": "hidden_states = hidden_states * 1.5"},
    "logits with a soft cap": {"after": "output.logits = 3 * torch.tanh(output.logits / 3)"},
    "a length that no sample of the run reaches": {
        "layer": "hidden_states = hidden_states * (1 if hidden_states.shape[1] <= 1024 else 1.5)"
    },
    "a window that no sample of the run reaches": {
        "layer": "hidden_states = hidden_states * (1 if hidden_states.shape[1] <= config.local_span else 1.5)",
        "values": {"local_span": 4096},
    },
    "a large number that is no length": {
        "init": "self.table = nn.Parameter(torch.zeros(512)[: config.entries].view(512))",
        "values": {"entries": 512},
    },
    "another path with a cache": {
        "after": "output.logits = output.logits if past_key_values is None else -output.logits"
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_followed_is_refused_with_its_place(name, folder):
    parts, refusal = REFUSED[name]
    write(folder, **parts)
    with pytest.raises(
        ConfigError, match=rf"^model\.path=m: grouped attention is not proven on this custom model: .*{refusal}"
    ):
        check_model("m", config_of(folder), 8000)


@pytest.mark.parametrize("name", EXACT)
def test_what_is_followed_is_exact(name, folder):
    write(folder, **EXACT[name])
    proof = check_model("m", config_of(folder), 200)
    assert proof.logprob < 1e-11 and proof.gradient < 1e-11 and min(proof.bugs.values()) > 1e-2


@pytest.mark.parametrize("in_main", [True, False])
def test_a_proof_that_takes_too_long_is_ended(in_main, folder, monkeypatch):
    """In the main thread also a call that waits; in others one that returns. A later call has all of its time again."""
    monkeypatch.setattr(proving, "MOST_SECONDS", 0.5)
    write(folder, before="import time; [time.sleep(%s) for _ in range(10**6)]" % (100 if in_main else 0.01))
    config, found = config_of(folder), []

    def refused():
        with pytest.raises(ConfigError) as raised:
            check_model("m", config, 64)
        found.append(str(raised.value))

    began = time.monotonic()
    thread = threading.Thread(target=refused)
    run = refused if in_main else thread.start
    run()
    if not in_main:
        thread.join(60)
    assert time.monotonic() - began < 20
    wanted = (
        r"model\.path=m: grouped attention is not proven on this custom model: a small copy of it took longer than 0\.5 s "
        r"\(in modeling_custom\.py, (forward|<listcomp>)\).* run it again when this one is idle; [^\n]*"
    )
    assert re.fullmatch(wanted, found[0])
    monkeypatch.setattr(proving, "MOST_SECONDS", 60.0)
    write(folder)
    admission._proven.clear()
    assert check_model("m", config, 64).logprob < 1e-11


def test_changed_code_is_proven_again(folder):
    """The config is in another file and stays the same, so that transformers copies the changed code only with the model."""
    write(folder, after="output.logits = output.logits * 1.5")
    check_model("m", config_of(folder), 64)
    write(folder, after="output.logits = output.logits * input_ids.shape[1]")
    admission._proven.clear()
    with pytest.raises(ConfigError, match="hidden states are equal"):
        check_model("m", config_of(folder), 64)


def test_code_is_that_of_the_configs_revision(folder, monkeypatch):
    """As when weights are loaded: the hub's newest code may be another."""
    asked, load = [], hub.get_class_from_dynamic_module

    def noted(name, repository, code_revision=None):
        asked.append(code_revision)
        return load(name, repository)

    monkeypatch.setattr(hub, "get_class_from_dynamic_module", noted)
    write(folder)
    config = config_of(folder)
    config._commit_hash = "0123abc"
    check_model("m", config, 64)
    assert len(asked) >= 3 and {*asked} == {"0123abc"}
