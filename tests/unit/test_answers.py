"""Which part of a completion is its answer: behind the thoughts, in the last tag or box. Rows as people report them."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from itertools import product
from typing import Any

import numpy as np
import pytest
from math_verify import parse, verify

from pgrpo.rewards.answers import contains_answer, exact_match, final_parts, gold_texts, last_box, open_thought, stated
from pgrpo.rewards.choice import choice
from pgrpo.rewards.code import Code
from pgrpo.rewards.format import format_regex
from pgrpo.rewards.math import Math

OPEN = "<|im_start|>assistant\n<think>\n"


@pytest.fixture(scope="module")
def maths() -> Iterator[Math]:
    reward = Math()
    yield reward
    reward.close()


@pytest.mark.parametrize(
    ("prompt", "completion", "part"),
    [
        ("", "4", "4"),
        ("", "<think>3</think>4", "4"),
        ("", "<think>1</think>2<think>3</think>4", "4"),
        ("", "<think>3", None),
        ("", "<think>1</think>2<think>3", None),
        ("", "3</think>4", "4"),
        (OPEN, "3</think>4", "4"),
        (OPEN, "3", None),
        ("Assistant: <think>", "3", None),
        ("<|assistant|><think>\nOkay", "3", None),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "4", "4"),  # thinking is switched off
        ("Think inside <think></think> first.", "4", "4"),
        ("Begin your thoughts with <think> and answer.", "4", "4"),
    ],
)
def test_the_final_part_is_what_follows_the_last_thought(prompt: str, completion: str, part: str | None):
    assert final_parts([completion], [prompt]) == [part]


def test_the_thought_that_a_prompt_opens():
    assert open_thought(f"user: <think>x</think>{OPEN}") == "<think>\n"
    assert open_thought("<|assistant|><think>\nOkay") == "<think>\nOkay"
    assert open_thought("Use <think> tags") == open_thought("<think>\n</think>") == ""


@pytest.mark.parametrize(
    ("text", "marker", "held"),
    [
        ("<answer>3</answer> or <answer> 4 </answer>", None, "4"),
        (r"<answer>4</answer> \boxed{3}", None, "4"),
        ("<answer>4", None, "4"),  # a stop string </answer> is cut off
        ("<answer></answer>", None, ""),
        (r"\boxed{3}, no: \boxed{4}", None, "4"),
        (r"\fbox{4}", None, "4"),
        (r"\boxed{\frac{1}{2}} is }", None, r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", None, r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", None, r"\left\{ x \right."),
        (r"\boxed{3} and \boxed{4", None, ""),
        ("4", None, None),
        ("3\n#### 4\nDone.", "####", "4"),
        ("####3 #### 4", "####", "4"),
        ("<solution>4</solution> 5", "<solution>", "4"),
        (r"<answer>5</answer> \boxed{6}", "####", None),
    ],
)
def test_what_a_text_marks_as_its_answer(text: str, marker: str | None, held: str | None):
    assert stated(text, marker) == held


def test_a_million_boxes_take_linear_time():
    assert last_box(r"\boxed{" * 100_000 + "4" + "}" * 100_000) == "4"


MATH: list[tuple[Any, str, int]] = [
    (72, "<think>20+52</think>\n<answer>72</answer>", 1),
    (72, "<think>It is 72, no.\n</think>\n<answer>71</answer>", 0),
    (2, "<think>\nFirst 1+1 = 2\n</think>\n\n<answer>4</answer>", 0),
    (4, r"<think>\boxed{4}? No, check", 0),
    (2, r"<think>So \boxed{2}.</think> I am not able to answer.", 0),
    (4, r"I get \boxed{3}, but a check shows \boxed{4}.", 1),
    ("3, 5", r"\boxed{3}, no, \boxed{5}", 0),
    ("3, 5", r"\boxed{5, 3}", 1),
    (5, "<answer>3, 5</answer>", 0),
    (4, "<answer>x = 3 or x = 4</answer>", 0),
    (r"50\%", r"\boxed{50\%}", 1),
    (r"50\%", r"\boxed{0.5}", 1),
    (r"12\%", r"\boxed{12}", 1),  # as math-verify has it, and the docs say
    (r"\$18", r"\boxed{18}", 1),
    ("$18", r"<answer>\$18</answer>", 1),
    (18, r"<answer>$18</answer>", 1),
    (r"\[\frac{1}{2}\]", r"\boxed{0.5}", 1),
    (r"\(\frac{1}{2}\)", r"<answer>\(0.5\)</answer>", 1),
    (r"$$\frac{1}{2}$$", r"\boxed{$0.5$}", 1),
    ("BAC", r"\boxed{ABC}", 0),
    ("BAC", r"\boxed{\text{BAC}}", 1),
    ("BAC", "The answer is BAC.", 1),
    ("BAC", "<answer>The order is ABC</answer>", 0),
    (r"\text{east}", "<answer>East</answer>", 1),
    (72, "<answer>The answer is 72.</answer>", 1),
    (72, "<answer>72 dollars</answer>", 1),
    (72, r"<answer>\boxed{72}</answer>", 1),
    (72, "<answer>72", 1),
    (r"\sqrt{2}", r"\sqrt{2}", 1),
    ("x+1", "The answer is x + 1.", 1),
    (r"\frac{\pi}{4}", r"<answer>The answer is \frac{\pi}{4}</answer>", 1),
    (2, "The answer is 3, and 2 + 1 = 3", 0),
    (1e-5, r"\boxed{10^{-5}}", 1),
    ("1e-05", r"\boxed{0.00001}", 1),
    (12.0, "12", 1),
    (["3", "5"], r"\boxed{5}", 1),
    (r"\boxed{7}", "7", 1),
    (7, "thoughts without a tag</think>7", 1),
    (42, r"\boxed{42} or \boxed{41", 0),
]


@pytest.mark.timeout(120)
def test_math_grades_the_answer_and_not_the_reasoning(maths: Math):
    golds, completions, expected = zip(*MATH, strict=True)
    scores = maths(list(completions), answer=list(golds))
    assert [row for row, score in zip(MATH, scores, strict=True) if score != row[2]] == []
    assert expected.count(1) > 20 and expected.count(0) > 8


@pytest.mark.timeout(120)
def test_math_is_right_where_math_verify_is_right_about_the_isolated_answer(maths: Math):
    """Every pair of these texts, in one of the places where an answer may stand."""
    texts = [
        r"\frac{1}{2}",
        "0.5",
        r"50\%",
        "x=2",
        r"\sqrt{4}",
        "1, 2",
        r"\{2,1\}",
        "(1,2)",
        "x^2+1",
        r"2 \text{ cm}",
        "1,000",
    ]
    parsed = {text: parse(f"${text}$", parsing_timeout=None) for text in texts}  # pyright: ignore[reportArgumentType]
    pairs = list(product(texts, texts))
    wanted = [float(verify(parsed[gold], parsed[text], timeout_seconds=None)) for gold, text in pairs]
    assert 2 * len(texts) < sum(wanted) < len(pairs) / 4
    places = [r"<think>\boxed{{7}}</think>\boxed{{{}}}.", r"\boxed{{7}} <answer>{}</answer>", "<answer>${}$</answer>"]
    completions = [places[i % 3].format(text) for i, (_, text) in enumerate(pairs)]
    got = maths(completions, answer=[gold for gold, _ in pairs])
    assert [p for p, g, w in zip(pairs, got, wanted, strict=True) if g != w] == []


@pytest.mark.timeout(120)
def test_where_the_answer_stands_can_be_said(maths: Math):
    texts = ["3\n#### 4", "<solution>4</solution>3", "4", "#### 3\n4"]
    assert maths(texts, marker="####", answer=["4"] * 4) == [1, 0, 0, 0]
    assert maths(texts, marker="<solution>", answer=["4"] * 4) == [0, 1, 0, 0]
    assert maths(["4", "3</think>4"], [OPEN] * 2, answer=["4"] * 2) == [0, 1]
    assert exact_match(["so\n#### Paris", "Paris"], marker="####", answer=["Paris"] * 2) == [1, 0]
    assert contains_answer(["Paris <a>Rome</a>", "<a>in Paris</a>"], marker="<a>", answer=["Paris"] * 2) == [0, 1]
    assert choice(["A\n#### (B)", "B"], marker="####", answer=["B"] * 2) == [1, 0]


@pytest.mark.parametrize(
    ("completion", "letter"),
    [
        ("The answer is B. Option A is wrong.", "B"),
        (r"\boxed{B}. Choice D would need more iron.", "B"),
        (r"The answer is \(B\)", "B"),
        (r"The answer is \(\text{B}\).", "B"),
        ("The answer is option B.", "B"),
        ("The answer is B, C is wrong", "B"),
        ("**Answer:** B", "B"),
        ("Option B is correct. Option A is wrong.", "B"),
        ("I choose (B).", "B"),
        ("A is wrong, C is right? No.\n\n**B**", "B"),
        ("<answer>The answer is B</answer>", "B"),
        ("<answer>B. The A team</answer>", "B"),
        (r"\boxed{B: Paris}, as the answer is A", "B"),
        ("<think>The answer is A.</think>The answer is B.", "B"),
        ("<think>The answer is A.", None),
        ("The answer is A or B", None),
        ("The answer is not A", None),
        ("Option A is wrong.", None),
        ("<answer>neither</answer> the answer is A", None),
    ],
)
def test_choice_takes_the_letter_that_is_given_as_the_answer(completion: str, letter: str | None):
    for gold in "ABCD":
        assert choice([completion], answer=[gold]) == [float(gold == letter)]
    assert choice([completion], answer=[float("ABCD".index(letter or "A"))]) == [float(letter is not None)]


def test_thoughts_do_not_count_in_other_rewards_for_an_answer():
    texts = ["<think>4</think>5", "<think>5</think>4", "<think>4"]
    assert contains_answer(texts, answer=[4] * 3) == exact_match(texts, answer=[4] * 3) == [0, 1, 0]
    code = "```python\nprint(int(input()) + 1)\n```"
    tests = [[{"input": "1", "output": "2"}]] * 3
    assert Code()([f"<think>{code}</think>no", f"<think>no</think>{code}", code], ["", "", OPEN], tests=tests) == [
        0,
        1,
        0,
    ]


@pytest.mark.parametrize(
    ("gold", "texts"),
    [
        (12.0, ["12"]),
        (0.5, ["0.5"]),
        (1e-5, ["0.00001"]),
        (np.float32(12), ["12"]),
        (Decimal("12.00"), ["12"]),
        ("12.0", ["12.0"]),
        (["Paris", "Paris, France"], ["Paris", "Paris, France"]),
        (np.array(["a", "b"], dtype=object), ["a", "b"]),
        (True, ["True"]),
    ],
)
def test_golds_as_data_sets_have_them(gold: Any, texts: list[str]):
    assert gold_texts(gold, "answer") == texts
    assert exact_match(texts, answer=[gold] * len(texts)) == [1] * len(texts)


@pytest.mark.parametrize(
    ("gold", "message"),
    [
        (float("nan"), "the answer in column `answer` is nan"),
        (float("inf"), "is inf"),
        (None, "is empty"),
        ([], "is empty"),
        ({"ground_truth": "4"}, "is a mapping; name answer.ground_truth"),
    ],
)
def test_golds_that_are_none(gold: Any, message: str):
    for reward in (exact_match, contains_answer, choice):
        (error,) = reward(["a"], answer=[gold])
        assert isinstance(error, ValueError) and message in str(error)


def test_format_regex_sees_the_thought_that_the_prompt_opened():
    texts = ["2+2 is 4.\n</think>\n\n4", "<think>2+2</think>4", "4"]
    pattern = "<think>.*</think>.*"
    assert format_regex(texts, ["2+2=\n<think>\n", "2+2=", OPEN], pattern=pattern) == [1, 1, 0]
    assert format_regex(texts, ["2+2="] * 3, pattern=pattern) == [0, 1, 0]
