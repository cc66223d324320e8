"""What a model's config.json says of its rotary position embeddings (RoPE)."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


def fixed_ropes(config: PretrainedConfig) -> list[str]:
    """The kinds of RoPE scaling whose angles depend on the model's length, or that vLLM tabulates to that length: ``yarn``,
    ``dynamic``, ``longrope``."""
    ropes = _ropes(getattr(config.get_text_config(), "rope_parameters", None) or {})
    return sorted({str(p.get("rope_type", "default")) for p in ropes} - {"default", "linear", "llama3"})


def positions(config: PretrainedConfig) -> int | None:
    """Tokens of the longest sample that a model takes, with the RoPE scaling of its config; None if that says nothing.

    ``max_position_embeddings`` is the length before scaling in some models and after it in others, so the larger one counts.
    """
    config = config.get_text_config()
    stated = getattr(config, "max_position_embeddings", None)
    if stated is None:
        return None
    ropes = _ropes(getattr(config, "rope_parameters", None) or {})
    return max(
        stated, int(min(p.get("factor", 1.0) * p.get("original_max_position_embeddings", stated) for p in ropes))
    )


def _ropes(rope_parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """The RoPE settings of a model: one mapping, or one for each kind of layer."""
    return [v for v in rope_parameters.values() if isinstance(v, dict)] or [rope_parameters]
