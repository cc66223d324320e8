"""What the frozen models say about a micro-batch: the reference of the KL term, and the teacher of a distillation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from pgrpo.distributed.fsdp import no_gradient, reshard
from pgrpo.model.kept import kept_prefix
from pgrpo.model.logprobs import TeacherRows
from pgrpo.model.lora import adapters_off
from pgrpo.packing.batch import GroupedBatch
from pgrpo.training.build import Learner


class FrozenScores(NamedTuple):
    """[B, R] log-probs of the reference and of the teacher, and what the policy's forward needs for the KL to the teacher over the
    vocabulary. None where the loss has no use for it."""

    ref_logprobs_BR: Tensor | None = None
    teacher_logprobs_BR: Tensor | None = None
    teacher_rows: TeacherRows | None = None


@contextmanager
def kept_prefixes(learner: Learner, span: Sequence[GroupedBatch]) -> Iterator[None]:
    """``kept_prefix`` of the policy; and of the teacher where the policy's forward reads the teacher's rows, so that ranks that
    compute a batch together divide the rows of both models alike."""
    with ExitStack() as stack:
        if learner.teacher is not None and learner.config.loss.teacher_kl == "full":
            with torch.no_grad():
                stack.enter_context(kept_prefix(learner.teacher, span))
        stack.enter_context(kept_prefix(learner.policy, span))
        yield


@contextmanager
def frozen_scores(learner: Learner, batch: GroupedBatch) -> Iterator[FrozenScores]:
    """Score the batch, which each model computes with every prompt once. The policy's forward and backward belong into the block:
    a teacher's head stays gathered until its end, so that the policy's pass can compute both models' logits chunk by chunk.

    The frozen models run before the policy: with LoRA reference and policy are one module, and FSDP expects the backward to follow
    the latest forward.
    """
    record_frozen_logprobs(learner, [batch])
    scores = FrozenScores(batch.ref_logprobs, batch.teacher_logprobs)
    if learner.teacher is None or learner.config.loss.teacher_kl != "full":
        yield scores
        return
    try:
        with torch.no_grad():
            rows = learner.teacher.teacher_rows(batch)
        yield scores._replace(teacher_rows=rows)
    finally:
        reshard(learner.teacher)


def record_frozen_logprobs(learner: Learner, span: Sequence[GroupedBatch]) -> None:
    """Store the frozen models' log-probs in the passes of a prefix, which they keep too, unless they are there. Before the policy
    keeps the prefix: with LoRA the reference is the same module."""
    reference, teacher = learner.reference, learner.teacher
    if reference is not None and span[0].ref_logprobs is None:
        # The policy's own weights stay gathered: its pass follows.
        own = reference is learner.policy
        without, off = (torch.no_grad(), adapters_off(reference)) if own else (no_gradient(reference), nullcontext())
        with without, off, kept_prefix(reference, span):
            for batch in span:
                batch.ref_logprobs = batch.unpack(reference(batch).logprobs)
    if teacher is not None and learner.config.loss.teacher_kl != "full" and span[0].teacher_logprobs is None:
        with no_gradient(teacher), kept_prefix(teacher, span):
            for batch in span:
                batch.teacher_logprobs = batch.unpack(teacher(batch).logprobs)
