"""A prefix whose samples do not fit one micro-batch is computed once: its keys, values and states are kept, the samples go through
in several passes that read them, and its backward runs once, with the gradients that the passes added up.

Exact: a pass' rows see the prefix through these alone (in layers with linear attention through the state behind its last row, and
the last inputs of the short convolution), and its last row's hidden state, which predicts first tokens. They are the roots of the
prefix's backward, and leaves for the passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice

import torch

from pgrpo.distributed.fsdp import expect_backwards
from pgrpo.model.policy import Kept, Policy
from pgrpo.packing.batch import GroupedBatch


@contextmanager
def kept_prefix(policy: Policy, span: Sequence[GroupedBatch]) -> Iterator[None]:
    """Keep what the batches of a span share while this block computes them; its end runs the prefix's backward. Nothing happens
    for a span of one batch. In the block weights must not change, and no other forward may use the model.

    With FSDP this is a collective call: a rank without a kept prefix keeps a row that no batch reads, and its gradient is zero.
    """
    if len(span) == 1:
        yield
        return
    last_1E = policy.keep(next((batch for batch in span if batch.kept), span[0]))
    assert policy.kept is not None
    roots = [last_1E, *chain.from_iterable(policy.kept.fronts)]
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in roots]
    others = iter(leaves[1:])
    policy.kept = Kept(leaves[0], [tuple(islice(others, len(front))) for front in policy.kept.fronts])
    try:
        expect_backwards(policy, more=True)
        yield
        expect_backwards(policy, more=False)
        pairs = [(root, leaf.grad) for root, leaf in zip(roots, leaves, strict=True) if root.requires_grad]
        if pairs:  # one call, so that layers are recomputed once
            torch.autograd.backward(
                [root for root, _ in pairs], [torch.zeros_like(x) if grad is None else grad for x, grad in pairs]
            )
    finally:
        policy.kept = None
