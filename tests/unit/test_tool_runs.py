"""Training with tools on the embedded engine: what is trained on, resumed runs, and several ranks' rounds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from making import save_caller

import pgrpo
from pgrpo import checkpoint
from pgrpo.rollout.embedded.engine import EmbeddedEngine
from pgrpo.types import Completion, Request, SamplingParams


def f(n: int) -> int:
    """Say it.

    Args:
        n: A number.
    """
    return n + 1


class Judged:
    """Its reward is what was said, and varies with the row."""

    def reset(self, row: int, **_) -> str:
        self.total = row
        return "x" * (row % 2)

    def g(self, n: int) -> str:
        """Not called by this model.

        Args:
            n: A number.
        """
        return str(n)

    def get_reward(self) -> float:
        return float(self.total)


def seen(messages, **_):
    return [float(sum(m["content"] == "2" for m in chat)) for chat in messages]


@pytest.fixture(scope="module")
def caller(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("caller")
    save_caller(folder)
    return folder


def train(caller: Path, run: Path, steps: int, **more) -> Path:
    config = {
        "run_dir": str(run),
        "model": {"path": str(caller), "dtype": "float32"},
        "prompt": {"messages": [{"role": "user", "content": "{row}"}]},
        "data": {"max_prompt_tokens": 20},
        "environment": {"max_turns": 3},
        "rollout": {"prompts_per_step": 2, "group_size": 3, "max_completion_tokens": 14},
        "optim": {"lr": 1e-3},
        "train": {"steps": steps, "token_budget": 500},
        "checkpoint": {"every": 1, "keep": 9},
        "track": {"console": False, "completions": 6},
    }
    rows = [{"row": i} for i in range(6)]
    return pgrpo.train(config, rewards=[seen], dataset=rows, tools=[f], environment=Judged, **more)


def test_a_resumed_run_with_tools_is_bit_equal(caller, tmp_path):
    whole, part = train(caller, tmp_path / "whole", 3), train(caller, tmp_path / "part", 2)
    train(caller, part, 3, resume="auto")
    first, second = (checkpoint.load(run / "checkpoints" / "step_3")[0]["model"] for run in (whole, part))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    rows = [(run / "completions.jsonl").read_text() for run in (whole, part)]
    assert rows[0] == rows[1]
    row = json.loads(rows[0].splitlines()[0])
    assert row["parts"].keys() == {"seen", "Judged"}
    assert any("[call] f" in json.loads(line)["completion"] for line in rows[0].splitlines())
    metrics = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["episodes/turns/mean"] > 2 and metrics[0]["tools/f/call_frequency"] > 1
    ends = {name: value for name, value in metrics[0].items() if name.startswith("episodes/end/")}
    assert len(ends) == 7 and sum(ends.values()) == pytest.approx(1)


class Fixed:
    """A policy whose every token is the end, from the second round of a request on; counts rows."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.rows: list[int] = []

    def modules(self):
        return iter(())

    def next_logits(self, inputs, layout, rows_B, images=None):
        self.rows.append(len(inputs["input_ids"]))
        logits = torch.full((len(rows_B), 5), -50.0)
        logits[:, 1] = 50.0
        return logits


class Words:
    def batch_decode(self, sequences, **_):
        return ["" for _ in sequences]


def rounds(given: list[list[Request]], others: int) -> tuple[list[tuple[int, list[Completion]]], Fixed]:
    """An engine's completions where ``more`` gives these rounds, and other ranks have so many."""
    policy, found, asked = Fixed(), [], []

    def any_rank(flag: bool) -> bool:
        return flag or len(asked) <= others

    def more(wait):
        asked.append(wait)
        return given[len(asked) - 1] if len(asked) <= len(given) else []

    engine = EmbeddedEngine(policy, Words(), [1], any_rank=any_rank)  # pyright: ignore[reportArgumentType]
    engine.any_rank = any_rank
    engine.sample((), SamplingParams(1), lambda position, made: found.append((position, made)), more)
    assert set(asked) == {"all"}
    return found, policy


def test_rounds_go_on_until_no_rank_has_a_turn():
    first = [Request([2, 3], [0]), Request([2, 3], [1]), Request([4], [2])]
    found, policy = rounds([first, [Request([2, 3, 1, 4], [3])]], others=0)
    assert [position for position, _ in found] == [0, 1, 2, 3]
    assert policy.rows == [3, 4]  # the shared prompt once
    found, policy = rounds([first], others=3)  # this rank is done, another has two more rounds
    assert [position for position, _ in found] == [0, 1, 2] and policy.rows == [3, 1, 1]


def test_a_turn_that_goes_on_costs_its_new_tokens_and_the_last_that_was_sampled():
    first = [Request([2, 3], [0]), Request([2, 3], [1]), Request([4], [2])]
    second = [Request([2, 3, 1, 4, 4], [3], continued=3), Request([4, 1, 4], [4], continued=2), Request([4, 1], [5])]
    _, policy = rounds([first, second, [Request([2, 3, 1, 4, 4, 1, 2], [6], continued=6)]], others=0)
    assert policy.rows == [3, 3 + 2 + 2, 2]  # one that does not say that it goes on is read whole
    _, policy = rounds([first, [Request([2, 3, 4, 4], [3], continued=3)]], others=0)
    assert policy.rows == [3, 4]  # nobody sampled that
    _, policy = rounds([first, second[1:2], [Request([2, 3, 1, 4], [3], continued=3)]], others=0)
    assert policy.rows == [3, 2, 4]  # kept for one round


def test_the_limit_of_a_request_is_below_that_of_all():
    class Never(Fixed):
        def next_logits(self, inputs, layout, rows_B, images=None):
            return super().next_logits(inputs, layout, rows_B).roll(1, dims=1)

    found = {}
    engine = EmbeddedEngine(Never(), Words(), [1])  # pyright: ignore[reportArgumentType]
    requests = [Request([2], [0], 2), Request([3], [1], None), Request([4], [2], 9)]
    engine.sample(requests, SamplingParams(4), lambda position, made: found.__setitem__(position, made[0]))
    assert [len(found[i].token_ids) for i in range(3)] == [2, 4, 4]
    assert {completion.finish_reason for completion in found.values()} == {"length"}
