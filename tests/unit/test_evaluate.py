"""Evaluation with scripted rewards, by hand: two modes, what is correct, ranks, files."""

from __future__ import annotations

import json
import math
import os
import resource
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from making import episode, generate, group

from pgrpo.commands import check
from pgrpo.config import Config, RewardConfig
from pgrpo.distributed.world import World
from pgrpo.environments.episodes import SingleTurn
from pgrpo.rewards.runner import RewardReport, RewardRunner
from pgrpo.tracking.intervals import mean_interval, wilson
from pgrpo.training.evaluation import evaluate, numbers_of_samples, own_folder, save_results
from pgrpo.types import Completion, Group, Prompt, SamplingParams

WORLD = World(0, 1, torch.device("cpu"))
PARAMS = SamplingParams(max_completion_tokens=4)


class Scorer(RewardRunner):
    """Stands in for the reward runner: the prompt's column says what each sample gets, the greedy one the last of it."""

    def __init__(self):
        pass

    def begin(self):
        return SimpleNamespace(add=lambda *_: None, finish=self.score)

    def score(self, groups):
        for each in groups:
            given = each.prompt.columns["rewards"]
            for one, reward in zip(each.episodes, given if len(each.episodes) > 1 else given[-1:], strict=True):
                one.reward, one.reward_parts = reward, {"f": reward}
        return RewardReport(errors=0)

    def correct(self, group):
        return [None if r is None else r >= 1 for r in group.rewards]


class Engine:
    """Completions of 1, 2, ... tokens. ``asked``: parameters, first tokens and seeds of each call."""

    def __init__(self):
        self.asked, self.counted_bytes = [], 0
        self.metrics: dict[str, float] = {}
        self.notes: list[str] = []

    def awake(self, version):
        return nullcontext()

    def close(self):
        """Nothing is open."""

    def sample(self, requests, params, on_finished, more=None):
        self.asked.append((params, [r.token_ids[0] for r in requests], [r.seeds for r in requests]))
        text = "greedy" if params.temperature == 0 else "sampled"
        for position, (_, seeds, *_) in enumerate(requests):
            sizes = range(1, len(seeds) + 1)
            on_finished(position, [Completion([0] * n, [0.0] * n, "stop", text) for n in sizes])


REWARDS = [[1.0, 0.0, 0.0], [0.5, None, 0.0], [1.0, 2.0, 1.0], [0.0, 0.0, 0.99]]
PROMPTS = [Prompt(7 + i, f"{i}+", [0], {"rewards": r}) for i, r in enumerate(REWARDS)]
SEEDS = [[10 * i, 10 * i + 1, 10 * i + 2] for i in range(4)]


def test_evaluate_samples_and_greedily():
    engine = Engine()
    got = evaluate(SingleTurn(engine), PROMPTS, PARAMS, SEEDS, Scorer(), WORLD, greedy=True)
    assert [(params, seeds) for params, _, seeds in engine.asked] == [
        (PARAMS, SEEDS),
        (replace(PARAMS, temperature=0.0), [own[:1] for own in SEEDS]),
    ]
    metrics = got.metrics
    # The second prompt's failed sample is left out, and with it the prompt where three are needed.
    assert metrics["eval/pass@1"] == pytest.approx((1 / 3 + 0 / 2 + 3 / 3 + 0 / 3) / 4)
    assert metrics["eval/pass@2"] == pytest.approx(
        (2 / 3 + 0 + 1 + 0) / 4
    )  # two of three draws hold the one right sample
    assert metrics["eval/pass@3"] == pytest.approx(2 / 3)
    assert metrics["eval/reward"] == pytest.approx(6.49 / 11) == metrics["eval/rewards/f/mean"]
    assert metrics["eval/greedy/pass@1"] == 1 / 4
    assert metrics["eval/greedy/reward"] == pytest.approx(1.99 / 4) == metrics["eval/greedy/rewards/f/mean"]
    assert (metrics["eval/completions/mean_length"], metrics["eval/greedy/completions/mean_length"]) == (2.0, 1.0)
    ends = {name: (metrics[f"eval/ci95_low/{name}"], metrics[f"eval/ci95_high/{name}"]) for name in (
        "reward", "rewards/f/mean", "pass@1", "pass@2", "pass@3", "greedy/reward", "greedy/rewards/f/mean", "greedy/pass@1"
    )}  # fmt: skip
    assert ends["reward"] == mean_interval([[1, 0, 0], [0.5, 0], [1, 2, 1], [0, 0, 0.99]]) == ends["rewards/f/mean"]
    assert ends["greedy/reward"] == mean_interval([[0.0], [0.0], [1.0], [0.99]])
    assert ends["pass@3"] == pytest.approx(wilson(2 / 3, 3)) and ends["greedy/pass@1"] == pytest.approx(wilson(0.25, 4))
    assert len([name for name in metrics if "ci95" in name]) == 2 * len(ends)
    assert all(low <= metrics[f"eval/{name}"] <= high for name, (low, high) in ends.items())
    assert not {"eval/reward_std", "eval/frac_reward_zero_std", "eval/greedy/pass@3"} & metrics.keys()


