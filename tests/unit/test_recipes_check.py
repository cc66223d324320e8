"""Every recipe as shipped goes through ``pgrpo check``: data with the columns that it names, a tiny chat model, its own rewards."""

from __future__ import annotations

import json
import runpy
import string
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from pgrpo.commands.check import check
from pgrpo.config import load_config

ROOT = Path(__file__).resolve().parents[2]
CHAT = (
    "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Rows of the recipes that read a data set. The others make theirs.
ROWS = {
    "code": [
        {"text": f"Write a function to add {i}.", "test_list": [f"assert add(1) == {i + 1}"], "task_id": i}
        for i in range(6)
    ],
    "gsm8k": [{"question": f"What is {i} times 7?", "answer": f"{i}*7 = {7 * i}\n#### {7 * i}"} for i in range(6)],
    "jsonl": [{"question": f"What is {i} times 4?", "answer": 4 * i} for i in range(6)],
    "math": [{"problem": f"What is ${i}/2$?", "solution": rf"It is $\boxed{{\frac{{{i}}}{{2}}}}$."} for i in range(6)],
    "multiple_choice": [
        {"question": f"{i} + 1?", "opa": f"{i}", "opb": f"{i + 1}", "opc": "7", "opd": "none", "cop": 1}
        for i in range(6)
    ],
}
# The same with pictures, of hub data sets.
PICTURES = {
    "clevr_count": [
        {"image": Image.new("RGB", (64, 48), "gray"), "problem": "How many items are there?", "solution": f"<answer> {i} </answer>"}
        for i in range(6)
    ],
    "geometry3k": [
        {"images": [Image.new("L", (50 + 8 * i, 64), 40 * i + 20)], "problem": f"<image>{word} x.", "answer": rf"{i} \sqrt {{ 2 }}"}
        for i, word in enumerate(("how many", "which colour", "corner", "red", "2 shapes", "top"))
    ],
}  # fmt: skip
SEEING = {"shapes", *PICTURES}
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """One token a printable character; an eos, a chat template, random weights."""
    folder = tmp_path_factory.mktemp("chat_model")
    vocabulary = ["<eos>", "<unk>", *string.printable]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>", chat_template=CHAT
    ).save_pretrained(folder)
    torch.manual_seed(0)
    Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            tie_word_embeddings=True,
            eos_token_id=0,
            pad_token_id=0,
            bos_token_id=None,
        )
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def seeing_model(tmp_path_factory) -> Path:
    """The tiny vision-language model without its warm start."""
    script = runpy.run_path(str(ROOT / "scripts" / "make_tiny_vision_model.py"))
    folder = tmp_path_factory.mktemp("seeing_model")
    torch.manual_seed(0)
    model = script["Qwen3VLForConditionalGeneration"](script["make_config"]())
    for part in (model, script["make_tokenizer"](), script["make_processor"]()):
        part.save_pretrained(folder)
    return folder


def overrides(name: str, model: Path, tmp_path: Path) -> list[str]:
    keys = [f"recipe={name}", f"model.path={model}", f"run_dir={tmp_path / 'run'}", "rollout.prompts_per_step=4"]
    # A character is a token here: prompts are four times as long as the recipe's model would have them.
    keys += [
        "rollout.max_completion_tokens=12",
        f"data.max_prompt_tokens={200 if name in SEEING else 4096}",
        "train.token_budget=12288",
    ]
    if name in ROWS:
        rows = tmp_path / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
        keys += [f"data.path={rows}", f"data.eval_path={rows}"]
    if name in PICTURES:
        config = load_config("smollm2_135m", keys)
        for split in {config.data.split.partition("[")[0], (config.data.eval_split or "").partition("[")[0]}:
            Dataset.from_list(PICTURES[name]).to_parquet(tmp_path / "hub" / f"{split}-00000-of-00001.parquet")
        keys += [f"data.path={tmp_path / 'hub'}"]
        keys += ["data.split=train[:4]", "data.eval_split=train[4:]"] if name == "clevr_count" else []
    return keys


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_passes_check(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    model = request.getfixturevalue("seeing_model" if name in SEEING else "model")
    if name == "reasoning_gym":
        pytest.importorskip("reasoning_gym")
    config = load_config("smollm2_135m", overrides(name, model, tmp_path))
    check(config)
    shown = capsys.readouterr().out
    assert shown.count("--- prompt (") == shown.count("--- completion (") == 4
    rewards = [line for line in shown.splitlines() if line.startswith("--- reward ")]
    assert len(rewards) == 4
    for reward in config.rewards.functions:  # each function gave each shown completion a number
        function = reward.function.rpartition(":")[2]
        assert all(
            f"{function} 0.0" in line or f"{function} -" in line or f"{function} 1.0" in line for line in rewards
        )
    assert " tokens, median " in shown
    assert shown.endswith("all checks passed\n")


def test_every_recipe_that_reads_a_data_set_says_its_columns() -> None:
    """In the comment of ``data.path``; they are those of the rows here, which the check passes with."""
    for name, rows in (ROWS | PICTURES).items():
        lines = (ROOT / "recipes" / f"{name}.yaml").read_text().splitlines()
        at = next(i for i, line in enumerate(lines) if line.strip().startswith("path:"))
        said = " ".join(lines[at - 2 : at + 1])
        for column in rows[0].keys() - {"task_id"}:
            assert column in said, f"{name}: {column}"


def test_check_shows_a_masked_reward_and_goes_on(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The recipe math lets a run go on where a reward fails; so does its check."""
    keys = overrides("math", model, tmp_path)
    (tmp_path / "mine.py").write_text("def fails(completions, **columns):\n    raise ValueError('cannot grade')\n")
    reward = f"rewards.functions=[{{function: '{tmp_path}/mine.py:fails'}}]"
    config = load_config("smollm2_135m", [*keys, reward])
    assert config.rewards.on_error == "mask"
    check(config)
    shown = capsys.readouterr().out
    first = "the first error: reward `fails` (rewards.functions[0]) failed"
    assert f"check: 8 completions left out, as a reward failed on them; {first}" in caplog.text
    assert shown.count("--- reward None") == 4
    assert shown.endswith("all checks passed\n")
