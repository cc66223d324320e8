"""The comparison in bfloat16 on the device that trains; here on a CPU."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from pgrpo.admission import on_device
from pgrpo.admission.on_device import check_on_device
from pgrpo.admission.seeded_bugs import SEEDED_BUGS
from pgrpo.attention.choose import AttentionChoice
from pgrpo.config import ConfigError
from pgrpo.model.families import expert_products
from pgrpo.packing.batch import build_batch

CPU = torch.device("cpu")
CONFIG = AutoConfig.for_model(
    "gemma3_text", vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=12, num_attention_heads=4, head_dim=16,
    num_key_value_heads=2, sliding_window=16, initializer_range=0.3, query_pre_attn_scalar=16, pad_token_id=0,
)  # fmt: skip
PROMPTS = [list(range(3, 60)), list(range(5, 30))]


@pytest.fixture(autouse=True)
def few_tokens(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(on_device, "COMPLETION_TOKENS", 12)


def test_the_models_own_error_is_the_measure_and_the_result_is_kept(caplog, tmp_path, monkeypatch):
    caplog.set_level("INFO")
    check_on_device("m", CONFIG, PROMPTS, AttentionChoice(), CPU)
    assert "on cpu, in a layer of each kind: log-probs in bfloat16 are" in caplog.text
    assert len(list(tmp_path.rglob("*.json"))) == 1
    monkeypatch.setattr(on_device, "bfloat16_errors", lambda *_: pytest.fail("compared again"))
    check_on_device("m", CONFIG, PROMPTS, AttentionChoice(), CPU)


@pytest.mark.parametrize("bug", SEEDED_BUGS)
def test_what_rounding_does_not_explain_is_refused(bug, monkeypatch, tmp_path):
    monkeypatch.setattr(
        on_device, "build_batch", lambda *args, **kwargs: SEEDED_BUGS[bug](build_batch(*args, **kwargs))
    )
    with pytest.raises(
        ConfigError, match=r"model\.path=m: on cpu, with the builtin attention kernel, .* more than twice"
    ):
        check_on_device("m", CONFIG, PROMPTS, AttentionChoice(), CPU)
    assert not list(tmp_path.rglob("*.json"))


def test_gradients_of_experts_are_compared_too(monkeypatch, caplog):
    """The products in half precision, which the proof in float64 does not take. A gradient that lacks a part is refused."""
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, initializer_range=0.2,
    )  # fmt: skip
    caplog.set_level("INFO")
    used, products = [], expert_products.functional.grouped_mm
    monkeypatch.setattr(
        expert_products.functional, "grouped_mm", lambda *args, **kwargs: used.append(1) or products(*args, **kwargs)
    )
    check_on_device("m", config, PROMPTS, AttentionChoice(), CPU)
    assert "; gradients of linear attention and experts " in caplog.text and len(used) >= 6
    monkeypatch.setattr(on_device, "cache_file", lambda *_: Path("none.json"))
    outer = expert_products._outer
    monkeypatch.setattr(
        expert_products, "_outer", lambda *args: outer(*args) * torch.tensor([1.0, 1, 0, 1]).view(4, 1, 1)
    )
    with pytest.raises(ConfigError, match=r"gradients of linear attention and experts .* more than twice"):
        check_on_device("m", config, PROMPTS, AttentionChoice(), CPU)
