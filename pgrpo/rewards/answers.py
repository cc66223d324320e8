"""Rewards for a known answer: 1.0 when the completion gives it, else 0.0."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

_NUMBER = re.compile(r"-?(?:\d[\d,]*\.?\d*|\.\d+)")


def exact_match(completions: list[str], *, column: str = "answer", **columns: list[Any]) -> list[float]:
    """The completion, stripped, is the text of ``column``."""
    return [
        float(completion.strip() == gold_text(gold, column))
        for completion, gold in zip(completions, columns[column], strict=True)
    ]


def contains_answer(
    completions: list[str], *, column: str = "answer", last_number: bool = False, **columns: list[Any]
) -> list[float]:
    """The text of ``column`` stands in the completion as a whole word or number (``42`` is not in ``142`` or ``4.42``).

    ``last_number``: the last number of the completion equals the answer (``1,200.0`` is 1200). An answer that ends in
    ``#### 42``, as in gsm8k, is the 42.
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
    """The answer as stripped text. ``ValueError`` when there is none."""
    text = "" if gold is None else str(gold).strip()
    if not text:
        raise ValueError(f"the answer in column `{column}` is empty")
    return text


def final_answer(gold: Any, column: str) -> str:
    """``gold_text``, or what follows ``####`` in it."""
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
