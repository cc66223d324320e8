"""Keys and values of a rollout: each prompt's are stored once and shared by its group, as in training.

A decoding step has the same two attention calls and merge as a training step: each row attends to its own completion so far (a
dense batch, as all have the same length), and all rows of a group attend to the group's prompt.

N prompts, B rows in the batch (completions still running), K key/value heads, D head dim, C capacity in tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pgrpo.attention.kernels.flash import dense_forward, varlen_forward
from pgrpo.attention.kernels.segments import Segments
from pgrpo.attention.layout import cumulative
from pgrpo.attention.merge import merge_


class DecodeCache:
    """A layout (``attention.hook.DecodingLayout``). Its first call has all prompts, packed; later calls have one token a row.

    Args:
        prompt_lens: N prompt lengths.
        group_size: rows of each prompt; rows are ordered by prompt.
        capacity: the most tokens of a completion.
    """

    def __init__(self, prompt_lens: Sequence[int], group_size: int, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.length = 0  # completion tokens in the cache, the same for every row
        self.max_sample = max(prompt_lens) + capacity
        self._device = device
        self._cu_prefix = cumulative(prompt_lens, device)
        self._max_prefix = max(prompt_lens)
        self._group_of_row = torch.arange(len(prompt_lens)).repeat_interleave(group_size)
        self._prefixes: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> K, V [prompt rows, K, D]
        self._suffixes: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> K, V [B, C, K, D]
        self._across = self._suffix_segments()

    def attend(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, scale: float, layer: int) -> Tensor:
        """[T, H, D] attention output: of the prompts in a layer's first call, then of one new token a row."""
        if layer not in self._prefixes:
            self._prefixes[layer] = k_TKD.contiguous(), v_TKD.contiguous()
            within = Segments(self._cu_prefix, self._cu_prefix, self._max_prefix, self._max_prefix)
            return varlen_forward(q_THD, k_TKD, v_TKD, within, True, scale)[0]
        k_BCKD, v_BCKD = self._suffix_buffers(layer, k_TKD)
        k_BCKD[:, self.length], v_BCKD[:, self.length] = k_TKD, v_TKD
        filled = slice(0, self.length + 1)
        out_B1HD, lse_BH1 = dense_forward(q_THD.unsqueeze(1), k_BCKD[:, filled], v_BCKD[:, filled], scale)
        out_BHD, lse_HB = out_B1HD.squeeze(1), lse_BH1.squeeze(-1).T
        out_p, lse_p = varlen_forward(q_THD, *self._prefixes[layer], self._across, False, scale)
        merge_(out_BHD, lse_HB, out_p, lse_p)
        return out_BHD

    def advance(self) -> None:
        """Call this after all layers have attended with the new tokens."""
        self.length += 1

    def keep(self, rows: Tensor) -> None:
        """Drop all rows except these (ascending indices into the current rows)."""
        self._group_of_row = self._group_of_row[rows.cpu()]
        for layer, buffers in self._suffixes.items():
            kept = tuple(x.new_empty(len(rows), *x.shape[1:]) for x in buffers)
            for new, old in zip(kept, buffers, strict=True):
                new[:, : self.length] = old[rows, : self.length]
            self._suffixes[layer] = kept[0], kept[1]
        self._across = self._suffix_segments()

    def _suffix_buffers(self, layer: int, like_BKD: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self._suffixes:
            shape = len(like_BKD), self.capacity, *like_BKD.shape[1:]
            self._suffixes[layer] = like_BKD.new_empty(shape), like_BKD.new_empty(shape)
        return self._suffixes[layer]

    def _suffix_segments(self) -> Segments:
        rows = self._group_of_row.bincount(minlength=len(self._cu_prefix) - 1).tolist()
        return Segments(cumulative(rows, self._device), self._cu_prefix, max(rows), self._max_prefix)
