"""The comparison in bfloat16 on the device that trains; here on a CPU."""

import pytest
import torch
from transformers import AutoConfig

from pgrpo.admission import on_device
from pgrpo.admission.on_device import check_on_device
from pgrpo.admission.seeded_bugs import SEEDED_BUGS
from pgrpo.attention.choose import AttentionChoice
from pgrpo.config import ConfigError
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
