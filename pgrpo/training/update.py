"""One step's updates: groups in, optimizer steps out. The gradient does not depend on how the work was cut."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pgrpo.algorithm.advantages import has_spread
from pgrpo.algorithm.loss import Counts, policy_loss
from pgrpo.config import Config
from pgrpo.distributed.fsdp import no_gradient
from pgrpo.distributed.shards import shard_of
from pgrpo.distributed.world import World
from pgrpo.model.lora import LogprobsOf
from pgrpo.model.policy import Policy
from pgrpo.packing.balance import share_out, without_text
from pgrpo.packing.batch import GroupedBatch, build_batch
from pgrpo.training.optim import clip_gradients
from pgrpo.types import Group

log = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """The loss or the gradient norm is nan or inf, too often in a row; the weights were not changed by it."""


class Sums(NamedTuple):
    """Added up over the tokens in the loss: of a micro-batch, of an update, of a step. Each a float64 scalar."""

    loss: Tensor
    """The share of the global loss."""
    tokens: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    kl: Tensor
    entropy: Tensor
    corrected: Tensor
    """Tokens whose weight ``loss.rollout_correction`` truncated or masked."""
    unknown: Tensor
    """Tokens whose ``rollout_logprobs`` are not finite. What follows is over the others."""
    difference: Tensor
    """``|old_logprobs - rollout_logprobs|``."""
    importance: Tensor
    """``exp(old_logprobs - rollout_logprobs)``."""


class Outcome(NamedTuple):
    """Of an update, over all ranks."""

    sums: Sums
    largest_difference: float
    grad_norm: float
    is_skipped: bool


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
        """All of a step's updates, each on an equal share of the groups (rank 0's, with advantages); in each epoch every share is
        used once. A collective call.

        Returns:
            Metrics. ``loss`` and ``grad_norm`` are means over the updates. Entropy, KL, clip ratios and the difference to the
            sampler's log-probs are means over the tokens of all updates, in groups that have a gradient, as no other is computed;
            without any they are left out. ``skipped_updates``: how many were not done because loss or gradients are not finite;
            ``time/old_logprobs``: seconds of forwards without a gradient.

        Raises:
            NonFiniteError: ``train.max_skipped_updates`` in a row were skipped, and this is one more. On all ranks.
        """
        updates_per_step = self.config.train.updates_per_step
        size = len(groups) // updates_per_step
        shares = [groups[i * size : (i + 1) * size] for i in range(updates_per_step)]
        batches = [self.micro_batches(share) for share in shares]
        started = time.perf_counter()
        for later in batches[1:]:  # those of the first update are the current ones, and kept for its next epochs
            self._record_old_logprobs(later)
        self.world.synchronize()
        old_logprobs = {"time/old_logprobs": time.perf_counter() - started}
        counts = self.world.from_main([count(share) for share in shares])
        updates = list(zip(batches, counts, strict=True)) * self.config.train.epochs_per_step
        # Once the first update has moved the weights, the step cannot be dropped any more.
        outcomes = [self._update(*update, can_stop=i == 0) for i, update in enumerate(updates)]
        metrics = {
            "loss": sum(o.sums.loss.item() for o in outcomes) / len(outcomes),
            "grad_norm": sum(o.grad_norm for o in outcomes) / len(outcomes),
            "skipped_updates": float(sum(o.is_skipped for o in outcomes)),
        }
        metrics |= self._token_means(_add(o.sums for o in outcomes), max(o.largest_difference for o in outcomes))
        return metrics | old_logprobs | self._token_counts([b for batch, _ in updates for b in batch])

    def refresh_reference(self) -> None:
        """The reference becomes a copy of the policy as it is now."""
        assert isinstance(self.reference, Policy)
        with torch.no_grad():
            for ours, new in zip(self.reference.parameters(), self.policy.parameters(), strict=True):
                shard_of(ours).tensor.copy_(shard_of(new).tensor)  # cut alike; ours may lie in host memory

    def micro_batches(self, groups: Sequence[Group]) -> list[GroupedBatch]:
        """This rank's micro-batches of rank 0's groups. A group without a gradient is left out; it stays in every count. A
        collective call."""
        config, world = self.config, self.world
        share_prompts = config.model.attention == "grouped"

        def plan() -> list[list[list[Group]]]:
            trained = [self._in_the_loss(without_text(g)) for g in groups if self.trains_on(g)]
            return share_out(trained, world.dp_size, config.train.token_budget, self.cost, share_prompts=share_prompts)

        attention = self.policy.attention
        return [
            build_batch(b, share_prompts=share_prompts, device=world.device, attention=attention)
            for b in world.scatter(plan)
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

    def backward(self, batch: GroupedBatch, counts: Counts) -> tuple[Sums, Tensor]:
        """Add one micro-batch's gradient. Returns sums over its tokens, and the largest difference among them, a float64 scalar."""
        config = self.config
        ref_logprobs = None
        if self.reference is not None:
            # First: with LoRA it is the policy itself, whose backward should find its last forward.
            with no_gradient(self.reference if isinstance(self.reference, Policy) else self.policy):
                ref_logprobs = batch.unpack(self.reference(batch).logprobs)
        flat_logprobs, flat_entropy = self.policy(batch, entropy=True)
        logprobs, entropy = batch.unpack(flat_logprobs), batch.unpack(flat_entropy)
        if batch.old_logprobs is None:
            batch.old_logprobs = logprobs.detach()
        output = policy_loss(
            logprobs,
            batch.old_logprobs,
            batch.advantages,
            batch.mask,
            counts,
            config.loss,
            config.rollout.max_completion_tokens,
            rollout_logprobs_BR=batch.rollout_logprobs,
            ref_logprobs_BR=ref_logprobs,
            entropy_BR=entropy,
        )
        (output.loss * self.world.dp_size).backward()  # sharded gradients are averaged over ranks
        with torch.no_grad():
            known = batch.mask & batch.rollout_logprobs.isfinite()
            difference = torch.where(known, batch.old_logprobs - batch.rollout_logprobs, 0.0)
            sums = Sums(
                loss=output.loss.detach(),
                tokens=batch.mask.sum(),
                clipped_low=output.clipped_low,
                clipped_high=output.clipped_high,
                kl=output.kl,
                entropy=torch.where(batch.mask, entropy, 0.0).sum(),
                corrected=output.corrected,
                unknown=(batch.mask & ~known).sum(),
                difference=difference.abs().sum(),
                importance=torch.where(known, difference.exp(), 0.0).sum(),
            )
            largest = difference.abs().amax() if difference.numel() else difference.new_zeros(())
            return Sums(*(value.double() for value in sums)), largest.double()

    def _update(self, batches: Sequence[GroupedBatch], counts: Counts, can_stop: bool) -> Outcome:
        """One optimizer step, or none when no group has spread. ``can_stop``: a stop signal ends it between micro-batches."""
        zero = torch.zeros((), dtype=torch.float64, device=self.world.device)
        sums, largest = Sums(*[zero] * len(Sums._fields)), zero
        for batch in batches:
            if can_stop:
                self.world.check_stop()
            batch_sums, batch_largest = self.backward(batch, counts)
            sums, largest = _add([sums, batch_sums]), torch.maximum(largest, batch_largest)
        grad_norm = clip_gradients(self.policy, self.config.optim.max_grad_norm) if batches else 0.0
        sums = Sums(*self.world.sum(torch.stack(sums)))
        if not batches and self.world.is_main:
            log.warning(
                "no update: in no group do rewards differ between completions that count, so nothing is learned"
            )
        is_sound = not batches or self._is_finite(sums.loss.item(), grad_norm)
        if batches and is_sound:
            self.has_moved = True
            self.optimizer.step()
        self.optimizer.zero_grad()
        return Outcome(sums, self.world.max(largest.view(1)).item(), grad_norm, not is_sound)

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

    def _token_means(self, sums: Sums, largest_difference: float) -> dict[str, float]:
        """Metrics of a step's tokens in the loss. Says so when a correction left none of them."""
        if (
            not sums.tokens
        ):  # no zeros: an entropy of 0 would look like a collapse, a difference of 0 like a perfect sampler
            return {}
        loss = self.config.loss
        means = {
            "clip_ratio/low_mean": sums.clipped_low / sums.tokens,
            "clip_ratio/high_mean": sums.clipped_high / sums.tokens,
            "entropy": sums.entropy / sums.tokens,
        }
        if self.reference is not None:
            means["kl"] = sums.kl / sums.tokens
        known = sums.tokens - sums.unknown
        if known:
            means["sampling/sampling_logp_difference/mean"] = sums.difference / known
            means["sampling/importance_sampling_ratio/mean"] = sums.importance / known
        masks = loss.rollout_correction in ("token_mask", "sequence_mask")
        if loss.rollout_correction != "none":
            means[f"sampling/frac_{'masked' if masks else 'truncated'}"] = sums.corrected / sums.tokens
        if masks and sums.corrected == sums.tokens and self.world.is_main:
            log.warning(
                "loss.rollout_correction=%s masked every token of this step, so its rewards teach nothing: the sampler's log-probs "
                "differ from the trainer's by %.3g on average, at most by %.3g. Raise loss.rollout_correction_cap=%s, or look for "
                "the reason of the difference",
                loss.rollout_correction, means["sampling/sampling_logp_difference/mean"], largest_difference,
                loss.rollout_correction_cap,
            )  # fmt: skip
        metrics = {name: mean.item() for name, mean in means.items()}
        if known:
            metrics["sampling/sampling_logp_difference/max"] = largest_difference
        return metrics | {"sampling/nonfinite_logprobs": sums.unknown.item()}

    def _token_counts(self, batches: Sequence[GroupedBatch]) -> dict[str, float]:
        packed = sum(len(b.input_ids) for b in batches)
        repeated = sum(b.repeated_tokens for b in batches)
        counts = torch.tensor([packed, repeated], dtype=torch.float64, device=self.world.device)
        packed, repeated = self.world.sum(counts).tolist()
        rho = repeated / packed if packed else 1.0
        return {"tokens/packed": packed, "tokens/repeated": repeated, "tokens/rho": rho}

    def _record_old_logprobs(self, batches: Sequence[GroupedBatch]) -> None:
        with no_gradient(self.policy):
            for batch in batches:
                self.world.check_stop()
                batch.old_logprobs = batch.unpack(self.policy(batch).logprobs)


def count(groups: Sequence[Group]) -> Counts:
    """What the loss is divided by: all samples and their masked-in tokens, those of skipped groups too."""
    tokens = sum(sum(c.mask) for g in groups for c in g.completions)
    return Counts(tokens=tokens, samples=sum(len(g.completions) for g in groups))


def _add(parts: Iterable[Sums]) -> Sums:
    return Sums(*torch.stack([torch.stack(part) for part in parts]).sum(0))