@pytest.mark.parametrize(("greedy", "temperature", "modes"), [(False, 1.0, {"sampled"}), (True, 0.0, {"greedy"})])
def test_one_mode(greedy, temperature, modes):
    params = replace(PARAMS, temperature=temperature)
    got = evaluate(SingleTurn(Engine()), PROMPTS, params, SEEDS, Scorer(), WORLD, greedy=greedy)
    assert {row["mode"] for row in got.rows} == modes and len(got.rows) == 12
    assert not [name for name in got.metrics if "greedy" in name]


def test_numbers_of_samples():
    assert [numbers_of_samples(n) for n in (1, 2, 3, 8, 12)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 12]]


def test_files_have_every_completion_and_the_summary(tmp_path):
    prompts = [PROMPTS[1], replace(PROMPTS[2], text="lone \udc80 <é>", columns=PROMPTS[2].columns | {"when": {1, 2}})]
    got = evaluate(SingleTurn(Engine()), prompts, PARAMS, SEEDS[:2], Scorer(), WORLD, greedy=True)
    got.metrics["eval/odd"] = math.nan
    for _ in range(2):  # again: replaced
        save_results(tmp_path / "eval" / "step_3", got, {"step": 3})
    assert sorted(p.name for p in (tmp_path / "eval" / "step_3").iterdir()) == ["samples.jsonl", "summary.json"]
    text = (tmp_path / "eval" / "step_3" / "samples.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert rows[1] == {
        "index": 8, "mode": "sampled", "sample": 1, "prompt": "1+", "completion": "sampled", "reward": None,
        "parts": {"f": None}, "correct": None, "tokens": 2, "finish_reason": "stop", "columns": {"rewards": [0.5, None, 0.0]},
    }  # fmt: skip
    assert [(row["index"], row["mode"], row["sample"], row["correct"]) for row in rows[3:]] == [
        (9, "sampled", 0, True), (9, "sampled", 1, True), (9, "sampled", 2, True), (8, "greedy", 0, False), (9, "greedy", 0, True),
    ]  # fmt: skip
    assert rows[3]["prompt"] == "lone \udc80 <é>" and rows[3]["columns"]["when"] == "{1, 2}"
    summary = json.loads((tmp_path / "eval" / "step_3" / "summary.json").read_text())
    finite = {name: value if math.isfinite(value) else None for name, value in got.metrics.items()}
    assert summary["step"] == 3 and summary["metrics"] == finite and finite["eval/odd"] is None


@pytest.mark.faults
def test_a_full_disk_while_an_evaluation_is_written_is_named(tmp_path):
    got = evaluate(SingleTurn(Engine()), PROMPTS, PARAMS, SEEDS, Scorer(), WORLD, greedy=False)
    save_results(tmp_path, got, {"step": 3})
    before = (tmp_path / "samples.jsonl").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(RuntimeError, match=r"samples\.jsonl: cannot be written \(File too large\); .*make room"):
            save_results(tmp_path, got, {"step": 6})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "samples.jsonl").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["samples.jsonl", "summary.json"], "nothing half-written"
    with pytest.raises(
        RuntimeError, match=r"null/x: cannot be written \(Not a directory\); see that /dev/null is there and can be"
    ):
        save_results(Path("/dev/null/x"), got, {"step": 6}, "{fix}, or set another --out")


@pytest.mark.faults
def test_links_among_a_runs_evaluations_are_not_written_through(tmp_path):
    elsewhere, run_dir = tmp_path / "elsewhere", tmp_path / "run"
    elsewhere.mkdir()
    (elsewhere / "samples.jsonl").write_text("mine")
    (run_dir / "eval").mkdir(parents=True)
    (run_dir / "eval" / "step_3").symlink_to(elsewhere)
    folder = own_folder(Config(run_dir=str(run_dir)), 3)
    got = evaluate(SingleTurn(Engine()), PROMPTS, PARAMS, SEEDS, Scorer(), WORLD, greedy=False)
    for name in ("samples.jsonl", f".summary.json.{os.getpid()}"):
        folder.mkdir(exist_ok=True)
        (folder / name).symlink_to(elsewhere / "samples.jsonl")
        save_results(folder, got, {"step": 3})
        assert not (folder / "samples.jsonl").is_symlink() and not (folder / "summary.json").is_symlink()
    assert [p.name for p in elsewhere.iterdir()] == ["samples.jsonl"]
    assert (elsewhere / "samples.jsonl").read_text() == "mine" and not folder.is_symlink()


