"""Sequence parallelism (Ulysses, arXiv 2309.14509): neighbouring ranks compute one packed batch together.

Each rank has an equal part of the rows, in the order of the batch, and computes everything that rows do alone. Attention needs all
rows: there the ranks exchange rows for heads, each computes the whole layout on its share of the heads, and they exchange back. So
the layout, whatever the forest, knows nothing of ranks.

A log-prob is computed by the rank that owns the row that predicts the token. All ranks get all values, each with a gradient through
its own tokens alone, so that the ranks' gradients are disjoint parts whose sum is the gradient. Of a kept prefix each rank has the
keys and values of all rows, of its heads.

S ranks, T packed rows, t rows of one rank (S * t >= T); H query heads, K key/value heads, D and Dv their dims; U tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor, nn
from torch.nn.functional import pad

from pgrpo.attention.grouped import grouped_attention
from pgrpo.attention.hook import AttentionLayout, behind_front
from pgrpo.attention.layout import PackedLayout
from pgrpo.distributed.world import World


def key_value_copies(kv_heads: int, size: int) -> int:
    """How many ranks need each key/value head: 1 if the heads divide over the ranks."""
    # Not by ``math.gcd``, which torch.compile does not trace.
    return next(copies for copies in range(1, size + 1) if kv_heads * copies % size == 0)


@dataclass(frozen=True)
class Ulysses:
    """This rank among the ``size`` ranks of a group that compute one batch together."""

    rank: int
    size: int
    group: Any

    @staticmethod
    def of(world: World) -> Ulysses | None:
        """None where every rank has batches of its own."""
        size = world.sequence_parallel_size
        return Ulysses(world.rank % size, size, world.sequence_group) if size > 1 else None

    def rows(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's rows of a model's inputs, whose last dimension is rows. The last rank's end in padding, of zeros."""
        total = inputs["input_ids"].shape[-1]
        first, end = self.bounds(total)
        padding = self.size * (end - first) - total
        return {name: pad(x, (0, padding))[..., first:end] for name, x in inputs.items()}

    def owned(self, rows_U: Tensor, total: int, front: int = 0) -> tuple[Tensor, Tensor]:
        """Which of these packed rows, of ``total``, are this rank's: their numbers in ``rows_U``, and in its own rows. Row -1, the
        last of ``front`` that are kept, is the rank's that computed it, and -1 there too."""
        first, end = self.bounds(total)
        kept_first, kept_end = self.bounds(front)
        has_last = kept_first < front <= kept_end
        numbers = ((first <= rows_U) & (rows_U < end) | (rows_U < 0) & has_last).nonzero().flatten()
        rows = rows_U.index_select(0, numbers)
        return numbers, torch.where(rows < 0, rows, rows - first)

    def bounds(self, total: int) -> tuple[int, int]:
        """The first of this rank's rows of ``total``, and their end, with padding."""
        most = -(-total // self.size)
        return self.rank * most, (self.rank + 1) * most

    def all_values(self, own: Tensor, numbers: Tensor, count: int) -> Tensor:
        """[U] the values of all ranks. Gradients flow through this rank's ``own``, at ``numbers``, alone. A collective call."""
        values_U = own.new_zeros(count).index_copy(0, numbers, own.detach())
        dist.all_reduce(values_U, group=self.group)
        return values_U.index_copy(0, numbers, own)

    def exchange(self, x_SN: Tensor) -> Tensor:
        """[S * n, ...] -> [S * n, ...]: part i of n goes to rank i, and part i comes from it. A collective call, also in the
        backward, which is the same exchange."""
        # Not every backend and release looks at strides.
        x_SN = x_SN.contiguous()
        return collectives.wait_tensor(collectives.all_to_all_single_autograd(x_SN, None, None, self.group))


@dataclass(frozen=True)
class SplitLayout:
    """A layout whose rows lie on several ranks.

    Attributes:
        whole: the layout of all rows; of a model whose images' rows see each other, around that.
        like_T: a tensor of T. Its length tells T to compiled code, in which a number would be a constant.
    """

    whole: AttentionLayout
    like_T: Tensor
    ranks: Ulysses

    def attend(
        self,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        scale: float,
        *,
        module: nn.Module,
        sinks_H: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """[t, H, Dv] attention of this rank's t rows to the rows of all ranks; arguments as those of ``grouped_attention``."""
        # Asked of the group these are constants in compiled code, where attributes would be symbols.
        size, rank = self.ranks.group.size(), self.ranks.group.rank()
        rows, total = q_THD.shape[0], self.like_T.shape[0]
        copies = key_value_copies(k_TKD.shape[1], size)
        if copies > 1:
            k_TKD, v_TKD = (x.repeat_interleave(copies, 1) for x in (k_TKD, v_TKD))
        parts = [x.unflatten(1, (size, -1)) for x in (q_THD, k_TKD, v_TKD)]  # [t, S, heads of a rank, D]
        heads = [x.shape[2:] for x in parts]
        packed = torch.cat([x.flatten(2) for x in parts], 2).transpose(0, 1)  # [S, t, N]
        whole = self.ranks.exchange(packed.flatten(0, 1))[:total]  # padding is at the end
        q, k, v = (
            x.unflatten(1, shape).contiguous()
            for x, shape in zip(whole.split([h * d for h, d in heads], 1), heads, strict=True)
        )
        if sinks_H is not None:
            sinks_H = sinks_H.unflatten(0, (size, -1))[rank]
        if isinstance(self.whole, PackedLayout):
            out_ThD = grouped_attention(q, *behind_front(k, v), self.whole, scale, sinks_H=sinks_H, **options)
        else:
            out_ThD = self.whole.attend(q, k, v, scale, module=module, sinks_H=sinks_H, **options)
        out = pad(out_ThD.flatten(1), (0, 0, 0, size * rows - total))
        back = self.ranks.exchange(out).unflatten(0, (size, rows))  # [S, t, heads of a rank * Dv]
        return back.transpose(0, 1).contiguous().view(rows, q_THD.shape[1], -1)
