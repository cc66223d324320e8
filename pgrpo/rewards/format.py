"""Rewards for the format of a completion."""

from __future__ import annotations

from typing import Any, Literal

import regex

from pgrpo.rewards.answers import open_thought


def format_regex(
    completions: list[str],
    prompts: list[str] | None = None,
    *,
    pattern: str,
    match: Literal["full", "search"] = "full",
    timeout_s: float = 5.0,
) -> list[float]:
    """1.0 if the completion matches ``pattern``, else 0.0; `.` matches line breaks too. Where the prompt opens a thought, as many
    chat templates do, its ``<think>`` is matched as the beginning of the completion.

    Args:
        pattern: regular expression.
        match: `full` matches the whole completion, `search` any part of it.
        timeout_s: maximum seconds per completion. A slower match (catastrophic backtracking) is an error.
    """
    compiled: Any = regex.compile(pattern, regex.DOTALL)
    if match not in ("full", "search"):
        raise ValueError(f"match must be full or search, not {match!r}")
    find = compiled.fullmatch if match == "full" else compiled.search
    texts = [open_thought(p) + c for p, c in zip(prompts or [""] * len(completions), completions, strict=True)]
    return [float(find(text, timeout=timeout_s) is not None) for text in texts]
