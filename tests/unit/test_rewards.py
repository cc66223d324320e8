"""The built-in rewards, each against answers worked out by hand."""

import threading
from collections.abc import Iterator

import pytest

from pgrpo.rewards.answers import contains_answer, exact_match
from pgrpo.rewards.format import format_regex
from pgrpo.rewards.math import Math


def test_exact_match():
    assert exact_match([" 42\n", "42.", "7", "x"], answer=[42, 42, "7 ", "X"]) == [1, 0, 1, 0]
    assert exact_match(["a"], column="gold", gold=["a"], answer=["b"]) == [1]
    for empty in (None, " "):
        with pytest.raises(ValueError, match="the answer in column `answer` is empty"):
            exact_match(["a"], answer=[empty])


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
    with pytest.raises(ValueError, match="last_number needs a number in column `answer`, not 'cat'"):
        contains_answer(["1"], last_number=True, answer=["cat"])


def test_format_regex():
    texts = ["<a>1\n2</a>", "so <a>1</a>", "1"]
    assert format_regex(texts, pattern="<a>.*</a>") == [1, 0, 0]
    assert format_regex(texts, pattern="<a>.*</a>", match="search") == [1, 1, 0]
    with pytest.raises(ValueError, match="match must be full or search, not 'any'"):
        format_regex(texts, pattern="a", match="any")  # pyright: ignore[reportArgumentType]


def test_format_regex_that_backtracks_without_end_is_stopped():
    with pytest.raises(TimeoutError):
        format_regex(["ab" * 40 + "c!"], pattern="((a|b|ab)*)*c", match="full", timeout_s=0.2)


@pytest.fixture(scope="module")
def maths() -> Iterator[Math]:
    reward = Math()
    yield reward
    reward.close()


@pytest.mark.timeout(120)
def test_math_off_the_main_thread(maths: Math):
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
    ]
    golds, completions, expected = zip(*cases, strict=True)
    scores: list[float] = []
    thread = threading.Thread(target=lambda: scores.extend(maths(list(completions), answer=list(golds))))
    thread.start()
    thread.join()
    assert scores == list(expected)


@pytest.mark.timeout(120)
def test_math_past_its_deadline_scores_zero_and_says_so(maths: Math, caplog: pytest.LogCaptureFixture):
    scores = maths(["42", "9**9**9**9**9", "42"], column="gold", timeout_s=1.5, gold=["42"] * 3)
    assert scores == [1, 0, 1]
    assert "1 completions took longer than 1.5 s" in caplog.text


@pytest.mark.timeout(120)
@pytest.mark.parametrize("gold", ["???", "", None, "$"])
def test_math_refuses_an_answer_that_is_no_mathematics(maths: Math, gold: str | None):
    with pytest.raises(ValueError, match=r"in column `answer` is (empty|not mathematics)"):
        maths(["42", "42"], answer=["42", gold])
