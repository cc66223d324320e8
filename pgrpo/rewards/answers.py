"""Rewards for a known answer: 1.0 if the completion gives it, else 0.0."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

_NUMBER = re.compile(r"-?(?:\d[\d,]*\.?\d*|\.\d+)")


def exact_match(completions: list[str], *, column: str = "answer", **columns: list[Any]) -> list[float]:
    """1.0 if the stripped completion equals the text of ``column``."""
    return [
        float(completion.strip() == gold_text(gold, column))
        for completion, gold in zip(completions, columns[column], strict=True)
    ]


def contains_answer(
    completions: list[str], *, column: str = "answer", last_number: bool = False, **columns: list[Any]
) -> list[float]:
    """1.0 if the completion contains the text of ``column`` as a whole word or number (``142`` and ``4.42`` do not contain ``42``).

    ``last_number``: compare with the last number of the completion instead (``1,200.0`` equals 1200). Of an answer that ends in
    ``#### 42``, as in gsm8k, only the 42 counts.
    """
    scores = []
    for completion, gold in zip(completions, columns[column], strict=True):
        answer = final_answer(gold, column)
        if last_number:
            wanted = _numbers(answer)
            if len(wanted) != 1:
                raise ValueError(f"last_number needs a number in column `{column}`, not {answer!r}")
            scores.append(float(_numbers(completion)[-1:] == wanted))
        else:
            scores.append(float(_whole(answer).search(completion) is not None))
    return scores


def gold_text(gold: Any, column: str) -> str:
    """Return the answer as stripped text. ValueError if it is empty."""
    text = "" if gold is None else str(gold).strip()
    if not text:
        raise ValueError(f"the answer in column `{column}` is empty")
    return text


def final_answer(gold: Any, column: str) -> str:
    """Return the answer as stripped text, without anything up to the last ``####``. ValueError if it is empty."""
    return gold_text(str(gold).rpartition("####")[2] if gold is not None else None, column)


def _whole(answer: str) -> re.Pattern[str]:
    before = r"(?<!\w)" if answer[0].isalnum() else ""
    after = r"(?!\w)" if answer[-1].isalnum() else ""
    if answer[0].isdigit():
        before += r"(?<!-)(?<!\d[.,])"
    if answer[-1].isdigit():
        after += r"(?![.,]\d)"
    return re.compile(before + re.escape(answer) + after)


def _numbers(text: str) -> list[Decimal]:
    return [Decimal(number.replace(",", "")) for number in _NUMBER.findall(text)]
