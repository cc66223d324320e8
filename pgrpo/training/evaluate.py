"""What a model does on the held-out split: mean rewards and pass@k with 95% confidence intervals, greedy and sampled."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from pgrpo.algorithm.intervals import mean_interval, rate_interval
from pgrpo.algorithm.metrics import group_metrics, pass_at_k
from pgrpo.config import Config, ConfigError, to_json
from pgrpo.distributed.world import World
from pgrpo.rewards.runner import RewardRunner
from pgrpo.rollout.base import sampling_params
from pgrpo.tracking.record import TRAINING, replacing, writing
from pgrpo.types import Completion, Group, Prompt, SamplingParams

log = logging.getLogger(__name__)
Generate = Callable[[Sequence[Prompt], SamplingParams, Sequence[Sequence[int]]], list[Group]]
Row = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """On every rank.

    Attributes:
        metrics: ``eval/...`` of the samples, ``eval/greedy/...`` of the greedy completions: ``reward``, ``rewards/<name>/mean``,
            ``rewards/errors`` (samples left out, as a reward failed), ``pass@k``, ``completions/...``; the ends of the intervals
            are ``eval/ci95_low/...`` and ``eval/ci95_high/...``.
        rows: one a completion, as JSON types.
    """

    metrics: dict[str, float]
    rows: list[Row]


def evaluate(
    generate: Generate,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    seeds: Sequence[Sequence[int]],
    rewards: RewardRunner,
    world: World,
    *,
    greedy: bool,
) -> Evaluation:
    """Sample ``len(seeds[n])`` completions of each prompt, and with ``greedy`` a greedy one as well (unless ``params`` are greedy
    already); ranks share the prompts out. What is correct for pass@k, ``RewardRunner.correct`` says.
    """
    sampled = _scored(generate, prompts, params, seeds, rewards, world)
    metrics = _metrics(sampled, rewards)
    rows = list(_rows("greedy" if params.temperature == 0 else "sampled", sampled.groups, rewards))
    if greedy and params.temperature != 0:
        once = replace(params, temperature=0.0)
        best = _scored(generate, prompts, once, [own[:1] for own in seeds], rewards, world)
        metrics |= {_greedy(name): value for name, value in _metrics(best, rewards).items()}
        rows += _rows("greedy", best.groups, rewards)
    return Evaluation({f"eval/{name}": value for name, value in metrics.items()}, rows)


def metric_names(rewards: RewardRunner, params: SamplingParams, samples: int, *, greedy: bool) -> list[str]:
    """The names of what ``evaluate`` will measure."""

    def names(count: int) -> list[str]:
        zeros: list[float | None] = [0.0] * count
        completions = [Completion([0], [0.0], [True], "stop", "")] * count
        group = Group(Prompt(0, "", [0]), completions, zeros, dict.fromkeys(rewards.names, zeros))
        return list(_metrics(_Scored([group], 0), rewards))

    found = names(samples)
    if greedy and params.temperature != 0:
        found += map(_greedy, names(1))
    return [f"eval/{name}" for name in found]


def check_keep_best(config: Config, rewards: RewardRunner) -> None:
    """ConfigError: evaluation has no metric ``checkpoint.keep_best``."""
    if (name := config.checkpoint.keep_best) is None:
        return
    params = sampling_params(config, config.eval.temperature)
    there = metric_names(rewards, params, config.eval.samples, greedy=config.eval.greedy)
    if name not in there:
        raise ConfigError(f"checkpoint.keep_best: {name} is no metric of an evaluation; there are {', '.join(there)}")


def numbers_of_samples(samples: int) -> list[int]:
    """The k of pass@k: powers of two up to ``samples``, and ``samples``."""
    return sorted({2**i for i in range(samples.bit_length())} | {samples})


def save_results(folder: Path, evaluation: Evaluation, about: Mapping[str, Any], advice: str = TRAINING) -> None:
    """Write ``samples.jsonl`` (``Evaluation.rows``) and ``summary.json`` (``about`` and the metrics) into a folder that is made.
    Each file is there whole or not at all; a number that is not finite is null. ``advice`` is that of ``record.writing``."""
    with writing(folder, advice):
        folder.mkdir(parents=True, exist_ok=True)
    metrics = {name: value if math.isfinite(value) else None for name, value in evaluation.metrics.items()}
    with replacing(folder / "samples.jsonl", advice) as file:
        file.writelines(to_json(row, ensure_ascii=False, allow_nan=False) + "\n" for row in evaluation.rows)
    with replacing(folder / "summary.json", advice) as file:
        file.write(to_json({**about, "metrics": metrics}, ensure_ascii=False, indent=1) + "\n")


def _scored(
    generate: Generate,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    seeds: Sequence[Sequence[int]],
    rewards: RewardRunner,
    world: World,
) -> _Scored:
    (own_prompts, count), (own_seeds, _) = world.share(prompts), world.share(seeds)
    groups = generate(own_prompts, params, own_seeds)[:count]
    report = world.together(lambda: rewards.score(groups if world.leads else []), break_off=True)
    if report.first_error:
        log.warning("evaluation: %d completions are left out; the first: %s", report.errors, report.first_error)
    return _Scored(world.gather(groups), sum(world.gather([report.errors])))


class _Scored(NamedTuple):
    """One group a prompt, on every rank; ``errors``: samples left out because a reward failed on them."""

    groups: list[Group]
    errors: int


def _metrics(scored: _Scored, rewards: RewardRunner) -> dict[str, float]:
    groups = scored.groups
    metrics = group_metrics(groups) | {"rewards/errors": float(scored.errors)}
    del metrics["reward_std"], metrics["frac_reward_zero_std"]  # of groups as training compares them
    intervals = {"reward": mean_interval([_known(g.rewards) for g in groups])}
    for name in groups[0].reward_parts:
        intervals[f"rewards/{name}/mean"] = mean_interval([_known(g.reward_parts[name]) for g in groups])
    correct = [rewards.correct(group) for group in groups]
    for k in numbers_of_samples(len(correct[0])):
        rates = [pass_at_k(sum(flags), len(flags), k) for flags in correct]
        metrics[f"pass@{k}"] = sum(rates) / len(rates)
        intervals[f"pass@{k}"] = rate_interval(rates)
    for name, (low, high) in intervals.items():
        metrics |= {f"ci95_low/{name}": low, f"ci95_high/{name}": high}
    return metrics


def _greedy(name: str) -> str:
    """``pass@1`` is ``greedy/pass@1``, its ``ci95_low/pass@1`` is ``ci95_low/greedy/pass@1``."""
    end, _, rest = name.partition("/")
    return f"{end}/greedy/{rest}" if end in ("ci95_low", "ci95_high") else f"greedy/{name}"


def _rows(mode: str, groups: Sequence[Group], rewards: RewardRunner) -> Iterator[Row]:
    for group in groups:
        for i, (completion, correct) in enumerate(zip(group.completions, rewards.correct(group), strict=True)):
            yield {
                "index": group.prompt.index,
                "mode": mode,
                "sample": i,
                "prompt": group.prompt.text,
                "completion": completion.text,
                "reward": group.rewards[i],
                "parts": {name: values[i] for name, values in group.reward_parts.items()},
                "correct": correct,
                "tokens": len(completion.token_ids),
                "finish_reason": completion.finish_reason,
                "columns": group.prompt.columns,
            }


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]
