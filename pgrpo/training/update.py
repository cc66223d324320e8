"""The pieces of an update that grpo.py calls: groups with a gradient, micro-batches, log-probs of old weights, and the rule for
losses that are not finite."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from pgrpo.algorithm.loss import Counts
from pgrpo.checkpoint.shards import shard_of
from pgrpo.config import LossConfig
from pgrpo.distributed.fsdp import no_gradient
from pgrpo.model.kept import kept_prefix
from pgrpo.packing.balance import share_out
from pgrpo.packing.batch import GroupedBatch, build_batch
from pgrpo.packing.forest import Forest
from pgrpo.planning.flops import active_adapters, forest_update_flops
from pgrpo.tracking.live import watched
from pgrpo.training.build import Learner
from pgrpo.training.progress import Progress
from pgrpo.training.vision import prepare_images
from pgrpo.types import LIMITS, Episode, Group

log = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """The loss or the gradient norm was nan or inf in too many updates in a row. These updates did not change the weights."""


def micro_batches(learner: Learner, groups: Sequence[Group]) -> list[GroupedBatch]:
    """This rank's micro-batches of rank 0's groups, without groups that have no gradient (``count`` includes them). A collective
    call."""
    config, world = learner.config, learner.world
    attention, is_shared = learner.policy.attention, config.model.attention == "grouped"

    def share() -> list[list[Forest]]:
        kept = [_in_the_loss(learner, group) for group in groups if has_gradient(learner, group)]
        samples = [sample for group in kept for sample in group.samples]
        cost = partial(forest_update_flops, learner.dims, adapters=active_adapters(config.model, learner.dims))
        return share_out(
            samples, world.dp_size, config.train.token_budget, cost, attention,
            is_shared=is_shared, most_kept=learner.most_kept,
        )  # fmt: skip

    return [build_batch(forest, device=world.device, attention=attention) for forest in world.scatter(share)]


def micro_batches_of(learner: Learner, shares: Sequence[Sequence[Group]]) -> list[list[GroupedBatch]]:
    """The micro-batches of each share of a step's groups. Pixels of their images are made in threads from now on, those first that
    are used first. A collective call."""
    batches = [micro_batches(learner, share) for share in shares]
    keys = [key for share in batches for batch in share if batch.images for key in batch.images.keys]
    prepare_images((learner.policy, learner.reference, learner.teacher), keys)
    return batches


def spans(batches: Sequence[GroupedBatch]) -> list[list[GroupedBatch]]:
    """The micro-batches, those together that are passes of one kept prefix."""
    found: list[list[GroupedBatch]] = []
    for batch in batches:
        if found and len(found[-1]) < found[-1][0].span:
            found[-1].append(batch)
        else:
            found.append([batch])
    return found


def has_gradient(learner: Learner, group: Group) -> bool:
    """Whether the group, which has been compared, has a gradient: a token in the loss, and an advantage that is not 0, a KL or
    entropy term, a teacher, or a loss of the user's, which may have one anyway."""
    loss = learner.config.loss
    if is_masked(group, loss):
        return False
    return bool(loss.kl_coef or loss.entropy_coef or loss.function or loss.teacher) or any(
        any(s.advantages) for s in group.samples
    )


def is_masked(group: Group, loss: LossConfig) -> bool:
    """Whether no episode of the group is in the loss."""
    return all(_is_masked(episode, loss) for episode in group.episodes)


def _in_the_loss(learner: Learner, group: Group) -> Group:
    """The group with overlong episodes masked (``loss.mask_overlong``; DAPO, arXiv 2503.14476, section 3.4), and those that an
    environment failed. ``count`` counts the tokens before masking."""

    def masked(episode: Episode) -> Episode:
        return replace(episode, samples=[replace(s, mask=[False] * len(s.mask)) for s in episode.samples])

    return Group(group.prompt, [masked(e) if _is_masked(e, learner.config.loss) else e for e in group.episodes])


def _is_masked(episode: Episode, loss: LossConfig) -> bool:
    reason = episode.finish_reason
    return reason == "environment" or (loss.mask_overlong and reason in LIMITS)


def count(groups: Sequence[Group]) -> Counts:
    """The divisors of the loss: all samples and their unmasked tokens, also of groups without a gradient."""
    samples = [sample for group in groups for sample in group.samples]
    return Counts(tokens=sum(sum(sample.mask) for sample in samples), samples=len(samples))


def record_old_logprobs(learner: Learner, batches: Sequence[GroupedBatch]) -> None:
    """Store the log-probs of the current weights in the batches of a later update."""
    with no_gradient(learner.policy):
        for span in watched("old log-probs", spans(batches), "micro-batches"):
            learner.world.check_stop()
            with kept_prefix(learner.policy, span):
                for batch in span:
                    batch.old_logprobs = batch.unpack(learner.policy(batch).logprobs)


def refresh_reference(learner: Learner) -> None:
    """Copy the policy's current weights to the reference."""
    assert learner.reference is not None
    with torch.no_grad():
        for ours, new in zip(learner.reference.parameters(), learner.policy.parameters(), strict=True):
            shard_of(ours).tensor.copy_(shard_of(new).tensor)  # sharded alike; the reference may be in host memory
    if learner.reference.vision is not None:
        learner.reference.vision.forget()


def is_sound(learner: Learner, progress: Progress, loss: float, grad_norm: float) -> bool:
    """Whether to apply an update. Both numbers are over all ranks, so all ranks agree.

    Raises:
        NonFiniteError: more than ``train.max_skipped_updates`` updates in a row were skipped. On all ranks.
    """
    if math.isfinite(loss) and math.isfinite(grad_norm):
        progress.skipped_in_row = 0
        return True
    progress.skipped_in_row += 1
    most = learner.config.train.max_skipped_updates
    log.warning("loss=%s, grad_norm=%s: skipped this update; the weights are unchanged", loss, grad_norm)
    if progress.skipped_in_row > most:
        learner.optimizer.zero_grad()
        raise NonFiniteError(
            f"loss={loss}, grad_norm={grad_norm}, in {progress.skipped_in_row} updates in a row (more than "
            f"train.max_skipped_updates={most}): the weights were left as they were. "
            "Lower optim.lr or optim.max_grad_norm, or go on from an older checkpoint"
        )
    return False
