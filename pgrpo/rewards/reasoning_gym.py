"""Rewards for reasoning-gym's procedural tasks, by each task's own scorer (``pip install -e '.[reasoning-gym]'``)."""

from __future__ import annotations

import json
import re
from concurrent.futures import TimeoutError
from functools import cache
from importlib.util import find_spec
from typing import Any

from pebble import ProcessExpired

from pgrpo.rewards.answers import final_parts
from pgrpo.rewards.pool import Workers, graders

_TASKS = """
ab acre advanced_geometry aiw arc_1d arc_agi base_conversion basic_arithmetic bf binary_alternation bitwise_arithmetic
boxnet caesar_cipher calendar_arithmetic chain_sum circuit_logic codeio coin_flip color_cube_rotation complex_arithmetic
count_bits count_primes course_schedule cryptarithm decimal_arithmetic decimal_chain_sum dice emoji_mystery
family_relationships figlet_font fraction_simplification futoshiki game_of_life game_of_life_halting gcd graph_color
group_anagrams gsm_symbolic isomorphic_strings jugs kakurasu knight_swap knights_knaves largest_island lcm leg_counting
letter_counting letter_jumble list_functions mahjong_puzzle manipulate_matrix maze mini_sudoku modulo_grid
needle_haystack number_filtering number_format number_sequence number_sorting palindrome_generation
palindrome_partitioning path_star polynomial_equations pool_matrix power_function prime_factorization products
propositional_logic quantum_lock ransom_note rearc rectangle_count rotate_matrix rotten_oranges rubiks_cube rush_hour
self_reference sentence_reordering shortest_path simple_equations simple_geometry sokoban spell_backward
string_manipulation string_splitting string_synthesis sudoku survo syllogism time_intervals tower_of_hanoi tsumego
word_ladder word_sequence_reversal word_sorting zebra_puzzles
"""
TASKS = frozenset(_TASKS.split())
"""Tasks whose scorers never execute the model's answer, by review of reasoning-gym 0.1.25. The other scorers call ``eval``, or
``sympy.parse_expr``, which calls it. Tasks of later versions are refused until reviewed."""
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def check_task(task: str) -> None:
    """Raise ValueError if reasoning-gym is not installed, has no such task, or its scorer may execute the answer."""
    if find_spec("reasoning_gym") is None:
        raise ValueError("reasoning-gym is not installed: pip install -e '.[reasoning-gym]'")
    from reasoning_gym.factory import DATASETS  # pyright: ignore[reportMissingImports]

    if task == "composite" or task not in DATASETS:
        raise ValueError(f"reasoning-gym has no task `{task}`; it has {', '.join(sorted(TASKS & DATASETS.keys()))}")
    if task not in TASKS:
        hint = "; pgrpo has a recipe `countdown` of its own" if task == "countdown" else ""
        raise ValueError(
            f"task `{task}` is refused: reasoning-gym's scorer runs the model's answer as code, or was not reviewed{hint}"
        )


class ReasoningGym:
    """The score of the last ``<answer>...</answer>`` by the task's scorer, usually 0 to 1. The scorer gets None if there is none.
    Thoughts do not count.

    The rows come from ``recipes/reasoning_tasks.py``: ``task`` (name), ``entry`` (question, answer and metadata as reasoning-gym
    made them, because some scorers need tuples, which JSON would lose) and ``config`` (the task's settings).
    """

    __name__ = "reasoning_gym"

    def __init__(self) -> None:
        self._pool = Workers(graders(), _warm_up)

    def __call__(
        self,
        completions: list[str],
        task: list[str],
        entry: list[dict],
        config: list[dict],
        prompts: list[str] | None = None,
        *,
        timeout_s: float = 10.0,
    ) -> list[float | Exception]:
        """``timeout_s``: deadline per completion in seconds. A scorer that exceeds it, or crashes, fails the sample."""
        if find_spec("reasoning_gym") is None:
            raise ValueError("reasoning-gym is not installed: pip install -e '.[reasoning-gym]'")
        for name in set(task):
            check_task(name)
        texts = final_parts(completions, prompts)
        answers = [found[-1].strip() if (found := _ANSWER.findall(text or "")) else None for text in texts]
        # Completions of a group share their row and often the answer: score each distinct pair once.
        keys = [(id(row), answer) for row, answer in zip(entry, answers, strict=True)]
        calls = dict(zip(keys, zip(task, config, entry, answers, strict=True), strict=True))
        results = self._pool.grade(_score, calls, timeout_s)
        for key, (name, *_) in calls.items():
            if isinstance(results[key], TimeoutError):
                results[key] = RuntimeError(f"the scorer of `{name}` took longer than timeout_s={timeout_s:g}")
            elif isinstance(results[key], ProcessExpired):
                results[key] = RuntimeError(f"the scorer of `{name}` crashed its process: {results[key]}")
        return [results[key] for key in keys]

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()


def _warm_up() -> None:
    import reasoning_gym  # noqa: F401


@cache
def _dataset(task: str, config: str) -> Any:
    from reasoning_gym import create_dataset  # pyright: ignore[reportAttributeAccessIssue, reportMissingImports]

    return create_dataset(task, **json.loads(config))


def _score(task: str, config: dict, entry: dict, answer: str | None) -> float:
    """Runs in a worker. An exception of the scorer is a fault of the task, not of the answer, and propagates."""
    return float(_dataset(task, json.dumps(config)).score_answer(answer, entry))
