"""Problems of reasoning-gym. Any of its tasks may be used whose scorer does not run text that the model wrote as code."""

from __future__ import annotations

from pgrpo.rewards.reasoning_gym import check_task

TASKS: dict[str, dict] = {
    "chain_sum": {"min_terms": 2, "max_terms": 5},
    "leg_counting": {},
    "letter_counting": {},
    "family_relationships": {},
}
"""Name of a task -> its settings (the fields of its config class in reasoning-gym)."""
SIZES = {"train": 2000, "eval": 100}  # of each task
SEEDS = {"train": 1_000_000, "eval": 0}  # problem i comes from seed + i: the splits are far apart


def rows(split: str) -> list[dict]:
    """Problems of one split, the same ones each time, task after task; a question is in one split only.

    Args:
        split: `train` or `eval`.

    Returns:
        One dict a problem: ``question``, ``task``, and for the scorer ``entry`` and ``config``.
    """
    if split not in SIZES:
        raise ValueError(f"split {split!r}: the splits are train and eval")
    held_out = _problems("eval")
    if split == "eval":
        return held_out
    seen = {row["question"] for row in held_out}
    return [row for row in _problems("train") if row["question"] not in seen]


def _problems(split: str) -> list[dict]:
    problems = []
    for task, config in TASKS.items():
        check_task(task)
        from reasoning_gym import create_dataset

        dataset = create_dataset(task, size=SIZES[split], seed=SEEDS[split], **config)
        for entry in dataset:
            problems.append({"question": entry["question"], "task": task, "entry": entry, "config": config})
    return problems
