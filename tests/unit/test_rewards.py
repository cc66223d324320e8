"""The built-in rewards, each against answers worked out by hand."""

import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from pgrpo.rewards.answers import contains_answer, exact_match
from pgrpo.rewards.choice import choice
from pgrpo.rewards.format import format_regex
from pgrpo.rewards.length import length, soft_overlong
from pgrpo.rewards.math import Math
from pgrpo.rewards.pool import graders


def said(scores: list[Any]) -> list[Any]:
    """Scores, with the text of those that are errors."""
    return [str(score) if isinstance(score, Exception) else score for score in scores]


def test_exact_match():
    assert exact_match([" 42\n", "42.", "7", "x"], answer=[42, 42, "7 ", "X"]) == [1, 0, 1, 0]
    assert exact_match(["a"], column="gold", gold=["a"], answer=["b"]) == [1]
    for empty in (None, " ", []):
        assert said(exact_match(["a", "b"], answer=[empty, "b"])) == ["the answer in column `answer` is empty", 1]


@pytest.mark.parametrize(
    ("answer", "completion", "score"),
    [
        (42, "so it is 42.", 1),
        (42, "42", 1),
        (42, "142", 0),
        (42, "421", 0),
        (42, "42.5", 0),
        (42, "4.42", 0),
        (42, "1,042", 0),
        (42, "42,000", 0),
        (42, "-42", 0),
        (-42, "x = -42", 1),
        ("cat", "The cat sat", 1),
        ("cat", "concatenate", 0),
        ("known", "well-known", 1),
        ("a+b", "is a+b.", 1),
        ("(x)", "f(x)", 1),
        ("7 apples.\n#### 42", "42", 1),
        ("7 apples.\n#### 42", "7 apples", 0),
    ],
)
def test_contains_answer(answer: object, completion: str, score: float):
    assert contains_answer([completion], answer=[answer]) == [score]


@pytest.mark.parametrize(
    ("answer", "completion", "score"),
    [
        (42, "first 7, then 42.", 1),
        (42, "42, not 7", 0),
        (42, "$42.00", 1),
        ("1,200", "1200", 1),
        (1200, "about 1,200", 1),
        (-3, "it is -3!", 1),
        (3, "it is -3", 0),
        (0.5, "x=.5", 1),
        ("#### 18", "9*2 = 18", 1),
        (42, "none", 0),
    ],
)
def test_last_number(answer: object, completion: str, score: float):
    assert contains_answer([completion], last_number=True, answer=[answer]) == [score]


def test_last_number_needs_a_number():
    scores = contains_answer(["1", "1"], last_number=True, answer=["cat", 1])
    assert said(scores) == ["last_number needs a number in column `answer`, not 'cat'", 1]


def test_format_regex():
    texts = ["<a>1\n2</a>", "so <a>1</a>", "1"]
    assert format_regex(texts, pattern="<a>.*</a>") == [1, 0, 0]
    assert format_regex(texts, pattern="<a>.*</a>", match="search") == [1, 1, 0]
    with pytest.raises(ValueError, match="match must be full or search, not 'any'"):
        format_regex(texts, pattern="a", match="any")  # pyright: ignore[reportArgumentType]


def test_format_regex_on_odd_texts():
    assert format_regex(["", "日本", "\ud800", "a\0b"], pattern=".*") == [1, 1, 1, 1]
    assert format_regex(["", "日本", "\ud800", "a\0b"], pattern=r"\w+") == [0, 1, 0, 0]
    assert format_regex(["<a><a>x</a></a>", "<a>x", "</a>x<a>"], pattern="<a>.*</a>", match="search") == [1, 0, 0]


@pytest.mark.parametrize(
    ("completion", "letter"),
    [
        ("B", "B"),
        (" (B).\n", "B"),
        ("**B**", "B"),
        ("B. Paris, as everyone knows", "B"),
        ("B) Paris", "B"),
        ("The answer is B", "B"),
        ("the answer is (B) because C is wrong", "B"),
        ("Answer: B", "B"),
        ("ANSWER B.", "B"),
        ("the correct option is **B**.", "B"),
        ("A or C? The answer is A. No, wait. The answer is B", "B"),
        (r"so \boxed{B}", "B"),
        (r"so \boxed{\text{B}}", "B"),
        (r"so \boxed{\text{(B)}}", "B"),
        (r"\boxed{A}, no: \boxed{B}", "B"),
        ("<answer> B </answer>", "B"),
        ("<think>The answer is C?</think><answer>B</answer>", "B"),
        ("", None),
        ("日本", None),
        ("A or B", None),
        ("Bananas are yellow", None),
        ("the answer is Bananas", None),
        ("the answer is a banana", None),
        ("The answer is E", None),
        (r"\boxed{AB}", None),
        (r"\boxed{", None),
        ("I think B's best", None),
    ],
)
def test_choice_reads_the_letter_that_an_answer_settles_on(completion: str, letter: str | None):
    for gold in "ABCD":
        assert choice([completion], answer=[gold]) == [float(gold == letter)]


