"""What is summed over the tokens of an update, and the metrics that a step's sums give."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import astuple
from typing import NamedTuple

import torch
from torch import Tensor

from pgrpo.algorithm.loss import LossOutput
from pgrpo.distributed.world import World
from pgrpo.packing.batch import GroupedBatch
from pgrpo.packing.forest import Work
from pgrpo.planning.flops import active_adapters, forest_update_flops
from pgrpo.training.build import Learner
from pgrpo.types import Group

log = logging.getLogger(__name__)


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


def work_flops(learner: Learner, work: Work) -> float:
    """FLOPs of a forest's forward and backward."""
    model, dims = learner.config.model, learner.dims
    return float(forest_update_flops(dims, work, adapters=active_adapters(model, dims)).sum())
