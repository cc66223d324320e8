"""Rewards for mathematical answers, by math-verify.

math-verify limits the time of a simplification with signals, which work in the main thread only. Its limits are off here:
it runs in worker processes, which are killed at the deadline.
"""

from __future__ import annotations

import logging
import re
from concurrent.futures import TimeoutError
from typing import Any, Literal

from pebble import ProcessExpired

from pgrpo.rewards.answers import final_answers, final_parts, last_box, stated
from pgrpo.rewards.pool import Workers, graders

log = logging.getLogger("pgrpo")
Held = Literal["box", "tag", "text"]
"""What holds an answer: ``text`` is a completion without box and tag."""
_NO_ANSWERS = {"notfound", "proof", "nan", "null", "n/a", "incomplete"}
"""What data sets write where a problem has no final answer."""
_NUMBER = re.compile(r"-?\d[\d,]*(\.\d+)?(/\d+)?")
_TEXT = re.compile(r"\\(?:text\w*|math(?:rm|bf|it|sf)|mbox|operatorname)\s*(?=\{)")
_NOT_LETTERS = re.compile(r"\\[\[\](),; ]|[\s{}$().*\"']")
_SAID = re.compile(r"(?i)\banswer\b(?:\s+is)?\s*:?\s*([^\n]*)")
_ENCLOSED = re.compile(r"\s*(?:\$\$(.*)\$\$|\$(.*)\$|\\\[(.*)\\\]|\\\((.*)\\\))\s*\.?\s*", re.DOTALL)
_EXPONENT = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([-+]?\d+)(?!\w)")


class Math:
    r"""1.0 if the completion's final answer is mathematically equal to the row's (``1/2`` equals ``0.5``), else 0.0.

    The answer is what the last ``<answer>`` behind the last ``</think>`` holds, else the last ``\boxed{}``; only without both,
    math-verify searches the text for it. Words and products of bare letters (``BAC``) are compared as text. As math-verify has it,
    12% equals 12 and 0.12. A completion without an answer, or whose comparison exceeds the deadline, scores 0. An answer in the
    data set that is no mathematics is an error.
    """

    __name__ = "math"

    def __init__(self) -> None:
        self._pool = Workers(graders(), _warm_up)

    def __call__(
        self,
        completions: list[str],
        prompts: list[str] | None = None,
        *,
        column: str = "answer",
        marker: str | None = None,
        timeout_s: float = 10.0,
        **columns: list[Any],
    ) -> list[float | Exception]:
        """Score the completions.

        Args:
            column: column of the answers: plain, LaTeX, or after ``####``. Of a list, each is right.
            marker: what holds the answer instead: a tag such as ``<solution>``, or a text such as ``####`` in front of it.
            timeout_s: deadline per completion in seconds.
        """
        answers = [_answer(text, marker) for text in final_parts(completions, prompts)]
        golds: list[list[str] | ValueError] = [_golds(gold, column) for gold in columns[column]]
        # Completions of a group are often equal: compare each distinct pair once.
        pairs = {
            (gold, *answer): _without_mathematics(gold, *answer)
            for some, answer in zip(golds, answers, strict=True)
            if not isinstance(some, ValueError)
            for gold in some
        }
        unknown = {pair: pair for pair, right in pairs.items() if right is None}
        results: dict[Any, Any] = pairs | (self._pool.grade(_is_equal, unknown, timeout_s) if unknown else {})
        late = sum(isinstance(result, TimeoutError) and bool(pair[1]) for pair, result in results.items())
        if late:
            log.warning("math: %d completions took longer than %g s to compare and score 0", late, timeout_s)
        return [
            some
            if isinstance(some, ValueError)
            else _score({gold: results[gold, *answer] for gold in some}, answer[0], column)
            for some, answer in zip(golds, answers, strict=True)
        ]

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()


