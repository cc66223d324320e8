"""Rewards: plain functions that score completions.

    def reward(prompts: list[str], completions: list[str], **columns: list) -> list[float | None]

A function is called with keywords and gets what its signature names: ``prompts``, ``completions``, ``completion_ids``
(lists of ints), ``finish_reasons``, ``messages`` (the chat before the template) and any column of the data set, each
with one entry a completion. An entry of ``None`` says that the reward does not apply to that completion; an exception as an entry
says that the reward failed on that completion alone. A parameter called ``column`` holds the name of a column that the function
reads; pgrpo checks that the column exists before it loads the model.

A function that the config names is called several times a step, each time with all completions of one or more groups, and begins
while other groups are still sampled (``scoring.py``). Begin with ``runner.py``.
"""

from pgrpo.rewards.runner import RewardRunner
from pgrpo.rewards.scoring import RewardError, RewardReport, Scoring

__all__ = ["RewardError", "RewardReport", "RewardRunner", "Scoring"]
