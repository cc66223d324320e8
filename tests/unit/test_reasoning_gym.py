"""reasoning-gym's scorers, and that none of them can run what a model wrote. Needs `pip install reasoning-gym`."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pgrpo.config.functions import load_function
from pgrpo.rewards import reasoning_gym as module
from pgrpo.rewards.reasoning_gym import TASKS, ReasoningGym, check_task

RECIPE = Path(__file__).parents[2] / "recipes" / "reasoning_tasks.py"
EVALUATE = {
    *("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"),  # eval
    *(
        "countdown",
        "intermediate_integration",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
    ),  # by sympy
}
pytestmark = pytest.mark.timeout(120)


def test_not_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    for call in (lambda: check_task("chain_sum"), lambda: ReasoningGym()([], [], [], [])):
        with pytest.raises(ValueError, match=r"pip install -e '\.\[reasoning-gym\]'"):
            call()


@pytest.fixture(scope="module")
def gym() -> Any:
    return pytest.importorskip("reasoning_gym")


@pytest.fixture(scope="module")
def reward() -> Iterator[ReasoningGym]:
    made = ReasoningGym()
    yield made
    made.close()


def score(reward: ReasoningGym, gym: Any, task: str, *completions: str, timeout_s: float = 20.0, **config: Any) -> list:
    entry = gym.create_dataset(task, size=1, seed=3, **config)[0]
    n, texts = len(completions), [c.replace("RIGHT", str(entry["answer"])) for c in completions]
    return reward(texts, [task] * n, [entry] * n, [config] * n, timeout_s=timeout_s)


def called(function: Any) -> set[str]:
    """Names of what a function calls."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {f.id if isinstance(f, ast.Name) else f.attr for f in calls if isinstance(f, ast.Name | ast.Attribute)}


def reached(cls: Any) -> set[str]:
    """Names that a scorer calls, itself or by way of functions and methods of its own file."""
    file, names, todo = inspect.getmodule(cls), set(), {"score_answer"}
    while todo:
        name = todo.pop()
        names.add(name)
        for function in (getattr(cls, name, None), getattr(file, name, None)):
            if inspect.isfunction(function) and function.__module__.startswith("reasoning_gym"):
                todo |= called(function) - names
    return names


def test_scorers_on_the_list_do_not_run_the_answer(gym: Any):
    """From the source of what is installed: a version whose scorer of a known task begins to evaluate fails here."""
    from reasoning_gym.factory import DATASETS  # pyright: ignore[reportMissingImports]

    dangerous = {"eval", "exec", "parse_expr", "sympify", "literal_eval", "import_module", "__import__"}
    found = {name for name, (cls, _) in DATASETS.items() if reached(cls) & dangerous}
    ours = {"number_sorting", "bitwise_arithmetic"}  # evaluate a text of the data set
    assert found - ours == EVALUATE
    assert len(TASKS) == 96
    assert not TASKS & EVALUATE
    assert DATASETS.keys() >= TASKS


@pytest.mark.parametrize("task", [*sorted(EVALUATE), "added_later"])
def test_tasks_not_on_the_list_are_refused_by_name(
    gym: Any, reward: ReasoningGym, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from reasoning_gym.factory import DATASETS  # pyright: ignore[reportMissingImports]

    monkeypatch.setitem(DATASETS, "added_later", DATASETS["n_queens"])
    trace = tmp_path / "ran"
    attack = f"<answer>__import__('pathlib').Path({str(trace)!r}).touch()</answer>"
    with pytest.raises(
        ValueError, match=rf"task `{task}` is refused: .*scorer runs the model's answer as code, or was not reviewed"
    ):
        reward([attack], [task], [{"answer": "1", "metadata": {}}], [{}])
    assert not trace.exists()


def test_unknown_tasks(gym: Any):
    for task in ("chain_sums", "composite", ""):
        with pytest.raises(ValueError, match=f"has no task `{task}`; it has ab, "):
            check_task(task)


def test_scores_of_the_last_answer(gym: Any, reward: ReasoningGym):
    right = "<answer>RIGHT</answer>"
    texts = [
        right,
        f"so <answer>-1</answer> no: {right}",
        f"{right}<answer>-1</answer>",
        "RIGHT",
        "",
        "<answer>",
        "日本",
    ]
    texts += ["<answer> RIGHT\n</answer>", "<answer></answer>"]
    assert score(reward, gym, "leg_counting", *texts) == [1, 1, 0, 0, 0, 0, 0, 1, 0]
    assert score(reward, gym, "chain_sum", right, "<answer>x</answer>", min_terms=2, max_terms=2)[0] == 1


def test_a_partial_score_is_the_scorers_own(gym: Any, reward: ReasoningGym):
    assert score(reward, gym, "leg_counting", "<answer>RIGHT legs</answer>")[0] == pytest.approx(3 / 8)


@pytest.mark.parametrize("task", ["letter_counting", "graph_color", "arc_1d", "mini_sudoku", "jugs", "zebra_puzzles"])
def test_other_tasks(gym: Any, reward: ReasoningGym, task: str):
    right, wrong, none = score(reward, gym, task, "<answer>RIGHT</answer>", "<answer>no</answer>", "no")
    assert right == (0 if task == "graph_color" else 1)  # graph_color publishes no answer
    assert wrong <= 0.05
    assert none <= 0.05


def test_a_scorer_that_does_not_end_fails_that_sample_alone(
    gym: Any, reward: ReasoningGym, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pgrpo.rewards.reasoning_gym._score", _slow_for_slow)
    scores = score(reward, gym, "leg_counting", "<answer>1</answer>", "<answer>slow</answer>", timeout_s=1.0)
    assert scores[0] == 5.0
    assert isinstance(scores[1], RuntimeError)
    assert str(scores[1]) == "the scorer of `leg_counting` took longer than timeout_s=1"


def _slow_for_slow(task: str, config: dict, entry: dict, answer: str) -> float:
    import time

    time.sleep(30 if answer == "slow" else 0)
    return 5.0


def test_rows_of_the_recipe(gym: Any, monkeypatch: pytest.MonkeyPatch):
    rows = load_function(f"{RECIPE}:rows", "test")
    monkeypatch.setitem(rows.__globals__, "SIZES", {"train": 40, "eval": 10})
    train, held_out = rows("train"), rows("eval")
    assert train == rows("train")
    assert len(held_out) == 40
    assert not {row["question"] for row in train} & {row["question"] for row in held_out}
    assert {row["task"] for row in train} == set(rows.__globals__["TASKS"])
    assert train[0]["config"] == {"min_terms": 2, "max_terms": 5}
    with pytest.raises(ValueError, match="train and eval"):
        rows("test")
    monkeypatch.setitem(rows.__globals__["TASKS"], "n_queens", {})
    with pytest.raises(ValueError, match="task `n_queens` is refused"):
        rows("train")
