"""The pieces of an update that grpo.py calls: groups with a gradient, micro-batches, sums over tokens, metrics, and the rule for
losses that are not finite."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pgrpo.algorithm.loss import Counts, LossOutput
from pgrpo.config import LossConfig
from pgrpo.distributed.fsdp import no_gradient
from pgrpo.distributed.shards import shard_of
from pgrpo.distributed.world import World
from pgrpo.model.kept import kept_prefix
from pgrpo.packing.balance import share_out
from pgrpo.packing.batch import GroupedBatch, build_batch
from pgrpo.packing.forest import Forest, Work
from pgrpo.planning.flops import adapter_parameters, forest_update_flops
from pgrpo.tracking.live import watched
from pgrpo.training.build import Learner
from pgrpo.training.progress import Progress
from pgrpo.types import LIMITS, Episode, Group

log = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """The loss or the gradient norm was nan or inf in too many updates in a row. These updates did not change the weights."""


class UpdateSums(NamedTuple):
    """Sums over the tokens in the loss of a micro-batch, an update or a step. Each a float64 scalar.

    Attributes:
        loss: the part of the global loss.
        corrected: tokens whose weight ``loss.rollout_correction`` truncated or masked.
        clipped_dual: tokens above ``loss.clip_dual``.
        off_policy: tokens that ``loss.off_policy_threshold`` masked.
        teacher_kl: KL(policy || teacher).
        unknown: tokens whose ``rollout_logprobs`` are not finite. The attributes below are over the other tokens.
        difference: ``|old_logprobs - rollout_logprobs|``.
        importance: ``exp(old_logprobs - rollout_logprobs)``.
        largest_difference: the largest ``difference`` of a token: a maximum, not a sum.
    """

    loss: Tensor
    tokens: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    kl: Tensor
    entropy: Tensor
    corrected: Tensor
    clipped_dual: Tensor
    off_policy: Tensor
    teacher_kl: Tensor
    unknown: Tensor
    difference: Tensor
    importance: Tensor
    largest_difference: Tensor

    @staticmethod
    def zero(device: torch.device) -> UpdateSums:
        return UpdateSums(*torch.zeros(len(UpdateSums._fields), dtype=torch.float64, device=device))

    @staticmethod
    @torch.no_grad()
    def of(
        output: LossOutput, mask_BR: Tensor, entropy_BR: Tensor, old_logprobs_BR: Tensor, rollout_logprobs_BR: Tensor
    ) -> UpdateSums:
        """Sums of one micro-batch."""
        known_BR = mask_BR & rollout_logprobs_BR.isfinite()
        difference_BR = torch.where(known_BR, old_logprobs_BR - rollout_logprobs_BR, 0.0)
        sums = UpdateSums(
            loss=output.loss.detach(),
            tokens=mask_BR.sum(),
            clipped_low=output.clipped_low,
            clipped_high=output.clipped_high,
            kl=output.kl,
            entropy=torch.where(mask_BR, entropy_BR, 0.0).sum(),
            corrected=output.corrected,
            clipped_dual=output.clipped_dual,
            off_policy=output.off_policy,
            teacher_kl=output.teacher_kl,
            unknown=(mask_BR & ~known_BR).sum(),
            difference=difference_BR.abs().sum(),
            importance=torch.where(known_BR, difference_BR.exp(), 0.0).sum(),
            largest_difference=difference_BR.abs().amax() if difference_BR.numel() else difference_BR.new_zeros(()),
        )
        return UpdateSums(*(value.double() for value in sums))

    def plus(self, other: UpdateSums) -> UpdateSums:
        sums = UpdateSums(*(a + b for a, b in zip(self, other, strict=True)))
        return sums._replace(largest_difference=torch.maximum(self.largest_difference, other.largest_difference))

    def over_ranks(self, world: World) -> UpdateSums:
        """Sums over all ranks. A collective call."""
        largest = world.max(self.largest_difference.view(1))[0]
        return UpdateSums(*world.sum(torch.stack(self)))._replace(largest_difference=largest)


class Outcome(NamedTuple):
    """One optimizer step, over all ranks. ``is_skipped``: the loss or the gradient norm was not finite."""

    sums: UpdateSums
    grad_norm: float
    is_skipped: bool


def micro_batches(learner: Learner, groups: Sequence[Group]) -> list[GroupedBatch]:
    """This rank's micro-batches of rank 0's groups, without groups that have no gradient (``count`` includes them). A collective
    call."""
    config, world = learner.config, learner.world
    attention, is_shared = learner.policy.attention, config.model.attention == "grouped"

    def share() -> list[list[Forest]]:
        kept = [_in_the_loss(learner, group) for group in groups if has_gradient(learner, group)]
        samples = [sample for group in kept for sample in group.samples]
        cost = partial(forest_update_flops, learner.dims, adapters=adapter_parameters(config.model, learner.dims))
        return share_out(
            samples, world.dp_size, config.train.token_budget, cost, attention,
            is_shared=is_shared, most_kept=learner.most_kept,
        )  # fmt: skip

    return [build_batch(forest, device=world.device, attention=attention) for forest in world.scatter(share)]


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


def work_flops(learner: Learner, work: Work) -> float:
    """FLOPs of a forest's forward and backward."""
    model, dims = learner.config.model, learner.dims
    return float(forest_update_flops(dims, work, adapters=adapter_parameters(model, dims)).sum())


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


