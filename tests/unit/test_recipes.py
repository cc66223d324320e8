"""Packaged configs and recipes load; their generators are deterministic and disjoint; their rewards score by hand."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import yaml
from making import episode, group
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pgrpo.config import load_config
from pgrpo.config.functions import load_function
from pgrpo.data import load_prompts
from pgrpo.rewards import RewardRunner
from pgrpo.types import Prompt

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


def of_recipe(file: str, name: str):
    return load_function(f"{ROOT / 'recipes' / file}:{name}", "test")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, all of them unknown; a chat template."""
    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    chat = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", chat_template=chat)


def test_all_are_here() -> None:
    assert CONFIGS == ["quickstart", "qwen3_0.6b", "qwen3_4b", "smollm2_135m", "tools_quickstart", "vision_quickstart"]
    assert RECIPES == [
        "addition",
        "arithmetic",
        "calculator",
        "clevr_count",
        "code",
        "code_repair",
        "countdown",
        "geometry3k",
        "gsm8k",
        "guess_number",
        "jsonl",
        "math",
        "multiple_choice",
        "reasoning_gym",
        "search_notes",
        "shapes",
        "twenty_questions",
    ]


@pytest.mark.parametrize("name", CONFIGS)
def test_config_loads_by_name_and_can_evaluate(name: str) -> None:
    config = load_config(name)
    assert config.rewards.functions
    assert config.eval.every > 0
    assert config.data.eval_split or config.data.eval_path
    assert config.run_dir == f"runs/{name}"


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_loads_and_is_short(name: str) -> None:
    config = load_config("smollm2_135m", [f"recipe={name}", "train.token_budget=6144"])
    own = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    assert config.recipe == name
    assert config.rollout.max_completion_tokens == own["rollout"]["max_completion_tokens"]
    assert len((ROOT / "recipes" / f"{name}.yaml").read_text().splitlines()) < 40