def _golds(gold: Any, column: str) -> list[str] | ValueError:
    try:
        golds = final_answers(gold, column)
        for text in golds:
            if not _NUMBER.fullmatch(text) and _letters(text) in _NO_ANSWERS:
                raise ValueError(f"the answer {text!r} in column `{column}` is not an answer")
        return golds
    except ValueError as error:
        return error.with_traceback(None)


def _answer(text: str | None, marker: str | None) -> tuple[str, Held]:
    """The final answer of a completion's final part, and what holds it; "" if there is none."""
    if text is None:
        return "", "box"
    answer = stated(text, marker)
    if answer is None:
        return ("", "box") if marker else (text.strip(), "text")
    box = last_box(answer)
    is_box = box is not None or (marker is None and "<answer>" not in text)
    return (answer if box is None else box), "box" if is_box else "tag"


def _score(results: dict[str, Any], answer: str, column: str) -> float | Exception:
    """``results``: by gold, whether the answer equals it; None if the gold is no mathematics; or how the comparison failed."""
    for gold, result in results.items():
        if result is True:
            return 1.0
        if isinstance(result, ProcessExpired):
            return RuntimeError(f"math: the comparison with {gold!r} crashed its process: {result}")
        if result is None or (isinstance(result, TimeoutError) and not answer):
            return ValueError(f"the answer {gold!r} in column `{column}` cannot be parsed as mathematics")
    return 0.0


def _without_mathematics(gold: str, answer: str, held: Held) -> bool | None:
    """Whether the answer equals ``gold``. None: only math-verify can tell."""
    if _NUMBER.fullmatch(gold):
        return answer == gold if answer in ("", gold) else None
    if (word := _letters(gold)).replace(",", "").isalpha() and any(len(part) > 1 for part in word.split(",")):
        said = _SAID.findall(answer) if held != "box" else []
        return word == _letters(said[-1] if said else answer)
    return None


def _letters(text: str) -> str:
    """A text in lower case without spaces, brackets and LaTeX's marks of text. Mathematics keeps its operators and backslashes."""
    return _NOT_LETTERS.sub("", _TEXT.sub("", last_box(text) or text)).casefold()


def _warm_up() -> None:
    """Import before the first deadline starts. Silence math-verify's warning about disabled timeouts."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    _is_equal("1", "1", "text")


def _is_equal(gold: str, answer: str, held: Held) -> bool | None:
    """Runs in a worker: compare. None if ``gold`` cannot be parsed."""
    from math_verify import parse, verify

    gold = last_box(gold) or gold
    wanted = parse(_boxed(gold), fallback_mode="no_fallback", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    if not wanted:
        return None
    has_words = held != "box" and _has_words(answer)
    # In a sentence the answer is what "the answer is" says, or what math-verify finds.
    said = _SAID.findall(answer) if has_words else []
    texts = [_boxed(said[-1] if said else answer)] if said or held != "text" or not has_words else []
    if held == "text" or has_words:
        texts.append(answer)
    return bool(answer) and any(
        verify(wanted, parse(text, parsing_timeout=None), timeout_seconds=None)  # pyright: ignore[reportArgumentType]
        for text in texts
    )


def _boxed(text: str) -> str:
    r"""An answer as math-verify expects it: without dollars or brackets of LaTeX around it, and ``1e-5`` as a power of ten."""
    inner = match[match.lastindex or 0] if (match := _ENCLOSED.fullmatch(text)) else text
    if "$" in inner.replace(r"\$", "").lstrip("$") or r"\(" in inner:  # mathematics inside a sentence
        return text
    inner = _EXPONENT.sub(r"\1 \\times 10^{\2}", inner).strip().rstrip(".")
    return rf"\boxed{{{inner}}}"


def _has_words(text: str) -> bool:
    plain = re.sub(r"\\(?:text\w*|mathrm|mbox)\s*\{[^{}]*\}|\\[a-zA-Z]+", " ", text)
    return any(word.lower() not in ("and", "or") for word in re.findall(r"[^\W\d_]{2,}", plain))
