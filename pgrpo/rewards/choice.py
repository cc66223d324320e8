"""Multiple choice: 1.0 if the last letter that the completion gives as its answer is the row's letter, else 0.0."""

from __future__ import annotations

import re
from typing import Any

from pgrpo.rewards.answers import final_answer


def choice(
    completions: list[str], *, column: str = "answer", letters: str = "ABCD", **columns: list[Any]
) -> list[float]:
    r"""Take the last ``\boxed{C}``, ``<answer>C</answer>`` or ``the answer is (C)``. If there is none, accept a completion that
    consists of the letter (``(C).``) or begins with it (``C. Paris``).

    Args:
        column: column of the right letter (``C``, ``(C)``, ``#### C``) or of its index from 0 (the number 2).
        letters: letters of the choices, in order. Case-sensitive, because a small letter may be a word.
    """
    if not letters or len(set(letters)) < len(letters) or not letters.isalnum():
        raise ValueError(f"letters must be different letters or digits, such as ABCD, not {letters!r}")
    wanted = [_letter(gold, letters, column) for gold in columns[column]]
    patterns = _patterns(letters)
    return [float(_given(text, patterns) == gold) for text, gold in zip(completions, wanted, strict=True)]


def _letter(gold: Any, letters: str, column: str) -> str:
    if isinstance(gold, int) and not isinstance(gold, bool):
        if not 0 <= gold < len(letters):
            raise ValueError(f"the answer {gold} in column `{column}` is not an index of the letters {letters}")
        return letters[gold]
    letter = final_answer(gold, column).strip("(). ")
    if len(letter) != 1 or letter not in letters:
        raise ValueError(f"the answer {gold!r} in column `{column}` is not one of the letters {letters}")
    return letter


def _patterns(letters: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Return patterns of a stated answer, and of a completion that is or begins with a letter."""
    letter = rf"([{letters}])(?!['’]?\w)"
    opens = r"\\boxed\s*\{|<answer>|(?i:\b(?:answer|choice|option))\b(?:\s+is)?\s*:?"
    stated = rf"(?:{opens})[\s(*\[{{$]*(?:\\text\w*\s*\{{\s*)?\(?{letter}"
    return re.compile(stated), re.compile(rf"\s*[(*\[]*{letter}(?:[)*\].:]|\s*$)")


def _given(text: str, patterns: tuple[re.Pattern[str], re.Pattern[str]]) -> str | None:
    stated, alone = patterns
    if found := stated.findall(text):
        return found[-1]
    match = alone.match(text)
    return match[1] if match else None
