"""Progress: what a phase says of itself, on a terminal and without one, and the lines that a run ends with."""

from __future__ import annotations

import io
import json
import time
from typing import Any

import pytest
import torch
from rich.console import Console

from pgrpo.config import Config, RewardConfig
from pgrpo.distributed.world import World
from pgrpo.environments.episodes import SingleTurn
from pgrpo.rewards import RewardRunner
from pgrpo.tracking import live
from pgrpo.training.messages import closing_summary
from pgrpo.training.rollout import sample_and_score
from pgrpo.types import Completion, Prompt, SamplingParams


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(live, "PLAIN_EVERY_S", 0.02)
    monkeypatch.setattr(live, "REFRESH_S", 0.02)


def console(*, terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=100, color_system=None), out


def wait_for(out: io.StringIO, text: str) -> None:
    deadline = time.monotonic() + 20
    while text not in out.getvalue():
        assert time.monotonic() < deadline, (text, out.getvalue())
        time.sleep(0.005)


def test_the_time_left_is_by_the_last_time_else_by_what_is_done(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    count = live.Count("rollout", 8, "prompts", None)
    now[0] += 40
    assert count.text(None) == "0/8 prompts, 40 s"
    count.done = 2
    assert count.text(None) == "2/8 prompts, 40 s, about 2 min 00 s left"
    assert count.text(usual_s=9.0) == "2/8 prompts, 40 s, about 32 s left"
    assert count.text(usual_s=4.0) == "2/8 prompts, 40 s, about 2 min 00 s left"  # slower than the last time
    assert live.Count("loading", None, "", None).text(None) == "0 s"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.25, "0.25 s"), (12.3, "12 s"), (59.7, "60 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations(seconds, text):
    assert live.duration(seconds) == text


def test_without_a_terminal_a_long_phase_says_lines_and_a_short_one_nothing(at_once):
    shown, out = console(terminal=False)
    with live.showing(shown):
        live.entitle("step 3/9")
        for item in live.watched("update", ["a", "b"], "micro-batches"):
            wait_for(out, f"step 3/9: update {'ab'.index(item)}/2 micro-batches, ")
    monotone = out.getvalue()
    assert "\x1b" not in monotone
    live.PLAIN_EVERY_S = 30.0
    with live.showing(shown), live.counting("rollout", 1, "prompts"):
        time.sleep(0.05)
    assert out.getvalue() == monotone


def test_on_a_terminal_the_bar_is_gone_when_the_phase_is_over(at_once):
    shown, out = console(terminal=True)
    with live.showing(shown), live.counting("rollout", 4, "prompts") as count:
        count.done = 3
        wait_for(out, "3/4 prompts")
    assert "rollout" in out.getvalue() and out.getvalue().endswith("\x1b[2K")  # erases the line


def test_nothing_is_shown_outside_and_an_error_passes(at_once, capsys):
    with live.counting("rollout", 4, "prompts"):
        time.sleep(0.05)
    shown, _ = console(terminal=False)
    with pytest.raises(ValueError, match="as it was"), live.showing(shown), live.counting("rollout"):
        raise ValueError("as it was")
    assert live._display is None and capsys.readouterr().out == ""


def test_a_rollout_counts_prompts_and_then_rewards(at_once):
    shown, out = console(terminal=False)

    class Engine:
        def sample(self, requests: Any, params: Any, on_finished: Any) -> None:
            on_finished(1, [Completion([1], [0.0], "stop", "a")] * 2)
            wait_for(out, "evaluation 1/3 prompts")
            for position in (0, 2):
                on_finished(position, [Completion([1], [0.0], "stop", "a")] * 2)

    def slow(completions: list[str]) -> list[float]:
        wait_for(out, "grading 6/12 rewards")
        return [1.0] * len(completions)

    prompts = [Prompt(i, "p", [1], {"answer": "a"}) for i in range(3)]
    world, engine = World(0, 1, torch.device("cpu")), SingleTurn(Engine())  # pyright: ignore[reportArgumentType]
    with live.showing(shown), RewardRunner([RewardConfig("exact_match")], on_error="raise", extra=[slow]) as rewards:
        params = SamplingParams(4)
        sample_and_score(engine, rewards, world, prompts, params, [[0, 1]] * 3, "evaluation")


def test_the_closing_lines_have_the_best_and_the_last_evaluation(tmp_path):
    rows = [{"step": step, "reward": step / 20} for step in range(1, 21)]
    rows[9] |= {"eval/reward": 0.75}
    rows[19] |= {"eval/reward": 0.5}
    rows = [{"step": 0, "eval/reward": 0.25}, *rows]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = closing_summary(tmp_path, Config(), 20, 15, 3700.0).splitlines()
    assert lines[0] == f"done: 20 steps (the first 5 by an earlier process); 1 h 01 min; saved in {tmp_path}"
    assert lines[1] == "reward: 0.275 in the first 10 step(s), 0.775 in the last"
    assert lines[2] == "eval/reward: best 0.75 after step 10, last 0.5 after step 20"
    assert lines[3] == f"next: pgrpo plot {tmp_path}, and pgrpo export {tmp_path} FOLDER"
