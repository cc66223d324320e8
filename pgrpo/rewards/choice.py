"""Multiple choice: 1.0 if the letter that the completion gives as its answer is the row's letter, else 0.0."""

from __future__ import annotations

import re
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

from pgrpo.rewards.answers import final_answers, score_each, stated


def choice(
    completions: list[str],
    prompts: list[str] | None = None,
    *,
    column: str = "answer",
    letters: str = "ABCD",
    marker: str | None = None,
    **columns: list[Any],
) -> list[float | ValueError]:
    r"""Take the letter in the last ``<answer>C</answer>``, else in the last ``\boxed{C}``. Without both take the last ``the answer
    is (C)``, else a letter that is the first or last line (``(C).``) or begins the completion (``C. Paris``), else ``option C is
    correct`` or ``I choose C``. Thoughts do not count.

    Args:
        column: column of the right letter (``C``, ``(C)``, ``#### C``) or of its index from 0 (the number 2).
        letters: letters of the choices, in order. Case-sensitive, because a small letter may be a word.
        marker: what holds the answer instead: a tag such as ``<choice>``, or a text such as ``####`` in front of it.
    """
    if not letters or len(set(letters)) < len(letters) or not letters.isalnum():
        raise ValueError(f"letters must be different letters or digits, such as ABCD, not {letters!r}")
    patterns = _patterns(letters)

    def score(text: str, gold: Any) -> bool:
        wanted = _letter(gold, letters, column)
        held = text if marker else stated(text)  # with a marker, ``text`` is what it holds
        said, alone, chosen = patterns
        if held is not None:  # begins with the letter, while a text ends with it
            return _first((alone, said, chosen), held, 0) == wanted
        return _first(patterns, text, -1) == wanted

    return score_each(score, completions, prompts, columns[column], marker)


def _first(patterns: Iterable[re.Pattern[str]], text: str, place: int) -> str | None:
    """The letter at ``place`` among those of the first pattern that the text has."""
    for pattern in patterns:
        if found := [match[match.lastindex or 0] for match in pattern.finditer(text)]:
            return found[place]
    return None


def _letter(gold: Any, letters: str, column: str) -> str:
    if isinstance(gold, int | float | Decimal) and not isinstance(gold, bool) and gold == gold // 1:
        if not 0 <= gold < len(letters):
            raise ValueError(f"the answer {gold} in column `{column}` is not an index of the letters {letters}")
        return letters[int(gold)]
    found = [answer.strip("(). ") for answer in final_answers(gold, column)]
    if len(found) != 1 or len(found[0]) != 1 or found[0] not in letters:
        raise ValueError(f"the answer {gold!r} in column `{column}` is not one of the letters {letters}")
    return found[0]


def _patterns(letters: str) -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    """Return patterns of a letter that is said to be the answer, of one that stands alone at an end of the text, and of one that
    is chosen in other words. A letter of several (``B or C``) is none."""
    one = rf"([{letters}])(?!['’]?\w)(?!\s*[)*]*\s*(?:or|and|/)\s*[(*]*[{letters}]\b)"
    opens = r"[\s(*_\[{$\"'`]*(?:\\[(\[]\s*)?(?:\\(?:text|math)\w*\s*\{\s*)?\(?"
    kind = r"(?i:answer|choice|option)"
    good = r"(?i:correct|right|best)"
    said = rf"\b(?:(?:{good}\s+)?{kind}\b[*_]*\s*(?:(?i:is)\b|:)|(?i:answer))\s*:?(?:\s*{kind}\b)?{opens}{one}"
    chosen = rf"\b(?i:choose|pick|select)\s+(?:{kind}\s+)?{opens}{one}|(?<!\w){opens}{one}\)?\s+is\s+(?:the\s+)?{good}"
    alone = rf"\A(?:{kind}\s+)?{opens}{one}(?:[)*\]}}$.:]|\s*$)|^{opens}{one}[)*_\]}}$.\"'`\\]*\s*\Z"
    return re.compile(said), re.compile(alone, re.MULTILINE), re.compile(chosen)
