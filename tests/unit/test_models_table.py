"""The table of docs/models.md is that of the locked transformers, and says what a proof says."""

import re
import runpy
from pathlib import Path

import pytest
import transformers

from pgrpo.admission.proof import prove
from pgrpo.admission.shrink import shrink

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "models_table.py"))
BY_TYPE, MODELS = SCRIPT["read_table"]()
EXACT = {name: found for name, found in BY_TYPE.items() if re.fullmatch(SCRIPT["EXACT"], found)}
TEXT = (ROOT / "docs" / "models.md").read_text()
PUBLISHED = SCRIPT["published"]()


def test_it_is_of_the_locked_version():
    locked = re.search(r"^transformers==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert locked and f"With transformers {locked[1]}." in TEXT


def test_it_has_every_type_once_and_every_published_config():
    if f"With transformers {transformers.__version__}." in TEXT:
        assert sorted(name.split()[0] for name in BY_TYPE) == SCRIPT["types"]()
    assert [name.split()[0] for name in MODELS] == list(PUBLISHED) and len(PUBLISHED) >= 25
    assert len(EXACT) >= 75 and f"{len(EXACT)} types are exact:" in TEXT
    assert all(re.fullmatch(SCRIPT["EXACT"], found) for found in MODELS.values())


@pytest.mark.parametrize("name", ["Gemma-3-4B", "gpt-oss-20b", "DeepSeek-V3", "Granite-3.3-8B", "Phi-4-mini"])
def test_a_published_config_is_exact(name):
    config, longest = PUBLISHED[name]
    proof = prove(config, longest)
    assert proof.refusal == "" and proof.logprob < 1e-11 and proof.gradient < 1e-11


def test_the_second_judge_has_other_sizes():
    config = PUBLISHED["DeepSeek-V3"][0]
    one, two = shrink(config), shrink(config, small=SCRIPT["OTHER"])
    for name in ("num_attention_heads", "hidden_size", "v_head_dim", "n_routed_experts", "vocab_size", "kv_lora_rank"):
        assert getattr(one, name) < getattr(two, name), name


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_both_judges_find_every_published_config_exact(name):
    config, longest = PUBLISHED[name]
    assert SCRIPT["proof_of"](config, longest, judge=True).refusal == ""
