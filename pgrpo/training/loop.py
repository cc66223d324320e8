"""The training loop: sample completions, score them, compare within groups, update, and again."""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from pgrpo.algorithm.advantages import step_advantages
from pgrpo.algorithm.metrics import group_metrics
from pgrpo.checkpoint import CheckpointError, set_aside_after, tidy
from pgrpo.config import REDACTED, Config, check_world_size, redact, to_json, to_yaml
from pgrpo.distributed import world as distributed
from pgrpo.distributed.world import World
from pgrpo.planning.flops import peak_flops
from pgrpo.planning.placement import engine_choice, engine_name, vllm_memory_share
from pgrpo.process.lock import check_shared, open_run_dir
from pgrpo.process.signals import stop_signals
from pgrpo.process.stopping import Stopped
from pgrpo.tracking import Trackers, check_services
from pgrpo.tracking.record import replacing
from pgrpo.training.evaluation import evaluate_run
from pgrpo.training.optim import learning_rate, set_learning_rate
from pgrpo.training.run import Run, agree_on_run_dir, build_run, group_cost, run_folder
from pgrpo.training.sample import sample_step
from pgrpo.training.update import NonFiniteError
from pgrpo.types import Group

log = logging.getLogger(__name__)
GIB = 2**30
WINDOW = 10
"""Steps whose mean reward is compared with ``train.target_reward``."""


def train(
    config: Config,
    *,
    rewards: Sequence[Callable[..., Any]] = (),
    dataset: Iterable[Mapping[str, Any]] | None = None,
    resume: str | Path | None = None,
) -> Path:
    """Run a training to its end and return its folder.

    Args:
        config: from ``load_config``.
        rewards: reward functions beside those that the config names, each of weight 1.
        dataset: rows, instead of ``data.path``.
        resume: a checkpoint folder, or ``auto`` for the newest of ``run_dir`` (none there: start from the beginning), or ``best``
            for the one that ``checkpoint.keep_best`` kept.

    Raises:
        ConfigError: the input is wrong; nothing was trained.
        SystemExit: 130 after Ctrl-C, 143 after SIGTERM, once a checkpoint was saved.
    """
    with (
        distributed.start(config.model.fsdp_size) as world,
        _run_folder(config, world, resume is not None),
        stop_signals(world.stop),
        _built(config, world, rewards, dataset) as run,
    ):
        tracker_state = run.checkpoints.restore(resume)
        run.mark()
        if run.progress.step == 0 and tracker_state is None and config.eval.every:
            run.progress.unlogged = {}
        if resume and world.is_main:
            for folder in ("checkpoints", "eval"):
                set_aside_after(run.run_dir / folder, run.progress.step)
        with (
            closing(Trackers(config, run.run_dir, resume=tracker_state)) if world.is_main else nullcontext() as trackers
        ):
            if world.is_main:  # not before all of the input was found right, and the checkpoint this model's
                with replacing(run.run_dir / "config.yaml") as file:
                    file.write(to_yaml(config))
            _loop(run, trackers)
    return run_folder(config)


def _loop(run: Run, trackers: Trackers | None) -> None:
    progress, total = run.progress, run.config.train.steps
    if trackers:
        trackers.message(_summary(run))
    try:
        if progress.unlogged is not None:
            _finish_step(run, trackers)
        while not _is_done(run):
            run.world.check_stop()
            with _out_of_memory_explained(run):
                groups, progress.unlogged = one_step(run)
            progress.step += 1
            progress.recent_rewards = [*progress.recent_rewards, progress.unlogged["reward"]][-WINDOW:]
            if trackers:
                trackers.completions(progress.step, groups)
            _finish_step(run, trackers)
    except Stopped as stopped:
        _save_last_finished(run, trackers)
        log.warning("stopped after step %d of %d, saved; go on with --resume auto", progress.step, total)
        raise SystemExit(128 + stopped.signum) from None
    except Exception as error:
        _rescue(run, trackers, error)
        raise
    if progress.step < total:
        target = run.config.train.target_reward
        text = "train.target_reward=%s reached: mean reward of the last %d steps %.4g; done after step %d of %d, saved"
        log.warning(text, target, WINDOW, sum(progress.recent_rewards) / WINDOW, progress.step, total)


def _save_last_finished(run: Run, trackers: Trackers | None) -> None:
    """Drop the step that was begun and save the one before, durably."""
    run.drop()
    run.checkpoints.save(trackers.state_dict() if trackers else {})
    run.checkpoints.wait()


