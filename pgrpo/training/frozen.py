"""What the frozen models say about a micro-batch: the reference of the KL term, and the teacher of a distillation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from pgrpo.distributed.fsdp import no_gradient, reshard
from pgrpo.model.logprobs import TeacherRows
from pgrpo.model.policy import Policy
from pgrpo.packing.batch import GroupedBatch
from pgrpo.training.build import Learner


class FrozenScores(NamedTuple):
    """[B, R] log-probs of the reference and of the teacher, and what the policy's forward needs for the KL to the teacher over the
    vocabulary. None where the loss has no use for it."""

    ref_logprobs_BR: Tensor | None = None
    teacher_logprobs_BR: Tensor | None = None
    teacher_rows: TeacherRows | None = None


@contextmanager
def frozen_scores(learner: Learner, batch: GroupedBatch) -> Iterator[FrozenScores]:
    """Score the batch, which each model computes with every prompt once. The policy's forward and backward belong into the block:
    a teacher's head stays gathered until its end, so that the policy's pass can compute both models' logits chunk by chunk.

    The frozen models run before the policy: with LoRA reference and policy are one module, and FSDP expects the backward to follow
    the latest forward.
    """
    scores, reference, teacher = FrozenScores(), learner.reference, learner.teacher
    if reference is not None:
        with no_gradient(reference if isinstance(reference, Policy) else learner.policy):
            scores = FrozenScores(batch.unpack(reference(batch).logprobs))
    if teacher is None:
        yield scores
    elif learner.config.loss.teacher_kl == "full":
        try:
            with torch.no_grad():
                rows = teacher.teacher_rows(batch)
            yield scores._replace(teacher_rows=rows)
        finally:
            reshard(teacher)
    else:
        if batch.teacher_logprobs is None:
            with no_gradient(teacher):
                batch.teacher_logprobs = batch.unpack(teacher(batch).logprobs)
        yield scores._replace(teacher_logprobs_BR=batch.teacher_logprobs)
