"""The models that ``benchmarks/full_step.py`` makes: what vLLM gets to read."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from pgrpo.config import ModelConfig
from pgrpo.model.policy import load_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = {
    "hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 1024,
}  # fmt: skip
KINDS = {
    "qwen3_5_4b": {
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
    "qwen3_30b_a3b_16_layers": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}


@pytest.fixture(scope="module")
def full_step():
    """That file, run as a script is: with its folder on the path."""
    spec = importlib.util.spec_from_file_location("full_step", BENCHMARKS / "full_step.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_written_as_it_is_published_with_a_tokenizer_of_words(kind, full_step, tmp_path):
    shape = json.loads((BENCHMARKS / kind / "config.json").read_text()) | SMALL | KINDS[kind]
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape/config.json").write_text(json.dumps(shape))
    folder = tmp_path / "model"
    full_step.make_model(tmp_path / "shape", folder, layers=4)
    written = json.loads((folder / "config.json").read_text())
    name = {"qwen3_5_4b": "Qwen3_5ForConditionalGeneration", "qwen3_30b_a3b_16_layers": "Qwen3MoeForCausalLM"}[kind]
    assert written["architectures"] == [name]
    model: Any = load_model(ModelConfig(path=str(folder)))
    text = model.config.get_text_config()
    assert len(model.base_model.layers) == text.num_hidden_layers == 4
    assert text.eos_token_id == 0 and text.tie_word_embeddings == shape["tie_word_embeddings"]
    assert getattr(text, "layer_types", ["full_attention"])[-1] == "full_attention"
    tokenizer = AutoTokenizer.from_pretrained(folder)  # of Qwen3.5's own class, which splits text otherwise
    ids = tokenizer("w0 w27 w2 w999").input_ids
    assert ids == [ids[0] + n for n in (0, 27, 2, 999)] and max(ids) < 1024 and tokenizer.eos_token_id == 0
    assert tokenizer.decode(ids[1:3]).split() in (["w27", "w2"], ["w27w2"])
