"""Evaluation of a run: its prompts, sampling and files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from pgrpo.rollout.base import sample_seeds, sampling_params
from pgrpo.training.evaluate import evaluate, save_results
from pgrpo.training.run import Run


def evaluate_run(run: Run, out: Path | None = None) -> dict[str, float]:
    """Numbers on the held-out split; the same prompts and random numbers each time. Rank 0 writes all completions and a summary
    to ``out``, without it to the run folder's ``eval/step_N``."""
    config = run.config
    params = sampling_params(config, config.eval.temperature)
    with run.engine.awake():
        evaluation = evaluate(
            run.engine.generate,
            run.held_out,
            params,
            [sample_seeds(config.seed, "eval", i, group_size=config.eval.samples) for i in range(len(run.held_out))],
            run.rewards,
            run.world,
            greedy=config.eval.greedy,
        )
    if run.world.is_main:
        about = {
            "step": run.progress.step,
            "model": config.model.path,
            "prompts": len(run.held_out),
            "samples": config.eval.samples,
        }
        split = {"path": config.data.eval_path or config.data.path, "split": config.data.eval_split}
        about |= {"data": split, "seed": config.seed, "sampling": asdict(params)}
        if out:
            save_results(out, evaluation, about, "{fix}, or set another --out")
        else:
            save_results(own_folder(run), evaluation, about)
    return evaluation.metrics


def own_folder(run: Run) -> Path:
    """The run folder's ``eval/step_N``. A symbolic link of that name is removed, so that nothing is written through it."""
    folder = run.run_dir / "eval" / f"step_{run.progress.step}"
    if folder.is_symlink():
        folder.unlink(missing_ok=True)
    return folder
