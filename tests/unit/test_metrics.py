"""Metrics of groups by hand; pass@k against enumeration of all draws."""

import itertools
import math

import pytest
import torch

from pgrpo.distributed import World
from pgrpo.evaluate import evaluate
from pgrpo.metrics import group_metrics, pass_at_k
from pgrpo.rewards.run import RewardReport, RewardRunner
from pgrpo.types import Completion, Group, Prompt, SamplingParams


def make_group(rewards, lengths, reasons, **parts):
    completions = [
        Completion([0] * n, [0.0] * n, [True] * n, reason, "") for n, reason in zip(lengths, reasons, strict=True)
    ]
    return Group(Prompt(0, "", [0]), completions, rewards, parts)


def test_pass_at_k_is_the_chance_over_all_draws_without_replacement():
    for samples in range(1, 8):
        for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
            draws = list(itertools.combinations(range(samples), k))
            hits = sum(any(i < correct for i in draw) for draw in draws)
            assert pass_at_k(correct, samples, k) == pytest.approx(hits / len(draws), abs=1e-14)
            closed_form = 1 - math.comb(samples - correct, k) / math.comb(samples, k)
            assert pass_at_k(correct, samples, k) == pytest.approx(closed_form, abs=1e-14)


def test_pass_at_k_of_many_samples_does_not_overflow():
    assert pass_at_k(1, 10_000, 5_000) == pytest.approx(0.5, abs=1e-9)
    assert pass_at_k(0, 10_000, 10_000) == 0.0
    assert pass_at_k(1, 10_000, 10_000) == 1.0


def test_group_metrics_by_hand():
    groups = [
        make_group([1.0, 3.0, None], [2, 4, 9], ["stop", "length", "length"], f=[1.0, None, None], g=[0.0, 3.0, None]),
        make_group([5.0, 5.0], [0, 5], ["stop", "stop"], f=[2.0, 6.0], g=[3.0, -1.0]),
        make_group([None, None], [1, 1], ["stop", "stop"], f=[None, None], g=[None, None]),
    ]
    assert group_metrics(groups) == pytest.approx({
        "reward": 14 / 4,  # over samples, not over groups
        "reward_std": (math.sqrt(2) + 0) / 2,
        "frac_reward_zero_std": 2 / 3,
        "completions/mean_length": 22 / 7,
        "completions/min_length": 0,
        "completions/max_length": 9,
        "completions/clipped_ratio": 2 / 7,
        "rewards/f/mean": 3.0,
        "rewards/g/mean": 5 / 4,
    })  # fmt: skip


def test_a_mean_of_nothing_is_nan_not_zero():
    metrics = group_metrics([make_group([None], [1], ["stop"], f=[None])])
    assert math.isnan(metrics["reward"])
    assert math.isnan(metrics["rewards/f/mean"])


class Scorer(RewardRunner):
    """Stands in for the reward runner: the prompt's column says what each sample gets."""

    def __init__(self):
        pass

    def score(self, groups):
        for group in groups:
            group.rewards = list(group.prompt.columns["rewards"])
            group.reward_parts = {"f": list(group.rewards)}
        return RewardReport(errors=0)


def test_evaluate():
    rewards = [[1.0, 0.0, 0.0], [0.5, None, 0.0], [1.0, 2.0, 1.0], [0.0, 0.0, 0.99]]
    prompts = [Prompt(i, "", [0], {"rewards": r}) for i, r in enumerate(rewards)]
    params = SamplingParams(max_completion_tokens=4)
    seeds = [[10 * i, 10 * i + 1, 10 * i + 2] for i in range(4)]

    def generate(prompts, asked, asked_seeds):
        assert (asked, asked_seeds) == (params, seeds)
        completion = Completion([0], [0.0], [True], "stop", "")
        return [Group(p, [completion] * 3) for p in prompts]

    world = World(0, 1, torch.device("cpu"))
    metrics, groups = evaluate(generate, prompts, params, seeds, Scorer(), world, full_score=1.0)
    assert [g.prompt.index for g in groups] == [0, 1, 2, 3]
    assert metrics["eval/pass@1"] == pytest.approx((1 + 0 + 3 + 0) / 12)
    assert metrics["eval/pass@3"] == pytest.approx(2 / 4)
    assert metrics["eval/reward"] == pytest.approx(6.49 / 11) == metrics["eval/rewards/f/mean"]
    assert "eval/reward_std" not in metrics


@pytest.mark.parametrize("count", [1, 3, 4])
def test_evaluate_on_two_ranks_scores_each_prompt_once(count):
    """Ranks take turns in one process: what ``gather`` brings is put together by hand."""

    prompts = [Prompt(i, "", [0], {"rewards": [float(i == 0)]}) for i in range(count)]
    asked: list[list[int]] = []

    def generate(prompts, _params, seeds):
        assert [s for (s,) in seeds] == [p.index for p in prompts]
        asked.append([p.index for p in prompts])
        return [Group(p, [Completion([0], [0.0], [True], "stop", "")]) for p in prompts]

    class Pair(World):
        def together(self, work, *, break_off=False):
            """Nobody stops them."""
            return work()

        def gather(self, items):
            scored = [Group(p, [Completion([0], [0.0], [True], "stop", "")]) for p in (prompts + prompts[-1:])]
            Scorer().score(scored)
            half = len(items)
            return items + scored[half : 2 * half] if self.rank == 0 else scored[:half] + items

    results = [
        evaluate(
            generate, prompts, SamplingParams(4), [[i] for i in range(count)], Scorer(), Pair(r, 2, torch.device("cpu")),
            full_score=1.0,
        )
        for r in range(2)
    ]  # fmt: skip
    assert len(asked[0]) == len(asked[1])  # both ranks decode the same number
    assert sorted({i for part in asked for i in part}) == list(range(count))
    for metrics, groups in results:
        assert [g.prompt.index for g in groups] == list(range(count))
        assert metrics["eval/pass@1"] == pytest.approx(1 / count)
