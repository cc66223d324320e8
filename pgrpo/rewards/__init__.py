"""Rewards: plain functions that score completions.

    def reward(prompts: list[str], completions: list[str], **columns: list) -> list[float | None]

pgrpo passes the keyword arguments that the signature names: ``prompts``, ``completions``, ``completion_ids`` (lists of ints),
``finish_reasons``, ``messages`` (the chat before the template, and behind it the turns of an episode with tools), ``environments``
(functions given from Python) and any column of the data set. Each has one entry per completion; of an episode with several turns
``completions`` has the last turn's text.
The function returns one entry per completion: a number, ``None`` if the reward does not apply to it, or an exception if the reward
failed on it alone. A parameter called ``column`` holds the name of a column that the function reads; pgrpo checks that the column
exists before it loads the model.

A function named in the config is called several times a step, each time with all completions of one or more groups, while other
groups are still sampled (``scoring.py``). Start reading at ``runner.py``.
"""

from pgrpo.rewards.runner import RewardRunner
from pgrpo.rewards.scoring import RewardError, RewardReport, Scoring

__all__ = ["RewardError", "RewardReport", "RewardRunner", "Scoring"]