class Pair(World):
    """One of two ranks that take turns in one process. ``gather`` computes the other's part of ``everything()``."""

    everything: Callable[[], list[Group]]

    def together(self, work, *, break_off=False):
        """No rank is stopped."""
        return work()

    def sum(self, values):
        """No reward failed on the other rank."""
        return values

    def gather(self, items):
        everything = self.everything()
        half = -(-len(everything) // 2)
        return items + everything[half:] if self.rank == 0 else everything[:half] + items


def scored_groups(prompts, samples):
    groups = generate(Engine(), prompts, PARAMS, [[0] * samples] * len(prompts))
    Scorer().score(groups)
    return groups


@pytest.mark.parametrize("count", [1, 3, 4])
def test_on_two_ranks_each_prompt_is_scored_once(count, monkeypatch):
    prompts = [Prompt(i, "", [i], {"rewards": [float(i == 0)]}) for i in range(count)]
    engine = Engine()
    monkeypatch.setattr(Pair, "everything", lambda _: scored_groups(prompts, 1), raising=False)
    seeds = [[i] for i in range(count)]
    results = [
        evaluate(SingleTurn(engine), prompts, PARAMS, seeds, Scorer(), Pair(r, 2, torch.device("cpu")), greedy=False)
        for r in range(2)
    ]
    assert all(seeds == [[first] for first in firsts] for _, firsts, seeds in engine.asked)
    asked = [firsts for _, firsts, _ in engine.asked]
    assert len(asked[0]) == len(asked[1])  # both ranks decode the same number
    assert sorted({i for part in asked for i in part}) == list(range(count))
    for got in results:
        assert [row["index"] for row in got.rows] == list(range(count))
        assert got.metrics["eval/pass@1"] == pytest.approx(1 / count)


def test_check_scores_each_sample_on_one_rank(monkeypatch):
    """So that a judge is paid once; every rank gets all groups, for the comparison that follows."""
    prompts = [Prompt(i, "", [i], {"rewards": [float(i), 0.5]}) for i in range(4)]
    asked: list[int] = []

    class Judge(Scorer):
        def score(self, groups):
            asked.extend(group.prompt.index for group in groups)
            return super().score(groups)

    monkeypatch.setattr(Pair, "everything", lambda _: scored_groups(prompts, 2), raising=False)
    stream = SimpleNamespace(take=lambda number: prompts[:number])
    for rank in range(2):
        world = Pair(rank, 2, torch.device("cpu"))
        parts: Any = SimpleNamespace(
            stream=stream, engine=Engine(), episodes=SingleTurn(Engine()), rewards=Judge(), world=world
        )
        assert [g.rewards for g in check._sample(parts, Config())] == [[float(i), 0.5] for i in range(4)]
    assert asked == [0, 1, 2, 3]


def test_correct_is_what_every_judge_calls_right_whatever_penalties_say(tmp_path):
    """Of the recipe `math`: a length penalty, whose best is 0, must not make a right answer wrong."""
    (tmp_path / "own.py").write_text(
        "def judge(completions, **_):\n    return [{'right': 1.0, 'half': 0.5, 'none': None}[c] for c in completions]\n"
        "def bad(completions, **_):\n    return [1.0 for c in completions]\n"
    )
    functions = [
        RewardConfig(f"{tmp_path}/own.py:judge", 0.7),
        RewardConfig("format_regex", 0.2, {"pattern": "right|half"}),
        RewardConfig("soft_overlong", 0.5, {"max_tokens": 4, "cache_tokens": 4}),
        RewardConfig("length", 1.0, {"max_tokens": 1}),
        RewardConfig(f"{tmp_path}/own.py:bad", -1.0),
    ]
    with RewardRunner(functions, on_error="raise") as runner:
        sizes = (("right", 2), ("half", 2), ("none", 1), ("right", 4))
        scored = group([0], *(episode([0] * n, text=c) for c, n in sizes))
        runner.score([scored])
        assert runner.correct(scored) == [True, False, False, True]
        assert [r is not None and r < 0 for r in scored.rewards] == [True] * 4  # penalties did apply
        scored.episodes[0].reward = None  # a reward failed on it
        assert runner.correct(scored)[0] is None
    with RewardRunner([RewardConfig("length", 1.0, {"max_tokens": 1})], on_error="raise") as runner:
        runner.score([scored])
        assert runner.correct(scored) == [None] * 4  # nothing says what is right


def test_samples_whose_reward_failed_are_not_wrong_in_pass_at_k():
    """Half of the samples failed: the same rates as without them. All failed: no rate, rather than 0."""
    rewards = [[1.0, None, 0.0, None], [None, None, 1.0, 1.0], [None] * 4]
    prompts = [Prompt(i, f"{i}", [i], {"rewards": r}) for i, r in enumerate(rewards)]
    got = evaluate(SingleTurn(Engine()), prompts, PARAMS, [[1, 2, 3, 4]] * 3, Scorer(), WORLD, greedy=False).metrics
    assert (got["eval/pass@1"], got["eval/pass@2"]) == (pytest.approx((1 / 2 + 1) / 2), 1.0)
    assert math.isnan(got["eval/pass@4"]) and math.isnan(got["eval/ci95_low/pass@4"])