def _rescue(run: Run, trackers: Trackers | None, error: Exception) -> None:
    """Save the last finished step after a failure in the next one, if that has changed nothing yet and all ranks know of it."""
    known = run.world.size == 1 or isinstance(error, NonFiniteError) or distributed.all_ranks_know(error)
    if not known or not run.progress.step or run.updater.has_moved or isinstance(error, CheckpointError):
        return
    try:
        _save_last_finished(run, trackers)
    except Exception as another:  # what ended the run is told by its own exception
        log.error("step %d could not be saved: %s", run.progress.step, another)
    else:
        log.warning(
            "failed after step %d of %d, saved; go on with --resume auto", run.progress.step, run.config.train.steps
        )


def _is_done(run: Run) -> bool:
    """After the last step, or when rewards are good enough. All ranks see the same rewards."""
    target, recent = run.config.train.target_reward, run.progress.recent_rewards
    reached = target is not None and len(recent) == WINDOW and sum(recent) / WINDOW >= target
    return reached or run.progress.step >= run.config.train.steps


def _finish_step(run: Run, trackers: Trackers | None) -> None:
    """Evaluate, log and save, where it is time for it."""
    config, progress, done = run.config, run.progress, _is_done(run)
    run.mark()
    metrics, best = progress.unlogged or {}, False
    if config.eval.every and (progress.step % config.eval.every == 0 or done):
        metrics = metrics | evaluate_run(run)
        best = progress.is_best(config.checkpoint.keep_best, metrics)
    if trackers:
        trackers.log(progress.step, metrics)
    progress.unlogged = None
    run.mark()
    due = config.checkpoint.every and progress.step and progress.step % config.checkpoint.every == 0
    if due or best or done:
        run.checkpoints.save(trackers.state_dict() if trackers else {})
    elif progress.step and config.checkpoint.every:
        run.checkpoints.reserve()
    if run.world.any(run.checkpoints.failed):
        run.checkpoints.wait()


def one_step(run: Run) -> tuple[list[Group], dict[str, float]]:
    """One step: groups of scored completions, the updates they give, and what to log."""
    config, world = run.config, run.world
    started = time.perf_counter()
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if config.loss.ref_refresh_every and run.progress.step and run.progress.step % config.loss.ref_refresh_every == 0:
        run.updater.refresh_reference()
    sampled, loss = sample_step(run), config.loss
    if run.engine.counted_bytes:  # what an engine of its own took in the rollout is its affair
        torch.cuda.reset_peak_memory_stats()
    groups = sampled.groups  # rank 0 has them; the others get what they train on from the updater
    advantages = step_advantages([g.rewards for g in groups], loss.scale_advantages, loss.advantage_baseline)
    for group, values in zip(groups, advantages, strict=True):
        group.advantages = values
    scored = time.perf_counter()

    lr = learning_rate(config.optim, run.progress.step, config.train.steps)
    set_learning_rate(run.updater.optimizer, lr)
    if run.canary:
        run.canary.before_update(run.progress.step, groups)
    try:
        rewards = world.from_main(group_metrics(sampled.all_groups) if world.is_main else {})
        metrics = rewards | run.updater.step(groups)
    except NonFiniteError as error:
        raise NonFiniteError(f"{error}; {_dump(run, groups)}") from None
    if run.canary:
        run.canary.after_update()
    world.synchronize()
    done = time.perf_counter()
    trained_flops = sum(group_cost(run.dims, g, config) for g in groups if run.updater.trains_on(g))
    flops_per_s = config.train.epochs_per_step * trained_flops / (done - scored) / world.size
    if world.device.type == "cuda" and (peak := peak_flops(torch.cuda.get_device_name(world.device))):
        metrics["perf/mfu"] = flops_per_s / peak
    metrics |= sampled.metrics
    metrics |= {
        "lr": lr,
        "epoch": run.stream.epoch,
        "perf/tokens_per_s": metrics["tokens/packed"] / (done - started),
        "perf/tflops": flops_per_s / 1e12,
        "perf/peak_memory_gib": _peak_memory(run),
        "time/update": done - scored - metrics["time/old_logprobs"],
        "time/step": done - started,
    }
    return groups, metrics


