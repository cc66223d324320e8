"""Rewards for a known answer: 1.0 if the completion gives it, else 0.0. What is the answer in a completion is decided here.

A thought is no answer: only what follows the last ``</think>`` counts, and a thought that never closes has no answer behind it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

_NUMBER = re.compile(r"-?(?:\d[\d,]*\.?\d*|\.\d+)")
_OPENS = re.compile(r"(?m)(?:^|[>:|])[ \t]*(?=<think>)")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def exact_match(
    completions: list[str],
    prompts: list[str] | None = None,
    *,
    column: str = "answer",
    marker: str | None = None,
    **columns: list[Any],
) -> list[float | ValueError]:
    """1.0 if the stripped completion (without thoughts) equals the text of ``column``, or one of its texts if it is a list.

    ``marker``: compare what the marker holds, see ``stated``.
    """

    def score(text: str, gold: Any) -> bool:
        return text.strip() in gold_texts(gold, column)

    return score_each(score, completions, prompts, columns[column], marker)


def contains_answer(
    completions: list[str],
    prompts: list[str] | None = None,
    *,
    column: str = "answer",
    last_number: bool = False,
    marker: str | None = None,
    **columns: list[Any],
) -> list[float | ValueError]:
    """1.0 if the completion contains the text of ``column`` as a whole word or number (``142`` and ``4.42`` do not contain ``42``).

    ``last_number``: compare with the last number of the completion instead (``1,200.0`` equals 1200). Of an answer that ends in
    ``#### 42``, as in gsm8k, only the 42 counts. ``marker``: look only at what the marker holds, see ``stated``.
    """

    def score(text: str, gold: Any) -> bool:
        answers = final_answers(gold, column)
        if not last_number:
            return any(_whole(answer).search(text) for answer in answers)
        for answer in answers:
            if len(_numbers(answer)) != 1:
                raise ValueError(f"last_number needs a number in column `{column}`, not {answer!r}")
        return _numbers(text)[-1:] in [_numbers(answer) for answer in answers]

    return score_each(score, completions, prompts, columns[column], marker)


def score_each(
    score: Callable[[str, Any], float],
    completions: Sequence[str],
    prompts: Sequence[str] | None,
    golds: Sequence[Any],
    marker: str | None = None,
) -> list[float | ValueError]:
    """``score(text, gold)`` of each completion's final part, or of what ``marker`` holds in it; 0 without one. A ``ValueError`` of
    ``score``, about a gold, is the entry of that completion."""
    scores: list[float | ValueError] = []
    for text, gold in zip(final_parts(completions, prompts), golds, strict=True):
        if text is not None and marker is not None:
            text = stated(text, marker)
        try:
            scores.append(float(score(text or "", gold)))  # without a text too, as it reads the gold
        except ValueError as error:
            scores.append(error.with_traceback(None))  # of the row, not of a line of ours
    return scores


def final_parts(completions: Sequence[str], prompts: Sequence[str] | None = None) -> list[str | None]:
    """What follows the last ``</think>`` of each completion. None: it ends inside a thought, which it or its prompt opened."""
    parts: list[str | None] = []
    for completion, prompt in zip(completions, prompts or [""] * len(completions), strict=True):
        _, closed, rest = completion.rpartition("</think>")
        parts.append(None if "<think>" in rest or (not closed and open_thought(prompt)) else rest)
    return parts


def open_thought(prompt: str) -> str:
    """The end of a prompt that opens a thought, from its ``<think>`` on; "" if it opens none. A tag that stands inside a sentence,
    as in instructions, opens none."""
    rest = prompt.rpartition("</think>")[2]
    at = rest.rfind("<think>")
    return rest[at:] if at >= 0 and any(match.end() == at for match in _OPENS.finditer(rest)) else ""


def stated(text: str, marker: str | None = None) -> str | None:
    r"""The final answer as the text marks it, None if nothing does.

    Without ``marker``: the last ``<answer>``, else the last ``\boxed{}`` ("" if it never closes). A tag such as ``<solution>`` as
    marker holds what stands up to ``</solution>``, or up to the end, as stop strings are cut off. Any other marker, such as
    ``####``, holds the rest of its line.
    """
    if marker == "":
        raise ValueError("marker is empty; give a tag such as <answer> or a text such as ####")
    _, found, rest = text.rpartition(marker or "<answer>")
    if not found:
        return last_box(text) if marker is None else None
    if tag := re.fullmatch(r"<(\w[^<>]*)>", found):
        return rest.partition(f"</{tag[1]}>")[0].strip()
    return rest.strip().partition("\n")[0].strip()


def last_box(text: str) -> str | None:
    r"""Content of the last ``\boxed{}`` (or ``\fbox{}``); "" if it never closes, None if there is none."""
    if not (boxes := list(_BOX.finditer(text))):
        return None
    begin, depth = boxes[-1].end(), 1
    for brace in _BRACE.finditer(text, begin):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if not depth:
            return text[begin : brace.start()].strip()
    return ""


def gold_texts(gold: Any, column: str) -> list[str]:
    """The right answers as stripped texts: one, or those of a list, each of which is right. Numbers that are whole have no point,
    as pandas makes 12.0 of 12 where a column has a gap. ValueError if there is none."""
    if hasattr(gold, "tolist"):  # of numpy
        gold = gold.tolist()
    if isinstance(gold, dict):
        fields = " or ".join(f"{column}.{name}" for name in list(gold)[:4]) or "another column"
        raise ValueError(f"the answer in column `{column}` is a mapping; name {fields}")
    if isinstance(gold, list | tuple):
        texts = [text for one in gold for text in gold_texts(one, column)]
    elif isinstance(gold, float | Decimal):
        if not math.isfinite(gold):
            raise ValueError(f"the answer in column `{column}` is {gold}")
        texts = [str(int(gold)) if gold == int(gold) else f"{Decimal(str(gold)):f}"]
    else:
        texts = [text] if (text := "" if gold is None else str(gold).strip()) else []
    if not texts:
        raise ValueError(f"the answer in column `{column}` is empty")
    return texts


def final_answers(gold: Any, column: str) -> list[str]:
    """``gold_texts`` without anything up to the last ``####``. ValueError if one is empty."""
    return [text for one in gold_texts(gold, column) for text in gold_texts(one.rpartition("####")[2], column)]


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