def update_metrics(
    learner: Learner, groups: Sequence[Group], outcomes: Sequence[Outcome], batches: Sequence[GroupedBatch]
) -> dict[str, float]:
    """Metrics of a step's updates. ``batches``: this rank's micro-batches, each once for every use. A collective call.

    ``loss`` and ``grad_norm`` are means over the updates that were done, or over those that were skipped where none was done.
    Entropy, KL, clip ratios and the difference to the sampler's log-probs are means over the tokens of all updates in groups with
    a gradient; without such tokens they are not there.
    """
    if not batches and learner.world.is_main:
        log.warning("Skipped the update: %s, so there is no gradient", _why_there_is_no_gradient(groups))
    sums = UpdateSums.zero(learner.world.device)
    for outcome in outcomes:
        sums = sums.plus(outcome.sums)
    computed = [outcome for outcome in outcomes if outcome.sums.tokens] or outcomes
    done = [outcome for outcome in computed if not outcome.is_skipped] or computed
    metrics = {
        "loss": sum(o.sums.loss.item() for o in done) / len(done),
        "grad_norm": sum(o.grad_norm for o in done) / len(done),
        "skipped_updates": float(sum(o.is_skipped for o in outcomes)),
    }
    return metrics | _token_means(learner, sums) | _token_counts(learner, batches)


def _why_there_is_no_gradient(groups: Sequence[Group]) -> str:
    rewards = [reward for group in groups for reward in group.rewards]
    if all(reward is None for reward in rewards):
        return "no completion has a reward (a reward failed on it, or none applies to it)"
    return "in every group rewards are equal or completions masked"


def _token_means(learner: Learner, sums: UpdateSums) -> dict[str, float]:
    """Means over a step's tokens in the loss. Warns if ``loss.rollout_correction`` masked all of them."""
    if not sums.tokens:
        # No zeros: an entropy of 0 would look like a collapse, a difference of 0 like a perfect sampler.
        return {}
    loss = learner.config.loss
    means = {
        "clip_ratio/low_mean": sums.clipped_low / sums.tokens,
        "clip_ratio/high_mean": sums.clipped_high / sums.tokens,
        "entropy": sums.entropy / sums.tokens,
    }
    if learner.reference is not None:
        means["kl"] = sums.kl / sums.tokens
    if loss.teacher is not None:
        means["teacher/kl"] = sums.teacher_kl / sums.tokens
    if loss.clip_dual is not None:
        means["clip_ratio/dual_mean"] = sums.clipped_dual / sums.tokens
    if loss.off_policy_threshold is not None:
        means["sampling/frac_off_policy_masked"] = sums.off_policy / sums.tokens
    known = sums.tokens - sums.unknown
    if known:
        means["sampling/sampling_logp_difference/mean"] = sums.difference / known
        means["sampling/sampling_logp_difference/max"] = sums.largest_difference
        means["sampling/importance_sampling_ratio/mean"] = sums.importance / known
    masks = loss.rollout_correction in ("token_mask", "sequence_mask")
    if loss.rollout_correction != "none":
        means[f"sampling/frac_{'masked' if masks else 'truncated'}"] = sums.corrected / sums.tokens
    if masks and sums.corrected == sums.tokens and learner.world.is_main:
        log.warning(
            "loss.rollout_correction=%s masked every token of this step, so the step has no policy gradient: the sampler's "
            "log-probs differ from the trainer's by %.3g on average, at most by %.3g. Raise loss.rollout_correction_cap=%s, or "
            "find out why they differ",
            loss.rollout_correction, means["sampling/sampling_logp_difference/mean"], sums.largest_difference,
            loss.rollout_correction_cap,
        )  # fmt: skip
    return {name: mean.item() for name, mean in means.items()} | {"sampling/nonfinite_logprobs": sums.unknown.item()}


def _token_counts(learner: Learner, batches: Iterable[GroupedBatch]) -> dict[str, float]:
    """Sums over all ranks; ``perf/flops`` are those of the updates' forwards and backwards, and of a vision tower since the
    rollout."""
    world = learner.world
    sums = [[*astuple(b.counts), work_flops(learner, b.work)] for b in batches]
    tower = learner.policy.vision.flops if learner.policy.vision else 0
    totals = torch.tensor([[0, 0, 0, tower], *sums], dtype=torch.float64, device=world.device).sum(0)
    packed, repeated, above, flops = world.sum(totals).tolist()
    return {
        "tokens/packed": packed,
        "tokens/repeated": repeated,
        "tokens/rho": repeated / packed if packed else 1.0,
        "tokens/shared_above_prompt": above,
        "perf/flops": flops,
    }
