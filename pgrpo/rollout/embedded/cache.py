"""Keys and values of a rollout: each prompt's are stored once and shared by its group, as in training.

A decoding step has the same two attention calls and merge as a training step: each row attends to its own completion so far (a
dense batch, as all have the same length), and all rows of a group attend to the group's prompt. A prompt that goes on from an
earlier one and its completion computes its new tokens only, behind their keys and values (``Front``).

N prompts, B rows in the batch (completions still running), K key/value heads, D head dim, C capacity in tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pgrpo.attention.kernels.flash import dense_forward, varlen_forward
from pgrpo.attention.kernels.segments import Scores, Segments
from pgrpo.attention.layout import PackedLayout, cumulative
from pgrpo.attention.merge import add_sinks_, merge_


class Front(NamedTuple):
    """The first ``rows`` tokens of a prompt: layer -> K [rows, K, D], V [rows, K, Dv]."""

    rows: int
    layers: dict[int, tuple[Tensor, Tensor]]


NOTHING = Front(0, {})


class DecodeCache:
    """A layout. Its first call has all prompts, packed; later calls have one token a row. Layers with a state keep it here, too.

    Args:
        prompts: the layout of the first call, of N nodes, with the rows that it leaves out.
        rows_of: N numbers of rows; rows are ordered by prompt.
        capacity: the most tokens of a completion.
        fronts: of each prompt, what the first call leaves out; not for models with states. That call copies it; clear the list
            behind it to free what it was copied from.
    """

    def __init__(
        self, prompts: PackedLayout, rows_of: Sequence[int], capacity: int, fronts: Sequence[Front] = ()
    ) -> None:
        self.prompts, self.capacity = prompts, capacity
        self._prompt_lens = [node.length for node in prompts.nodes]
        self._fronts = fronts or [NOTHING for _ in self._prompt_lens]
        self._new_lens = [n - front.rows for n, front in zip(self._prompt_lens, self._fronts, strict=True)]
        self.length = 0  # completion tokens in the cache, the same for every row
        self._cu_prefix, self._max_prefix = cumulative(self._prompt_lens, prompts.device), prompts.max_sample
        self._group_of_row = torch.arange(len(rows_of)).repeat_interleave(torch.tensor(rows_of))
        self._prefixes: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> K, V [prompt rows, K, D]
        self._suffixes: dict[int, list[Tensor]] = {}  # layer -> K, V [B, C, K, D]
        self._across = self._suffix_segments()
        self._last: dict[int, tuple[Tensor, Segments]] = {}
        self.states: dict[Any, Tensor] = {}  # of layers with a state, [B, ...]

    def for_rows(self, states_N: Tensor) -> Tensor:
        """A copy of its prompt's state for each row of the batch: [N, ...] -> [B, ...]."""
        return states_N.index_select(0, self._group_of_row.to(self.prompts.device))

    def attend(
        self,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        scale: float,
        *,
        module: nn.Module,
        window: int | None = None,
        softcap: float | None = None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """[T, H, Dv] attention output: of the prompts in a layer's first call, then of one new token a row."""
        layer: int = module.layer_idx  # pyright: ignore[reportAssignmentType]
        scores = Scores(scale, softcap=softcap or 0.0)
        kernel = "flash4" if softcap and q_THD.device.type == "cuda" else "builtin"  # which cannot soft-cap on a GPU
        if layer not in self._prefixes:
            keys = self._prefixes[layer] = self._behind_fronts(layer, 0, k_TKD), self._behind_fronts(layer, 1, v_TKD)
            new = cumulative(self._new_lens, self.prompts.device)
            within = Segments(new, self._cu_prefix, max(self._new_lens), self._max_prefix)
            causal = scores._replace(causal=True, window=window or 0)
            out_THD, lse_HT = varlen_forward(q_THD, *keys, within, causal, kernel)
        else:
            if layer not in self._suffixes:
                self._suffixes[layer] = [x.new_empty(len(x), self.capacity, *x.shape[1:]) for x in (k_TKD, v_TKD)]
            k_BCKD, v_BCKD = self._suffixes[layer]
            k_BCKD[:, self.length], v_BCKD[:, self.length] = k_TKD, v_TKD
            seen = slice(max(0, self.length + 1 - window) if window else 0, self.length + 1)
            out_B1HD, lse_BH1 = dense_forward(q_THD.unsqueeze(1), k_BCKD[:, seen], v_BCKD[:, seen], scores)
            out_THD, lse_HT = out_B1HD.squeeze(1), lse_BH1.squeeze(-1).T
            keys, across = self._prefixes[layer], self._across
            # With a window, the prompt's rows that are still in it.
            if window is not None and (left := window - self.length - 1) < self._max_prefix:
                rows, across = self._last_rows(max(0, left))
                keys = keys[0].index_select(0, rows), keys[1].index_select(0, rows)
            if len(keys[0]):
                merge_(out_THD, lse_HT, *varlen_forward(q_THD, *keys, across, scores, kernel))
        if sinks_H is not None:
            add_sinks_(out_THD, lse_HT, sinks_H)
        return out_THD

    def advance(self) -> None:
        """Call this after all layers have attended with the new tokens."""
        self.length += 1
        self._last.clear()

    def keep(self, rows: Tensor) -> None:
        """Drop all rows except these (ascending indices into the current rows)."""
        self._group_of_row = self._group_of_row[rows.cpu()]
        for layer, buffers in self._suffixes.items():
            self._suffixes[layer] = [x.new_empty(len(rows), *x.shape[1:]) for x in buffers]
            for new, old in zip(self._suffixes[layer], buffers, strict=True):
                new[:, : self.length] = old[rows, : self.length]
        self.states = {name: x.index_select(0, rows) for name, x in self.states.items()}
        self._across = self._suffix_segments()
        self._last.clear()

    def front(self, row: int, count: int) -> Front:
        """A copy of a row's prompt and of the first ``count`` tokens behind it."""
        start, end = self._cu_prefix[self._group_of_row[row] :][:2].tolist()
        layers: dict[int, tuple[Tensor, Tensor]] = {}
        for layer, prefix in self._prefixes.items():
            own = [x[row, :count] for x in self._suffixes[layer]] if count else [x[:0] for x in prefix]
            k, v = (torch.cat([x[start:end], y]) for x, y in zip(prefix, own, strict=True))
            layers[layer] = k, v
        return Front(end - start + count, layers)

    def _behind_fronts(self, layer: int, which: int, new_TKD: Tensor) -> Tensor:
        """Keys (0) or values (1) of whole prompts, from those of their new tokens."""
        pieces = []
        for front, new_nKD in zip(self._fronts, new_TKD.split(self._new_lens), strict=True):
            pieces += [front.layers[layer][which], new_nKD] if front.rows else [new_nKD]
        return torch.cat(pieces)

    def _suffix_segments(self) -> Segments:
        rows = self._group_of_row.bincount(minlength=len(self._cu_prefix) - 1).tolist()
        return Segments(cumulative(rows, self.prompts.device), self._cu_prefix, max(rows), self._max_prefix)

    def _last_rows(self, most: int) -> tuple[Tensor, Segments]:
        """The last ``most`` rows of each prompt, and who attends to them. The same for all layers of one window, so kept."""
        if most not in self._last:
            kept = [min(most, n) for n in self._prompt_lens]
            ends = accumulate(self._prompt_lens)
            rows = torch.cat([torch.arange(end - n, end) for end, n in zip(ends, kept, strict=True)])
            across = self._across._replace(cu_k=cumulative(kept, self.prompts.device), max_k=max(kept))
            self._last[most] = rows.to(self.prompts.device), across
        return self._last[most]
