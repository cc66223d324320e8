"""Evaluation on the held-out split: mean rewards and pass@k with 95% confidence intervals, sampled and greedy."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from pgrpo.algorithm.metrics import group_metrics
from pgrpo.config import Config, ConfigError, to_json
from pgrpo.config.sampling import sampling_params
from pgrpo.distributed.world import World
from pgrpo.environments.episodes import Episodes
from pgrpo.environments.metrics import turn_metrics
from pgrpo.process.lock import refuse_links, run_folder
from pgrpo.rewards.runner import RewardRunner
from pgrpo.rollout.base import sample_seeds
from pgrpo.tracking.intervals import mean_interval, rate_interval
from pgrpo.tracking.record import TRAINING, replacing, shown, writing
from pgrpo.tracking.thumbnails import Pictures, Thumbnails, images_of, rows_of
from pgrpo.training.rollout import sample_and_score
from pgrpo.types import Episode, Group, Image, Prompt, SamplingParams

log = logging.getLogger(__name__)
Row = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Evaluation:
    """Results, the same on every rank.

    Attributes:
        metrics: ``eval/...`` of the samples, ``eval/greedy/...`` of the greedy completions: ``reward``, ``rewards/<name>/mean``,
            ``rewards/errors`` (samples left out because a reward failed), ``pass@k``, ``completions/...``. The ends of the
            intervals are ``eval/ci95_low/...`` and ``eval/ci95_high/...``.
        rows: one a completion, as JSON types.
        images: of all completions, for thumbnails.
    """

    metrics: dict[str, float]
    rows: list[Row]
    images: list[Image] = field(default_factory=list)


def evaluate(
    episodes: Episodes,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    seeds: Sequence[Sequence[int]],
    rewards: RewardRunner,
    world: World,
    *,
    greedy: bool,
) -> Evaluation:
    """Sample ``len(seeds[n])`` completions of each prompt, and with ``greedy`` a greedy one as well (unless ``params`` are greedy
    already). Ranks divide the prompts. ``RewardRunner.correct`` decides which completions are correct for pass@k: completions that
    it cannot judge are left out, and so is a prompt with fewer than k others. Without a prompt a metric is nan.
    """
    evaluation = Evaluation({}, [])

    def add(mode: str, params: SamplingParams, seeds: Sequence[Sequence[int]], rename: Callable[[str], str]) -> None:
        scored = sample_and_score(episodes, rewards, world, prompts, params, seeds, "evaluation")
        groups = world.gather(scored.groups)
        for name, value in _metrics(groups, scored.errors, rewards).items():
            evaluation.metrics[f"eval/{rename(name)}"] = value
        evaluation.rows.extend(result_rows(mode, groups, rewards))
        shown_images = (images_of(group.prompt, episode) for group in groups for episode in group.episodes)
        evaluation.images.extend(image for parts in shown_images for images in parts for image in images)

    add("sampled" if params.temperature else "greedy", params, seeds, str)
    if greedy and params.temperature:
        add("greedy", replace(params, temperature=0.0), [own[:1] for own in seeds], _greedy)
    return evaluation


def evaluate_held_out(
    config: Config,
    world: World,
    episodes: Episodes,
    rewards: RewardRunner,
    prompts: Sequence[Prompt],
    step: int,
    out: Path | None = None,
    pictures: Pictures | None = None,
) -> dict[str, float]:
    """Evaluate on the held-out split, with the same prompts and seeds each time. Returns the metrics. Rank 0 writes all completions
    and a summary to ``out`` (default: ``eval/step_N`` in the run folder, which gets thumbnails of images by ``pictures``). A
    collective call."""
    params, samples = sampling_params(config, config.eval.temperature), config.eval.samples
    seeds = [sample_seeds(config.seed, "eval", i, group_size=samples) for i in range(len(prompts))]
    with episodes.engine.awake(step):
        evaluation = evaluate(episodes, prompts, params, seeds, rewards, world, greedy=config.eval.greedy)
    if world.is_main:
        split = {"path": config.data.eval_path or config.data.path, "split": config.data.eval_split}
        about = {
            "step": step,
            "model": config.model.path,
            "prompts": len(prompts),
            "samples": samples,
            "data": split,
            "seed": config.seed,
            "sampling": asdict(params),
        }
        advice = "{fix}, or set another --out" if out else TRAINING
        save_results(out or own_folder(config, step), evaluation, about, advice)
        if out is None:
            Thumbnails(run_folder(config), pictures).keep(evaluation.images)
    return evaluation.metrics


def own_folder(config: Config, step: int) -> Path:
    """``eval/step_N`` in the run folder. Nothing is written through a symbolic link: one of that name is removed, one in place of
    ``eval`` is refused (``ConfigError``)."""
    refuse_links(run_folder(config))
    folder = run_folder(config) / "eval" / f"step_{step}"
    if folder.is_symlink():
        folder.unlink(missing_ok=True)
    return folder


def check_keep_best(config: Config, rewards: RewardRunner) -> None:
    """Refuse a ``checkpoint.keep_best`` that is not a metric of evaluation (``ConfigError``)."""
    if (name := config.checkpoint.keep_best) is None:
        return

    def names(samples: int) -> list[str]:
        episode = Episode([], "", "stop", 0.0, dict.fromkeys(rewards.names, 0.0))
        return list(_metrics([Group(Prompt(0, "", [0]), [episode] * samples)], 0, rewards))

    measured = names(config.eval.samples)
    if config.eval.greedy and sampling_params(config, config.eval.temperature).temperature:
        measured += map(_greedy, names(1))
    if name not in (known := [f"eval/{name}" for name in measured]):
        raise ConfigError(f"checkpoint.keep_best: {name} is not a metric of evaluation; there are {', '.join(known)}")


def numbers_of_samples(samples: int) -> list[int]:
    """Values of k for pass@k: powers of two up to ``samples``, and ``samples``."""
    return sorted({2**i for i in range(samples.bit_length())} | {samples})


def save_results(folder: Path, evaluation: Evaluation, about: Mapping[str, Any], advice: str = TRAINING) -> None:
    """Write ``samples.jsonl`` (``Evaluation.rows``) and ``summary.json`` (``about`` and the metrics). Creates the folder. Files are
    written atomically; numbers that are not finite become null. ``advice``: see ``record.writing``."""
    with writing(folder, advice):
        folder.mkdir(parents=True, exist_ok=True)
    metrics = {name: value if math.isfinite(value) else None for name, value in evaluation.metrics.items()}
    with replacing(folder / "samples.jsonl", advice) as file:
        file.writelines(to_json(row, ensure_ascii=False, allow_nan=False) + "\n" for row in evaluation.rows)
    with replacing(folder / "summary.json", advice) as file:
        file.write(to_json({**about, "metrics": metrics}, ensure_ascii=False, indent=1) + "\n")


def _metrics(groups: Sequence[Group], errors: int, rewards: RewardRunner) -> dict[str, float]:
    metrics = group_metrics(groups) | turn_metrics(groups) | {"rewards/errors": float(errors)}
    del metrics["reward_std"], metrics["frac_reward_zero_std"]  # they describe training's groups
    intervals = {"reward": mean_interval([_known(g.rewards) for g in groups])}
    for name in groups[0].episodes[0].reward_parts:
        intervals[f"rewards/{name}/mean"] = mean_interval([_known(g.reward_part(name)) for g in groups])
    correct = [_known(rewards.correct(group)) for group in groups]
    for k in numbers_of_samples(len(groups[0].episodes)):
        rates = [pass_at_k(sum(flags), len(flags), k) for flags in correct if len(flags) >= k]
        metrics[f"pass@{k}"] = sum(rates) / len(rates) if rates else math.nan
        intervals[f"pass@{k}"] = rate_interval(rates)
    for name, (low, high) in intervals.items():
        metrics |= {f"ci95_low/{name}": low, f"ci95_high/{name}": high}
    return metrics


def _greedy(name: str) -> str:
    """``pass@1`` -> ``greedy/pass@1``; ``ci95_low/pass@1`` -> ``ci95_low/greedy/pass@1``."""
    end, _, rest = name.partition("/")
    return f"{end}/greedy/{rest}" if end in ("ci95_low", "ci95_high") else f"greedy/{name}"


def result_rows(mode: str, groups: Sequence[Group], rewards: RewardRunner) -> Iterator[Row]:
    """One row a completion, as JSON types."""
    for group in groups:
        for i, (episode, correct) in enumerate(zip(group.episodes, rewards.correct(group), strict=True)):
            yield {
                "index": group.prompt.index,
                "mode": mode,
                "sample": i,
                **shown(group.prompt, episode),
                **rows_of(group.prompt, episode),
                "reward": episode.reward,
                "parts": episode.reward_parts,
                "correct": correct,
                "tokens": episode.sampled_tokens,
                "finish_reason": episode.finish_reason,
                "columns": group.prompt.columns,
            }


def _known(values: Sequence[T | None]) -> list[T]:
    return [value for value in values if value is not None]


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of k samples is correct (Codex, arXiv 2107.03374, equation 1)."""
    failure = 1.0
    for i in range(k):
        failure *= max(samples - correct - i, 0) / (samples - i)
    return 1.0 - failure
