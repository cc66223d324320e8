"""Rewards for the format of a completion."""

from __future__ import annotations

from typing import Any, Literal

import regex


def format_regex(
    completions: list[str], *, pattern: str, match: Literal["full", "search"] = "full", timeout_s: float = 5.0
) -> list[float]:
    """1.0 if the completion matches ``pattern``, else 0.0; `.` matches line breaks too.

    Args:
        pattern: regular expression.
        match: `full` matches the whole completion, `search` any part of it.
        timeout_s: maximum seconds per completion. A slower match (catastrophic backtracking) is an error.
    """
    compiled: Any = regex.compile(pattern, regex.DOTALL)
    if match not in ("full", "search"):
        raise ValueError(f"match must be full or search, not {match!r}")
    find = compiled.fullmatch if match == "full" else compiled.search
    return [float(find(completion, timeout=timeout_s) is not None) for completion in completions]