# One row as each recipe's data set has it, a right completion, a wrong one, and what they score in total.
NOTE = {"question": "Who keeps the place where Mira works?", "answer": "Ada Brandt"}
FOX = {"question": "Who jumps?", "opa": "a dog", "opb": "a fox", "opc": "a cat", "opd": "none", "cop": 1, "exp": None}
MBPP = {"text": "Write a function to add two numbers.", "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]}
MATH = {"problem": "What is $1/2+1/3$?", "solution": r"It is $\frac{3+2}{6}=\boxed{\frac{5}{6}}$."}
GSM8K = {"question": "What is 6 times 7?", "answer": "6*7 = <<6*7=42>>42\n#### 42"}
JSONL = {"question": "What is 3 times 4?", "answer": 12}
SAMPLES = {
    "addition": ({"a": 12, "b": 34, "answer": "46"}, ("46", 1.0), ("47", 0.0)),
    "arithmetic": ({"a": 12, "b": 34, "answer": "46"}, (" 46", 1.0), (" 46.", 0.0)),
    "calculator": ({"a": 12, "b": 34, "answer": "408"}, ("408", 1.0), ("409", 0.0)),
    "code": (
        MBPP,
        ("So:\n```python\ndef add(a, b):\n    return a + b\n```", 1.0),
        ("```python\ndef add(a, b):\n    return 3\n```", 0.0),
    ),
    "countdown": ({"numbers": "3, 5, 7, 25", "target": 67}, ("<answer>(25 - 5) * 3 + 7</answer>", 1.0), ("67", 0.0)),
    "gsm8k": (GSM8K, (r"so \boxed{42}", 1.1), (r"so \boxed{41}", 0.1)),
    "jsonl": (JSONL, ("12", 1.0), ("13", 0.0)),
    "math": (MATH, (r"so \boxed{5/6}", 1.0), (r"so \boxed{2/5}", 0.0)),
    "search_notes": (NOTE, ("Ada Brandt", 1.0), ("Bruno Keller", 0.0)),
    "multiple_choice": (FOX, ("Foxes do. The answer is B.", 1.0), ("The answer is C.", 0.0)),
}


PICTURES = {
    "clevr_count": (
        {"problem": "How many items are there in the image?", "solution": "<answer> 3 </answer>"},
        ("<think>Two and one.</think><answer> 3 </answer>", 1.1), ("<answer>4</answer>", 0.1), ("none", 0.0),
    ),
    "geometry3k": (
        {"problem": "<image>Find x.", "answer": r"2 \sqrt { 221 }"},
        (r"So \boxed{2\sqrt{221}}", 1.1), (r"\boxed{\sqrt{221}}", 0.1), ("none", 0.0),
    ),
}  # fmt: skip


def rendered_and_scored(name: str, row: dict, *completions: str) -> list[float | None]:
    """The totals of the completions; the row goes through the recipe's template and its reward functions."""
    config = load_config("smollm2_135m", [f"recipe={name}", "train.token_budget=8192"])
    data = replace(config.data, max_prompt_tokens=4096)
    [prompt] = load_prompts(data, config.prompt, make_tokenizer(), dataset=[row]).prompts
    scored = group(prompt, *(episode([5] * 9, logprobs=[-1.0] * 9, text=text) for text in completions))
    with RewardRunner(config.rewards.functions, on_error=config.rewards.on_error) as runner:
        runner.check(prompt)
        assert runner.score([scored]).first_error is None
    return scored.rewards


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", SAMPLES)
def test_recipe_renders_and_scores_its_rows(name: str) -> None:
    row, *samples = SAMPLES[name]
    totals = rendered_and_scored(name, row, *(text for text, _ in samples))
    assert totals == pytest.approx([total for _, total in samples], abs=1e-12)


@pytest.mark.timeout(120)
def test_reasoning_gym_recipe_renders_and_scores_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("reasoning_gym")
    rows = of_recipe("reasoning_tasks.py", "rows")
    monkeypatch.setitem(rows.__globals__, "SIZES", {"train": 1, "eval": 1})
    for row in rows("train"):
        right = f"<answer>{row['entry']['answer']}</answer>"
        assert rendered_and_scored("reasoning_gym", row, right, "no")[0] == 1.0


def test_every_recipe_has_a_sample() -> None:
    played = {"code_repair", "guess_number", "twenty_questions"}  # test_tool_recipes.py
    seen = {"shapes", *PICTURES}  # test_images.py
    assert set(SAMPLES) | {"reasoning_gym"} | played | seen == set(RECIPES)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", PICTURES)
def test_recipes_with_pictures_score_their_rows(name: str) -> None:
    """Without the picture: rewards read the other columns."""
    row, *samples = PICTURES[name]
    config = load_config("smollm2_135m", [f"recipe={name}", "train.token_budget=8192"])
    prompt = Prompt(0, "", [5], row)
    scored = group(prompt, *(episode([5] * 9, logprobs=[-1.0] * 9, text=text) for text, _ in samples))
    with RewardRunner(config.rewards.functions, on_error=config.rewards.on_error) as runner:
        runner.check(prompt)
        assert runner.bad_golds([prompt]) == {}
        assert runner.score([scored]).first_error is None
    assert scored.rewards == pytest.approx([total for _, total in samples], abs=1e-12)


def test_math_recipe_masks_an_answer_that_is_no_mathematics() -> None:
    config = load_config("smollm2_135m", ["recipe=math", "train.token_budget=8192"])
    assert config.rewards.on_error == "mask"
    overlong = config.rewards.functions[1]
    assert overlong.args == {"max_tokens": config.rollout.max_completion_tokens, "cache_tokens": 1024}


@pytest.mark.parametrize("file", ["addition.py", "calculator.py", "countdown.py", "guess_number.py"])
def test_generated_rows_are_deterministic_and_disjoint(file: str) -> None:
    rows = of_recipe(file, "rows")
    train, held_out = rows("train"), rows("eval")
    assert train == rows("train")
    problems = [{tuple(row.values()) for row in split} for split in (train, held_out)]
    assert [len(split) for split in problems] == [len(train), len(held_out)]
    assert not problems[0] & problems[1]
    assert len(held_out) >= 341
    with pytest.raises(ValueError, match="train and eval"):
        rows("test")


def test_addition_rows() -> None:
    rows = of_recipe("addition.py", "rows")
    both = rows("train") + rows("eval")
    assert sorted((row["a"], row["b"]) for row in both) == [(a, b) for a in range(10, 100) for b in range(10, 100)]
    assert all(row["answer"] == str(row["a"] + row["b"]) for row in both)
    assert {"a": 23, "b": 45, "answer": "68"} in rows("train")
    assert {"a": 64, "b": 18, "answer": "82"} in rows("eval")  # the hash is the same everywhere


def test_arithmetic_shots_are_right_and_not_held_out() -> None:
    *shots, last = (load_config("smollm2_135m").prompt.template or "").splitlines()
    train = {(row["a"], row["b"], row["answer"]) for row in of_recipe("addition.py", "rows")("train")}
    assert len(shots) == 4
    assert last == "{a} + {b} ="
    for shot in shots:
        problem, answer = shot.split(" = ")
        a, b = map(int, problem.split(" + "))
        assert (a, b, answer) in train


def test_countdown_rows_have_four_numbers_and_a_target_in_range() -> None:
    for row in of_recipe("countdown.py", "rows")("eval"):
        numbers = [int(number) for number in row["numbers"].split(", ")]
        assert len(numbers) == 4
        assert all(1 <= number <= 99 for number in numbers)
        assert 1 <= row["target"] <= 999


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("<answer>(25 - 5) * 3 + 7</answer>", 1.0),
        ("No: <answer>1</answer>. So <answer> 7 + 3 * (25 - 5) </answer>.", 1.0),
        ("<answer>5 * 7 + 25 + 3 + 4</answer>", 0.1),  # right value, a number too many
        ("<answer>60 + 7</answer>", 0.1),  # right value, other numbers
        ("<answer>25 + 5 + 3 + 7</answer>", 0.1),  # right numbers, another value
        ("<answer>(25 - 5) * 3 + 7 = 67</answer>", 0.0),
        ("<answer>25 / (5 - 5)</answer>", 0.0),
        ("<answer></answer>", 0.0),
        ("(25 - 5) * 3 + 7", 0.0),
        ("", 0.0),
        ("<answer>__import__('os').abort()</answer>", 0.0),
        ("<answer>9**9**9</answer>", 0.0),
        ("<answer>67 if True else 0</answer>", 0.0),
        ("<answer>6.7e1</answer>", 0.0),
        ("<answer>True</answer>", 0.0),
        ("<answer>\0</answer>", 0.0),
        (f"<answer>{'(' * 5000}</answer>", 0.0),
        (f"<answer>{'9*' * 5000}9</answer>", 0.0),
    ],
)
def test_countdown_reward(answer: str, score: float) -> None:
    assert of_recipe("countdown.py", "reward")([answer], ["3, 5, 7, 25"], [67]) == [score]


def test_countdown_arithmetic_is_exact() -> None:
    value, numbers = of_recipe("countdown.py", "evaluate")("1 / 3 + 1 / 3 + 1 / 3")
    assert value == Fraction(1)
    assert numbers == {1: 3, 3: 3}
