"""reward_model against the classifier's own logits, one unpadded text at a time."""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from making import episode, group
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from pgrpo.config import ConfigError, RewardConfig
from pgrpo.rewards import RewardError, RewardRunner
from pgrpo.rewards.call import Unusable
from pgrpo.rewards.reward_model import RewardModel
from pgrpo.types import Prompt

PROMPTS = ["12+34=", "1+1=", "90+9=", "5"]
COMPLETIONS = ["46", "", "99999999", "7+7<eos>"]
CHATS = [[{"role": "user", "content": p}] for p in PROMPTS]


@pytest.fixture(scope="module", params=["no pad token", "pad token"])
def folder(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random classifier with the quick start's characters as tokens and one label."""
    out = tmp_path_factory.mktemp("classifier")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    tokenizer.pad_token = None if request.param == "no pad token" else tokenizer.convert_ids_to_tokens(0)
    config.num_labels = 1
    Qwen2ForSequenceClassification(config).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def expected(folder: Path, texts: list[str], **options: Any) -> list[float]:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    model.config.pad_token_id = -1  # no token of these: the last one is read
    with torch.no_grad():
        return [model(torch.tensor([tokenizer(t, **options)["input_ids"]])).logits[0, 0].item() for t in texts]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_raw_prompts(folder: Path, batch_size: int):
    wanted = expected(folder, [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)])
    got = RewardModel()(PROMPTS, COMPLETIONS, model=str(folder), batch_size=batch_size, device="cpu", dtype="float32")
    assert got == pytest.approx(wanted, abs=1e-5)
    assert len({round(score, 4) for score in wanted}) == 4


def test_chats_are_rendered_with_the_reward_models_own_template(folder: Path, tmp_path: Path):
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}={% endfor %}"
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(tmp_path)
    texts = [f"{p}={c}=" for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    wanted = expected(tmp_path, texts, add_special_tokens=False)
    args: dict[str, Any] = {"model": str(tmp_path), "device": "cpu", "dtype": "float32"}
    got = RewardModel()(["unused"] * 4, COMPLETIONS, CHATS, **args)
    assert got == pytest.approx(wanted, abs=1e-5)
    # The prompt began the model's turn: it is part of that turn's message.
    begun = [[*chat, {"role": "assistant", "content": "1"}] for chat in CHATS]
    wanted = expected(
        tmp_path, [f"{p}=1{c}=" for p, c in zip(PROMPTS, COMPLETIONS, strict=True)], add_special_tokens=False
    )
    assert RewardModel()(["unused"] * 4, COMPLETIONS, begun, **args) == pytest.approx(wanted, abs=1e-5)


def test_a_text_that_is_too_long_is_not_cut(folder: Path):
    completions = ["1", "1" * 40, "2"]
    short, long, other = RewardModel()(["2+2="] * 3, completions, model=str(folder), max_tokens=20, device="cpu")
    assert isinstance(short, float)
    assert isinstance(other, float)
    assert "tokens for" in str(long)
    assert "max_tokens is 20" in str(long)


@pytest.mark.parametrize("on_error", ["raise", "mask"])
def test_a_gpu_without_room_stops_the_run_and_says_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch, on_error):
    """Whatever on_error says, and after one attempt: it is no sample's fault."""
    loads = []

    def load(*key):
        loads.append(key)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 96.00 MiB.\nmore")

    monkeypatch.setattr("pgrpo.rewards.reward_model._load", load)
    runner = RewardRunner([RewardConfig("reward_model", args={"model": str(folder)})], on_error=on_error)
    scored = group(Prompt(0, "1+1=", [0]), *(episode([0], text=text) for text in ("2", "3")))
    with (
        runner,
        pytest.raises(
            RewardError, match=r"reward `reward_model` \(rewards\.functions\[0\]\): the GPU has not enough memory for"
        ),
    ):
        runner.score([scored])
    assert len(loads) == 1


@pytest.mark.faults
def test_a_language_model_is_no_reward_model(folder: Path, tmp_path: Path):
    """transformers loads it with a random head."""
    shutil.copytree(folder, tmp_path / "lm")
    config = AutoConfig.from_pretrained(folder)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "lm")
    with pytest.raises(Unusable, match=r"lm has no weights for 1 of a classifier's tensors, such as score.weight, and"):
        RewardModel()(PROMPTS, COMPLETIONS, model=str(tmp_path / "lm"), device="cpu")


def test_weights_are_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
    reward = RewardModel()
    first = reward(PROMPTS, COMPLETIONS, model=str(folder), device="cpu")
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", None)
    assert reward(PROMPTS, COMPLETIONS, model=str(folder), device="cpu") == first


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "missing 1 required .*'model'"),
        ({"model": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"label": 1}, "has 1 labels; there is no label 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_tokens": 65}, "max_tokens must be from 1 to 64"),
    ],
)
def test_mistakes_are_found_before_weights_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, args: dict[str, Any], message: str
):
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", None)
    if args:
        args = {"model": str(folder)} | args
    with pytest.raises(ConfigError, match=rf"args of reward_model: .*{message}"):
        RewardRunner([RewardConfig("reward_model", args=args)], on_error="raise")


@pytest.mark.faults
def test_code_that_comes_with_a_reward_model_is_refused_without_asking(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Even where standard input would say y; with the key it is asked for, it runs."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    changed = json.loads((own / "config.json").read_text())
    changed |= {"model_type": "own", "auto_map": {"AutoConfig": "code.Own"}}
    (own / "config.json").write_text(json.dumps(changed))
    (own / "code.py").write_text(
        f"open({str(tmp_path / 'RAN')!r}, 'w')\nfrom transformers import Qwen2Config\nclass Own(Qwen2Config): pass\n"
    )
    args = {"model": str(own), "device": "cpu"}
    message = r"args of reward_model: .*own comes with Python code of its own; .*args\.trust_remote_code: true"
    with pytest.raises(ConfigError, match=message):
        RewardRunner([RewardConfig("reward_model", args=args)], on_error="raise")
    assert not (tmp_path / "RAN").exists()
    RewardRunner([RewardConfig("reward_model", args={**args, "trust_remote_code": True})], on_error="raise").close()
    assert (tmp_path / "RAN").exists()


def test_every_loader_is_told_whether_to_run_a_models_code():
    """None, the default of transformers, asks on the terminal."""
    calls = []
    for path in (Path(__file__).parents[2] / "pgrpo").rglob("*.py"):
        for call in [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]:
            name = ast.unparse(call.func)
            if re.fullmatch(
                r"(Auto\w+|auto_class\(\w+\))\.from_(pretrained|config)", name
            ):  # GenerationConfig runs no code
                calls.append((path.name, name, "trust_remote_code" in [keyword.arg for keyword in call.keywords]))
    assert len(calls) >= 11
    assert [call for call in calls if not call[2]] == []
