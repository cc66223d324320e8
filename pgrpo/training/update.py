"""One step's updates: groups in, optimizer steps out. The gradient does not depend on how the work was cut."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pgrpo.algorithm.advantages import has_spread
from pgrpo.algorithm.loss import Counts, policy_loss, rollout_correction
from pgrpo.config import Config
from pgrpo.distributed.fsdp import reshard
from pgrpo.distributed.shards import shard_of
from pgrpo.distributed.world import World
from pgrpo.model.lora import LogprobsOf
from pgrpo.model.policy import Policy
from pgrpo.packing.balance import share_out
from pgrpo.packing.batch import GroupedBatch, build_batch
from pgrpo.training.optim import clip_gradients
from pgrpo.types import Group

log = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """The loss or the gradient norm is nan or inf, too often in a row; the weights were not changed by it."""


@dataclass
class Updater:
    """Turns groups with advantages into optimizer steps.

    Attributes:
        policy: what is trained.
        reference: log-probs of the model that the KL term compares with, or None without one.
        optimizer: steps ``policy``'s parameters.
        cost: relative cost of a group, for sharing groups out among ranks.
    """

    config: Config
    world: World
    policy: Policy
    reference: LogprobsOf | None
    optimizer: torch.optim.Optimizer
    cost: Callable[[Group], float]
    skipped_in_row: int = 0
    """Updates that were skipped since the last one that was not."""
    has_moved: bool = False
    """Whether an update has begun to change weights since the run was last marked."""

    def step(self, groups: Sequence[Group]) -> dict[str, float]:
        """All of a step's updates, each on an equal share of the groups (which every rank holds, with advantages); in each epoch
        every share is used once.

        Returns:
            Metrics, averaged over the updates. Entropy, KL, clip ratios and what the sampler's log-probs differ by are those of the
            groups that have a gradient, as no other is computed; without any they are left out. ``skipped_updates``: how many
            were not done because loss or gradients are not finite; ``time/old_logprobs``: seconds of forwards without a gradient.

        Raises:
            NonFiniteError: ``train.max_skipped_updates`` in a row were skipped, and this is one more. On all ranks.
        """
        size = len(groups) // self.config.train.updates_per_step
        shares = [groups[i : i + size] for i in range(0, len(groups), size)]
        batches = [self.micro_batches(share) for share in shares]
        started = time.perf_counter()
        for later in batches[1:]:  # those of the first update are the current ones, and kept for its next epochs
            self._record_old_logprobs(later)
        self.world.synchronize()
        old_logprobs = {"time/old_logprobs": time.perf_counter() - started}
        updates = list(zip(batches, map(count, shares), strict=True)) * self.config.train.epochs_per_step
        metrics = []
        for update in updates:
            # Once the first update has moved the weights, the step cannot be dropped any more.
            metrics.append(self._update(*update, can_stop=not metrics))
        if isinstance(self.reference, Policy):
            reshard(self.reference)  # its last forward had no backward: what it gathered would lie beside the rollout
        values: dict[str, list[float]] = {}
        for name, value in (item for m in metrics for item in m.items()):
            values.setdefault(name, []).append(value)
        means = {name: sum(found) / len(found) for name, found in values.items()}
        means["skipped_updates"] = sum(m["skipped_updates"] for m in metrics)
        return means | old_logprobs | self._token_counts([b for batch, _ in updates for b in batch])

    def refresh_reference(self) -> None:
        """The reference becomes a copy of the policy as it is now."""
        assert isinstance(self.reference, Policy)
        for module in (self.policy, self.reference):
            reshard(module)  # the last forward may have left the root's parameters gathered
        with torch.no_grad():
            for ours, new in zip(self.reference.parameters(), self.policy.parameters(), strict=True):
                shard_of(ours).tensor.copy_(shard_of(new).tensor)  # cut alike; ours may lie in host memory

    def micro_batches(self, groups: Sequence[Group]) -> list[GroupedBatch]:
        """This rank's micro-batches. A group without a gradient is left out; it stays in every count."""
        config = self.config
        groups = [self._in_the_loss(g) for g in groups if self.trains_on(g)]
        share_prompts = config.model.attention == "grouped"
        plan = share_out(groups, self.world.size, config.train.token_budget, self.cost, share_prompts=share_prompts)[
            self.world.rank
        ]
        attention = self.policy.attention
        return [
            build_batch(b, share_prompts=share_prompts, device=self.world.device, attention=attention) for b in plan
        ]

    def trains_on(self, group: Group) -> bool:
        """Whether the group has a gradient: a token in the loss, and rewards that differ or a KL or entropy term."""
        loss = self.config.loss
        if loss.mask_overlong and all(c.finish_reason == "length" for c in group.completions):
            return False
        return bool(loss.kl_coef or loss.entropy_coef) or has_spread(group.rewards)

    def _in_the_loss(self, group: Group) -> Group:
        """The group with truncated completions masked, if the config says so. It is counted as it was."""
        if not self.config.loss.mask_overlong:
            return group
        masked = [
            replace(c, mask=[False] * len(c.mask)) if c.finish_reason == "length" else c for c in group.completions
        ]
        return replace(group, completions=masked)

    def backward(self, batch: GroupedBatch, counts: Counts) -> tuple[Tensor, Tensor]:
        """Add one micro-batch's gradient. Returns [9] sums over its tokens and a [1] maximum (``_summarise``)."""
        config = self.config.loss
        ref_logprobs = None
        if self.reference is not None:
            # First: with LoRA it is the policy itself, whose backward should find its last forward.
            with torch.no_grad():
                ref_logprobs = batch.unpack(self.reference(batch).logprobs)
        flat_logprobs, flat_entropy = self.policy(batch, entropy=True)
        logprobs, entropy = batch.unpack(flat_logprobs), batch.unpack(flat_entropy)
        if batch.old_logprobs is None:
            batch.old_logprobs = logprobs.detach()
        old_logprobs, rollout_logprobs = batch.old_logprobs, batch.rollout_logprobs
        correction, corrected = None, torch.zeros_like(batch.mask)
        if config.rollout_correction != "none":
            correction, corrected = rollout_correction(
                old_logprobs, rollout_logprobs, batch.mask, config.rollout_correction, config.rollout_correction_cap
            )
        output = policy_loss(
            logprobs,
            old_logprobs,
            batch.advantages,
            batch.mask,
            counts,
            ratio=config.ratio,
            objective=config.objective,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            aggregate=config.aggregate,
            max_completion_tokens=self.config.rollout.max_completion_tokens,
            ref_logprobs_BR=ref_logprobs,
            kl_coef=config.kl_coef,
            kl_estimator=config.kl_estimator,
            entropy_BR=entropy,
            entropy_coef=config.entropy_coef,
            correction_BR=correction,
        )
        (output.loss * self.world.size).backward()  # sharded gradients are averaged over ranks
        with torch.no_grad():
            difference = torch.where(batch.mask, old_logprobs - rollout_logprobs, 0.0)
            importance = torch.where(batch.mask, difference.exp(), 0.0)
            sums = [
                output.loss, batch.mask.sum(), output.clipped_low, output.clipped_high, output.kl,
                torch.where(batch.mask, entropy, 0.0).sum(), difference.abs().sum(), importance.sum(), corrected.sum(),
            ]  # fmt: skip
            largest = difference.abs().amax() if difference.numel() else difference.new_zeros(())
            return torch.stack([s.detach().double() for s in sums]), largest.double().view(1)

    def _update(self, batches: Sequence[GroupedBatch], counts: Counts, can_stop: bool) -> dict[str, float]:
        """One optimizer step, or none when no group has spread. ``can_stop``: a stop signal ends it between micro-batches."""
        sums = torch.zeros(9, dtype=torch.float64, device=self.world.device)
        largest = torch.zeros(1, dtype=torch.float64, device=self.world.device)
        for batch in batches:
            if can_stop:
                self.world.check_stop()
            batch_sums, batch_largest = self.backward(batch, counts)
            sums += batch_sums
            largest = torch.maximum(largest, batch_largest)
        grad_norm = clip_gradients(self.policy, self.config.optim.max_grad_norm) if batches else 0.0
        metrics = _summarise(self.world.sum(sums), self.world.max(largest)) | {"grad_norm": grad_norm}
        if self.reference is None:
            metrics.pop("kl", None)  # not measured
        corrected = metrics.pop("corrected", None)
        if corrected is not None and self.config.loss.rollout_correction != "none":
            masks = self.config.loss.rollout_correction in ("token_mask", "sequence_mask")
            metrics[f"sampling/frac_{'masked' if masks else 'truncated'}"] = corrected
        if not batches and self.world.is_main:
            log.warning(
                "no update: in no group do rewards differ between completions that count, so nothing is learned"
            )
        is_sound = not batches or self._is_finite(metrics["loss"], grad_norm)
        if batches and is_sound:
            self.has_moved = True
            self.optimizer.step()
        self.optimizer.zero_grad()
        return metrics | {"skipped_updates": float(not is_sound)}

    def _is_finite(self, loss: float, grad_norm: float) -> bool:
        """Whether an update may be done. Both numbers are sums over all ranks, so that all of them say the same."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.skipped_in_row = 0
            return True
        self.skipped_in_row += 1
        log.warning("loss=%s, grad_norm=%s: this update is skipped, the weights are left as they are", loss, grad_norm)
        if self.skipped_in_row > self.config.train.max_skipped_updates:
            self.optimizer.zero_grad()
            raise NonFiniteError(
                f"loss={loss}, grad_norm={grad_norm}, in {self.skipped_in_row} updates in a row (more than "
                f"train.max_skipped_updates={self.config.train.max_skipped_updates}): the weights were left as they were. "
                "Lower optim.lr or optim.max_grad_norm, or go on from an older checkpoint"
            )
        return False

    def _token_counts(self, batches: Sequence[GroupedBatch]) -> dict[str, float]:
        packed = sum(len(b.input_ids) for b in batches)
        repeated = sum(b.repeated_tokens for b in batches)
        counts = torch.tensor([packed, repeated], dtype=torch.float64, device=self.world.device)
        packed, repeated = self.world.sum(counts).tolist()
        rho = repeated / packed if packed else 1.0
        return {"tokens/packed": packed, "tokens/repeated": repeated, "tokens/rho": rho}

    @torch.no_grad()
    def _record_old_logprobs(self, batches: Sequence[GroupedBatch]) -> None:
        for batch in batches:
            self.world.check_stop()
            batch.old_logprobs = batch.unpack(self.policy(batch).logprobs)


def count(groups: Sequence[Group]) -> Counts:
    """What the loss is divided by: all samples and their masked-in tokens, those of skipped groups too."""
    tokens = sum(sum(c.mask) for g in groups for c in g.completions)
    return Counts(tokens=tokens, samples=sum(len(g.completions) for g in groups))


def _summarise(sums: Tensor, largest: Tensor) -> dict[str, float]:
    loss, tokens, clipped_low, clipped_high, kl, entropy, difference, importance, corrected = sums.tolist()
    if not tokens:  # no zeros: an entropy of 0 would look like a collapse, a difference of 0 like a perfect sampler
        return {"loss": loss}
    return {
        "loss": loss,
        "clip_ratio/low_mean": clipped_low / tokens,
        "clip_ratio/high_mean": clipped_high / tokens,
        "kl": kl / tokens,
        "entropy": entropy / tokens,
        "sampling/sampling_logp_difference/mean": difference / tokens,
        "sampling/sampling_logp_difference/max": largest.item(),
        "sampling/importance_sampling_ratio/mean": importance / tokens,
        "corrected": corrected / tokens,
    }