def test_choice_reads_letters_and_places():
    assert choice(["A", "B", "C", "B"], column="cop", cop=[0, "(B)", "so\n#### C", 0]) == [1, 1, 1, 0]
    assert choice(["3", "the answer is J"], letters="123J", answer=["3", 3]) == [1, 1]
    for gold, message in [
        ("E", "is not one of the letters ABCD"),
        (4, "is not an index of the letters"),
        (True, "not one of the letters"),
        ("", "empty"),
    ]:
        assert message in said(choice(["A"], answer=[gold]))[0]
    with pytest.raises(ValueError, match="letters must be different letters or digits"):
        choice([], letters="AA", answer=[])


def test_length_falls_outside_its_bounds():
    ids = [[1] * n for n in (0, 5, 10, 20, 25, 40, 100)]
    assert length(ids, max_tokens=20) == [0, 0, 0, 0, -0.25, -1, -1]
    assert length(ids, max_tokens=20, min_tokens=10) == [-1, -0.5, 0, 0, -0.25, -1, -1]
    for bounds in ({"max_tokens": 0}, {"max_tokens": 5, "min_tokens": 6}, {"max_tokens": 5, "min_tokens": -1}):
        with pytest.raises(ValueError, match="min_tokens <= max_tokens"):
            length([], **bounds)


def test_soft_overlong_is_equation_13_of_dapo():
    lengths = [0, 1, 80, 81, 90, 99, 100, 101, 500]
    stops = ["stop"] * len(lengths)
    scores = soft_overlong([[1] * n for n in lengths], stops, max_tokens=100, cache_tokens=20)
    assert scores == pytest.approx([0, 0, 0, -0.05, -0.5, -0.95, -1, -1, -1], abs=1e-12)
    assert soft_overlong([[1] * 10, [1] * 10], ["length", "stop"], max_tokens=100, cache_tokens=20) == [-1, 0]
    for cache in (0, 101):
        with pytest.raises(ValueError, match="0 < cache_tokens <= max_tokens"):
            soft_overlong([], [], max_tokens=100, cache_tokens=cache)


def test_format_regex_that_backtracks_without_end_is_stopped():
    with pytest.raises(TimeoutError):
        format_regex(["ab" * 40 + "c!"], pattern="((a|b|ab)*)*c", match="full", timeout_s=0.2)


@pytest.fixture(scope="module")
def maths() -> Iterator[Math]:
    reward = Math()
    yield reward
    reward.close()


@pytest.mark.faults
@pytest.mark.timeout(120)
def test_math_scores_right_off_the_main_thread(maths: Math):
    cases = [
        ("42", "the answer is 42", 1),
        ("42", r"so \boxed{84/2}", 1),
        ("42", "the answer is 43", 0),
        (r"\frac{1}{2}", "$0.5$", 1),
        ("$x^2+1$", r"\boxed{1 + x^2}", 1),
        ("1,234", "it costs 1234 dollars", 1),
        ("2 * 21 = 42\n#### 42", "42", 1),
        (r"\boxed{3}", r"\boxed{3}", 1),
        ("42", "", 0),
        ("42", "no idea", 0),
        (5, "5", 1),
        ("4", r"\boxed{\boxed{4}}", 1),  # nested
        (r"\frac{1}{2}", r"\boxed{\frac{1}{\frac{4}{2}}}", 1),
        ("42", r"\boxed{42", 0),  # not closed
        ("42", "答えは \\boxed{42} です", 1),
        ("42", r"\boxed{}", 0),
    ]
    golds, completions, expected = zip(*cases, strict=True)
    scores: list[Any] = []
    thread = threading.Thread(target=lambda: scores.extend(maths(list(completions), answer=list(golds))))
    thread.start()
    thread.join()
    assert scores == list(expected)


@pytest.mark.faults
@pytest.mark.timeout(120)
def test_math_grades_in_parallel_on_several_threads(maths: Math):
    """Two threads grade at once, each of their slow samples has its own deadline, and nothing waits for their sum."""
    maths(["1"], answer=["1"])  # starts the workers
    results: dict[int, list[Any]] = {}

    def grade(n: int) -> None:
        results[n] = maths([f"{n}", f"9**9**9**9**{n + 5}"], timeout_s=2.0, answer=[f"{n}"] * 2)

    begin = time.monotonic()
    threads = [threading.Thread(target=grade, args=(n,)) for n in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {2: [1, 0], 3: [1, 0]}
    assert graders() == 1 or time.monotonic() - begin < 3.8  # one after the other: 4 s and more


@pytest.mark.timeout(120)
def test_math_past_its_deadline_scores_zero_and_says_so(maths: Math, caplog: pytest.LogCaptureFixture):
    scores = maths(["42", "9**9**9**9**9", "42"], column="gold", timeout_s=1.5, gold=["42"] * 3)
    assert scores == [1, 0, 1]
    assert "1 completions took longer than 1.5 s" in caplog.text


@pytest.mark.timeout(120)
@pytest.mark.parametrize("gold", ["???", "", None, "$", "notfound", "proof", float("nan"), {"a": 1}])
def test_math_refuses_an_answer_that_is_no_mathematics(maths: Math, gold: Any):
    right, wrong = said(maths(["42", "42"], answer=["42", gold]))
    assert right == 1 and re.search(
        r"in column `answer` (is empty|is nan|is not an|cannot be parsed as math|is a mapping; name answer\.a)", wrong
    )
