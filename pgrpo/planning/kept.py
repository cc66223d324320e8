"""Whether a prefix whose samples do not fit one micro-batch may be kept for several passes (``model/kept.py``), in words too."""

from __future__ import annotations

from pgrpo.config import Config
from pgrpo.planning.flops import ModelDims


def longest_kept(config: Config, dims: ModelDims) -> int:
    """Tokens of the longest prefix that it may make sense to keep: none if a step is one micro-batch."""
    rollout, prompt, budget = config.rollout, config.data.max_prompt_tokens, config.train.token_budget
    step = rollout.prompts_per_step * (prompt + rollout.group_size * config.max_sampled_tokens)
    return 0 if step <= budget or config.model.attention != "grouped" or dims.tower else min(prompt, budget)


def cuts_groups(config: Config) -> bool:
    """Whether a group at its longest is more than one micro-batch."""
    group = config.data.max_prompt_tokens + config.rollout.group_size * config.max_sampled_tokens
    return group > config.train.token_budget


def why_none_kept(config: Config, dims: ModelDims, not_kept: str) -> str:
    """What a user should know whose groups may be cut into several micro-batches, none of which may keep a prefix; else nothing.

    Args:
        not_kept: what the proofs of policy and teacher say (``Proof.not_kept``).
    """
    reason = "the model sees images" if dims.tower else not_kept
    if config.model.attention != "grouped" or not cuts_groups(config) or not reason:
        return ""
    return f"none, as {reason}: a group that train.token_budget cuts computes its prompt in each of its micro-batches"


def kept_text(wanted: int, tokens: int) -> str:
    """What is kept, for the dry run and the log."""
    if tokens:
        less = f" (not {wanted:,}: the memory plan has room for no more)" if tokens < wanted else ""
        return f"up to {tokens:,} tokens that samples share are computed once for several micro-batches where that saves time{less}"
    return "none: the memory plan has no room for their keys and values; lower train.token_budget to make some"
