"""GRPO on one page. Reading starts here.

One step (``grpo_step``):

1. *Sample* G completions of every prompt with the current policy, and *score* them with the reward functions.
2. *Compare* each episode with its group: advantage = (reward - the group's mean) / the group's standard deviation.
3. *Pack* the groups that have a gradient into micro-batches that store and compute each prompt once.
4. *Update* the policy with a clipped policy-gradient loss on per-token log-probs.
5. *Push* the new weights to the sampler. This happens when it wakes for the next step (``engine.awake``).

Elsewhere: the loss (algorithm/loss.py), packing (packing/), building the parts of a run (training/build.py), and its folder,
signals, checkpoints and failures (training/session.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from pgrpo.algorithm.advantages import compare, rewards_differ
from pgrpo.algorithm.loss import Counts
from pgrpo.algorithm.metrics import group_metrics
from pgrpo.config import Config
from pgrpo.config.sampling import sampling_params
from pgrpo.distributed.fsdp import expect_micro_batches
from pgrpo.environments.metrics import turn_metrics
from pgrpo.environments.returns import give_returns
from pgrpo.packing.batch import GroupedBatch
from pgrpo.rollout.base import sample_seeds
from pgrpo.tracking.live import watched
from pgrpo.training import update
from pgrpo.training.build import Learner, Parts
from pgrpo.training.caller import Given
from pgrpo.training.frozen import frozen_scores, kept_prefixes, record_frozen_logprobs
from pgrpo.training.messages import StepClock, naming_the_batch
from pgrpo.training.optim import clip_gradients, learning_rate, set_learning_rate
from pgrpo.training.progress import Progress
from pgrpo.training.rollout import sample_and_score, to_main
from pgrpo.training.session import open_session
from pgrpo.training.sums import Outcome, UpdateSums, update_metrics
from pgrpo.types import Group

Metrics = dict[str, float]


def train(config: Config, given: Given = Given(), *, resume: str | Path | None = None, overwrite: bool = False) -> Path:
    """Train, and return the run folder. ``pgrpo.train`` documents the arguments.

    Raises:
        ConfigError: the input is wrong; nothing was trained.
        SystemExit: 130 after Ctrl-C, 143 after SIGTERM; a checkpoint is saved first.
    """
    with open_session(config, given, resume, overwrite) as session:
        while session.goes_on():
            groups, metrics = grpo_step(session.parts, session.progress)
            session.finish_step(groups, metrics)
    return session.run_dir


def grpo_step(parts: Parts, progress: Progress) -> tuple[list[Group], Metrics]:
    """One step. Returns the groups (on rank 0; other ranks get micro-batches of them) and the metrics."""
    config, world, learner, canary = parts.config, parts.world, parts.learner, parts.canary
    clock = StepClock(parts)
    if (every := config.loss.ref_refresh_every) and progress.step and progress.step % every == 0:
        update.refresh_reference(learner)

    # 1. Sample and score. Entering ``awake`` pushes the policy's weights to the engine. The canary checks that they arrived.
    with parts.engine.awake(progress.step):
        checked = canary.look() if canary else {}
        groups, all_groups, sampled = sample_groups(parts, progress.step)
    clock.sampled()

    # 2. Compare. The reward is for the whole episode, so all of its tokens get the same advantage.
    for group, advantages in zip(groups, compare(groups, config.loss, parts.rewards.weights), strict=True):
        for episode, advantage in zip(group.episodes, advantages, strict=True):
            for sample in episode.samples:
                sample.advantages = [advantage] * len(sample.token_ids)
    if config.loss.turn_advantages == "returns_to_go":  # each turn is compared instead
        give_returns(groups, config.loss)

    # 3. and 4. Pack and update.
    set_learning_rate(learner.optimizer, lr := learning_rate(config.optim, progress.step, config.train.steps))
    if canary:
        canary.before_update(progress.step, groups)
    with naming_the_batch(parts, progress, groups):
        updated = update_policy(learner, progress, groups)
    if canary:
        canary.after_update()

    scored = world.from_main(group_metrics(all_groups) | turn_metrics(all_groups) if world.is_main else {})
    logged = {"lr": lr, "epoch": parts.stream.epoch}
    return groups, scored | updated | sampled | parts.engine.metrics | checked | logged | clock.metrics(updated)


def sample_groups(parts: Parts, step: int) -> tuple[list[Group], list[Group], Metrics]:
    """On rank 0 the groups to train on, and all groups that were sampled; on all ranks the metrics.

    Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): a group whose rewards are all equal has zero advantages, so a group of a
    new prompt replaces it, in at most ``rollout.resample_limit`` rounds. Seeds derive from the step and the prompt's number in
    it, so the samples do not depend on the number of ranks.
    """
    config, world, size = parts.config, parts.world, parts.config.rollout.group_size
    metrics = {"time/rollout": 0.0, "time/reward": 0.0, "rewards/errors": 0.0}
    count = rounds = 0

    def sample(number: int) -> list[Group]:
        nonlocal count
        taken = parts.stream.take(number)
        order = sorted(range(number), key=lambda i: taken[i].token_ids)  # what shares a beginning is sampled together
        prompts = [taken[i] for i in order]
        seeds = [sample_seeds(config.seed, step, count + i, group_size=size) for i in order]
        count += number
        scored = sample_and_score(parts.episodes, parts.rewards, world, prompts, sampling_params(config), seeds)
        metrics["time/rollout"] += scored.rollout_s
        metrics["time/reward"] += scored.reward_s
        metrics["rewards/errors"] += scored.errors
        groups = to_main(world, prompts, scored.groups)  # rank 0 has all, others none
        return [group for _, group in sorted(zip(order, groups, strict=False), key=lambda pair: pair[0])]

    def is_flat(group: Group) -> bool:
        return update.is_masked(group, config.loss) or not rewards_differ(group, config.loss, parts.rewards.weights)

    wanted, most_rounds = config.rollout.prompts_per_step, config.rollout.resample_limit
    groups = sample(wanted)
    all_groups = list(groups)
    while rounds < most_rounds and (flat := world.from_main([i for i, g in enumerate(groups) if is_flat(g)])):
        fresh = sample(len(flat))
        for i, group in zip(flat, fresh, strict=world.is_main):
            groups[i] = group
        all_groups += fresh
        rounds += 1
    if most_rounds:
        metrics["resampling/rounds"], metrics["resampling/groups"] = rounds, count - wanted
        metrics["resampling/frac_reward_zero_std"] = sum(map(is_flat, groups)) / wanted
    return groups, all_groups, metrics


def update_policy(learner: Learner, progress: Progress, groups: Sequence[Group]) -> Metrics:
    """All optimizer steps of a step: each epoch uses every group once, in ``updates_per_step`` equal shares. Returns metrics."""
    config, world = learner.config.train, learner.world
    size = len(groups) // config.updates_per_step
    shares = [groups[i * size : (i + 1) * size] for i in range(config.updates_per_step)]
    batches = update.micro_batches_of(learner, shares)
    # The loss divides by the counts of the whole update, so it does not depend on micro-batches and ranks.
    counts = world.from_main([update.count(share) for share in shares])

    started = time.perf_counter()
    # Old log-probs are of the weights that sampled. The first update's own forward has these weights; later shares need one now.
    for share in batches[1:]:
        update.record_old_logprobs(learner, share)
    world.synchronize()
    old_logprobs_s = time.perf_counter() - started

    outcomes: list[Outcome] = []
    for _ in range(config.epochs_per_step):
        for share, counted in zip(batches, counts, strict=True):
            outcomes.append(optimizer_step(learner, progress, share, counted))
    trained = [batch for share in batches for batch in share] * config.epochs_per_step
    return update_metrics(learner, groups, outcomes, trained) | {"time/old_logprobs": old_logprobs_s}


def optimizer_step(learner: Learner, progress: Progress, batches: Sequence[GroupedBatch], counts: Counts) -> Outcome:
    """One optimizer step on the summed gradients of all micro-batches; skipped if there are none or a number is not finite."""
    world, sums = learner.world, UpdateSums.zero(learner.world.device)
    spans = update.spans(batches)
    for span in watched("update", spans, "micro-batches"):
        if not progress.has_moved:  # until weights change, a stop signal may drop the step and save the one before
            world.check_stop()
        record_frozen_logprobs(learner, span)
        expect_micro_batches(learner.policy, world, more=span is not spans[-1])
        with kept_prefixes(learner, span):  # usually of one micro-batch, which computes all of its rows
            for batch in span:
                sums = sums.plus(backward(learner, batch, counts))
    grad_norm = clip_gradients(learner.policy, learner.config.optim.max_grad_norm) if batches else 0.0
    sums = sums.over_ranks(world)
    sound = update.is_sound(learner, progress, sums.loss.item(), grad_norm) if batches else True
    if batches and sound:
        progress.has_moved = True
        learner.optimizer.step()
    learner.optimizer.zero_grad()
    return Outcome(sums, grad_norm, is_skipped=not sound)


def backward(learner: Learner, batch: GroupedBatch, counts: Counts) -> UpdateSums:
    """Forward and backward of one micro-batch; gradients accumulate. Returns sums over its tokens."""
    config = learner.config
    with frozen_scores(learner, batch) as frozen:  # of the reference and the teacher, if there are any
        flat_logprobs_L, flat_entropy_L, flat_kl_L = learner.policy(batch, entropy=True, teacher=frozen.teacher_rows)
        logprobs_BR, entropy_BR = batch.unpack(flat_logprobs_L), batch.unpack(flat_entropy_L)
        if batch.old_logprobs is None:  # the weights are those that sampled, so the ratio is 1
            batch.old_logprobs = logprobs_BR.detach()
        output = learner.loss(  # policy_loss, or the user's
            logprobs_BR=logprobs_BR, old_logprobs_BR=batch.old_logprobs, advantages_BR=batch.advantages, mask_BR=batch.mask,
            counts=counts, config=config.loss, max_completion_tokens=config.max_sampled_tokens,
            rollout_logprobs_BR=batch.rollout_logprobs, ref_logprobs_BR=frozen.ref_logprobs_BR, entropy_BR=entropy_BR,
            teacher_logprobs_BR=frozen.teacher_logprobs_BR,
            teacher_kl_BR=None if flat_kl_L is None else batch.unpack(flat_kl_L),
        )  # fmt: skip
        # FSDP averages gradients over ranks, and the loss is their sum. Ranks with the same data add disjoint parts of it.
        (output.loss * learner.world.size).backward()
    return UpdateSums.of(output, batch.mask, entropy_BR, batch.old_logprobs, batch.rollout_logprobs)
