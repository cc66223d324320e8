"""Length penalties, from -1 to 0. The length is the number of tokens, including the final eos."""

from __future__ import annotations


def length(completion_ids: list[list[int]], *, max_tokens: int, min_tokens: int = 0) -> list[float]:
    """0 from ``min_tokens`` to ``max_tokens``. Outside, minus the distance to the bound over that bound, at least -1."""
    if not 0 <= min_tokens <= max_tokens or max_tokens < 1:
        raise ValueError(f"needs 0 <= min_tokens <= max_tokens and max_tokens >= 1, not {min_tokens} and {max_tokens}")
    scores = []
    for ids in completion_ids:
        missing, extra = max(min_tokens - len(ids), 0), max(len(ids) - max_tokens, 0)
        scores.append(-missing / min_tokens if missing else max(-extra / max_tokens, -1.0))
    return scores


def soft_overlong(
    completion_ids: list[list[int]], finish_reasons: list[str], *, max_tokens: int, cache_tokens: int
) -> list[float]:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13) with L_max = ``max_tokens`` (usually
    ``rollout.max_completion_tokens``) and L_cache = ``cache_tokens``: 0 up to L_max - L_cache, then linear down to -1 at
    L_max. A truncated completion gets -1 at any length.
    """
    if not 0 < cache_tokens <= max_tokens:
        raise ValueError(f"needs 0 < cache_tokens <= max_tokens, not {cache_tokens} and {max_tokens}")
    scores = []
    for ids, reason in zip(completion_ids, finish_reasons, strict=True):
        into_cache = len(ids) - (max_tokens - cache_tokens)
        scores.append(-1.0 if reason == "length" else -min(max(into_cache / cache_tokens, 0.0), 1.0))
    return scores
