"""Rewards: plain functions that score completions.

    def reward(prompts: list[str], completions: list[str], **columns: list) -> list[float | None]

A function is called with keywords and gets what its signature names: ``prompts``, ``completions``, ``completion_ids``
(lists of ints), ``finish_reasons``, ``messages`` (the chat before the template) and any column of the data set, each
with one entry a completion. ``None`` says that the reward does not apply to that completion, an exception as an entry
that it failed on that one alone. A parameter called
``column`` holds the name of a column that the function reads; that it exists is checked before the model is loaded.
"""

from pgrpo.rewards.runner import RewardError, RewardReport, RewardRunner

__all__ = ["RewardError", "RewardReport", "RewardRunner"]