@contextmanager
def _out_of_memory_explained(run: Run) -> Iterator[None]:
    """Say which sizes a step has and which keys lower them, when memory runs out in it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        out = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
        if not out:
            raise
        config, dims = run.config, run.dims
        longest = config.data.max_prompt_tokens + config.rollout.max_completion_tokens
        again = "" if config.model.activation_checkpointing == "full" else ", set model.activation_checkpointing=full"
        vllm = " or rollout.gpu_memory_utilization" if engine_name(config, run.world.device) == "vllm" else ""
        reason = str(error).strip().splitlines()[0] if str(error) else "no more memory"
        raise RuntimeError(
            f"out of memory in step {run.progress.step + 1} ({reason}). "
            f"A micro-batch has up to train.token_budget={config.train.token_budget} packed tokens in {dims.layers} layers of "
            f"{dims.hidden}, with model.activation_checkpointing={config.model.activation_checkpointing}; a rollout decodes "
            f"rollout.max_concurrent={config.rollout.max_concurrent} completions of up to "
            f"{config.rollout.max_completion_tokens} tokens. Lower train.token_budget (at least {longest}, the longest sample)"
            f"{again}, or lower rollout.max_concurrent{vllm}"
        ) from error


def _dump(run: Run, groups: Sequence[Group]) -> str:
    """Write all of a step's groups, the step that was not done, as JSON (with NaN, as Python reads it). Returns where they are:
    that they could not be written is no reason to keep quiet of what the batch is wanted for."""
    file = run.run_dir / f"bad_batch_step_{run.progress.step + 1}.json"
    try:
        if run.world.is_main:
            rows: Any = redact(list(groups))
            for row in rows:
                for part in (row["prompt"], *row["completions"]):
                    if REDACTED in part["text"]:
                        part["token_ids"] = REDACTED  # they are the secret too
            with replacing(file, "{fix}") as out:
                out.write(to_json(rows, indent=1, skipkeys=True))
    except RuntimeError as error:
        return f"the batch is lost: {error}"
    return f"{file} has the batch"


def _summary(run: Run) -> str:
    total = sum(p.numel() for p in run.policy.parameters())
    trained = sum(p.numel() for p in run.policy.parameters() if p.requires_grad)
    parameters = f"{total / 1e6:.1f}M parameters" + (f" ({trained / 1e6:.2f}M trained)" if trained < total else "")
    rollout = run.config.rollout
    return (
        f"{run.config.model.path}: {parameters}, {run.config.model.attention} attention on the "
        f"{run.policy.attention.kernel} kernel ({run.policy.attention.reason}), "
        f"{engine_choice(run.config, run.world.device).text}{_memory_share(run)}, "
        f"{rollout.prompts_per_step} prompts x {rollout.group_size} completions a step, "
        f"{run.world.size} x {run.world.device.type}, {len(run.stream)} prompts, run folder {run.run_dir}"
    )


def _memory_share(run: Run) -> str:
    """What vLLM was given, which somebody may want to change."""
    if engine_name(run.config, run.world.device) == "embedded":
        return ""
    return f" with gpu_memory_utilization {vllm_memory_share(run.config, run.dims, run.world):.2f}"


def _peak_memory(run: Run) -> float:
    """GiB of this rank: the step's peak on a GPU, of the update alone beside a sleeping vLLM; the process's peak on a CPU."""
    if run.world.device.type == "cuda":
        return (torch.cuda.max_memory_allocated() - run.engine.counted_bytes) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def _built(
    config: Config, world: World, rewards: Sequence[Callable[..., Any]], dataset: Iterable[Mapping[str, Any]] | None
) -> Run:
    """The run. A stop signal ends building it at once: there is nothing to save yet."""
    try:
        with world.stop.breaking_off():
            world.together(lambda: check_services(config) if world.is_main else None)
            return build_run(config, world, rewards, dataset)
    except Stopped as stopped:
        raise SystemExit(128 + stopped.signum) from None


@contextmanager
def _run_folder(config: Config, world: World, resume: bool) -> Iterator[None]:
    """Rank 0 holds the run folder's lock; all ranks see the folder."""
    check_world_size(config, world.size, world.dp_size)
    agree_on_run_dir(config, world)
    with ExitStack() as stack:
        folder = run_folder(config)
        world.together(lambda: stack.enter_context(open_run_dir(folder, resume)) if world.is_main else None)
        world.together(lambda: check_shared(folder))
        world.together(lambda: tidy(folder / "checkpoints") if world.is_main else None)
        yield
