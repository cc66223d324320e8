"""Decode attention over a paged cache that reads keys and values shared by several sequences once.

``DecodeLayout.update`` runs once a step, before the layers and outside of CUDA graphs: it finds, from the block table alone, which
sequences share their first blocks, and lists all keys that must be read, 64 tokens at a time, in equal shares for all programs that
run at once. ``DecodeLayout.attend`` runs once a layer: one kernel computes partial attentions, each program over its share, and one
merges those of each sequence by their log-sum-exps, in float32. Both have fixed shapes and addresses, so that a captured CUDA graph
replays with whatever the arrays hold by then. ``update`` writes everything that ``attend`` reads: vLLM's sleep wipes these arrays.

N sequences of the batch (padded ones have length 0), H query heads, K key heads, D head dim.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from pgrpo.rollout.vllm import shared_kernels as kernels

SHARED_TOKENS = 256
"""Sequences share what they have in common from this many tokens on; less saves nothing."""
TILE = 64
"""The most rows (sequences times query heads a key head) that shared keys serve at once. Larger groups are cut."""
SHARE_TOKENS = 256
"""The least tokens of a program's share: less costs more in partial sums than further programs gain."""


class DecodeLayout:
    """Who reads which keys together in one decode step, and the arrays of their partial sums.

    Args:
        sequences: the most of a batch.
        heads: query heads.
        key_heads: of which each serves ``heads // key_heads`` query heads.
        head_dim: a power of 2.
        page: tokens of a block, a power of 2.
        longest: tokens of a sequence at most.
        group_size: usual members of a group. The tile is made as small as holds them, since empty rows cost time too.
    """

    def __init__(
        self,
        sequences: int,
        heads: int,
        key_heads: int,
        head_dim: int,
        page: int,
        device: torch.device,
        longest: int,
        *,
        share_tokens: int = SHARE_TOKENS,
        shared_tokens: int = SHARED_TOKENS,
        group_size: int | None = None,
        tile: int = TILE,
    ) -> None:
        self.heads, self.key_heads, self.head_dim, self.page = heads, key_heads, head_dim, page
        rows = triton.next_power_of_2((group_size or tile) * (heads // key_heads))
        self.tile = max(16, min(tile, rows))  # 16 is the least of a matrix product
        self.most_members = self.tile // (heads // key_heads)
        self.shared_blocks = max(1, shared_tokens // page)
        self.width = triton.next_power_of_2(sequences)
        on_gpu = device.type == "cuda"
        programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 6
        self.splits = max(1, programs // key_heads)
        self.block = max(page, 64 if on_gpu else 16)
        self.options = {"num_warps": 4, "num_stages": 3} if on_gpu else {}
        self.least = max(1, share_tokens // self.block)
        self.most = sequences * -(-longest // self.block) + 1  # steps; a program looks one ahead

        def array(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=device)

        self.ranks, self.order, self.common, self.shared, self.members = (array(sequences) for _ in range(5))
        self.steps = array(2, self.most, kernels.FIELDS.value)  # of shared tokens, and of own ones
        self.pages = array(2, self.most, self.block // page)
        self.shares, self.runs = array(4), array(sequences, 4)
        # Partial sums of shared and of own runs, and the logarithms of their sums of exponentials.
        shared_rows, own_rows = (sequences + each * (self.splits - 1) for each in (self.most_members, 1))
        self.shared_out, self.own_out = (
            array(n, heads, head_dim, dtype=torch.float32) for n in (shared_rows, own_rows)
        )
        self.shared_lse, self.own_lse = (array(n, heads, dtype=torch.float32) for n in (shared_rows, own_rows))

    def update(self, block_table: Tensor, lengths_N: Tensor) -> None:
        """The layout of the next step.

        Args:
            block_table: [N, blocks] int32, each sequence's blocks of the cache in order; behind its last, anything.
            lengths_N: int32, tokens of each sequence in the cache, the one that is decoded included.
        """
        n = lengths_N.shape[0]
        kernels.ranks_kernel[(n,)](
            block_table, lengths_N, self.ranks, n, block_table.stride(0),
            PAGE=self.page, BITS=(block_table.shape[1] - 1).bit_length(), WIDTH=self.width,
        )  # fmt: skip
        self.order[:n] = self.ranks[:n].sort(stable=True).indices
        arrays = (self.order, lengths_N, self.common)
        # One program reads two whole rows of the table, so it takes many blocks at a time also where there are few sequences.
        kernels.common_kernel[(n,)](
            block_table, *arrays, block_table.stride(0), PAGE=self.page, WIDTH=max(256, self.width)
        )
        kernels.groups_kernel[(n,)](
            *arrays, self.shared, self.members, n, self.shared_blocks,
            PAGE=self.page, MOST=self.most_members, WIDTH=self.width,
        )  # fmt: skip
        kernels.steps_kernel[(n,)](
            block_table, self.order, lengths_N, self.shared, self.members, self.steps, self.pages, self.shares, self.runs,
            n, self.splits, self.least, self.most, block_table.stride(0),
            PAGE=self.page, BLOCK=self.block, MOST=self.most_members, WIDTH=self.width, TOGETHER=64,
        )  # fmt: skip

    def attend(self, q_NHD: Tensor, keys: Tensor, values: Tensor, out_NHD: Tensor, scale: float) -> None:
        """Writes the attention of each sequence's one query to ``out_NHD``; zeros for padded sequences.

        Args:
            keys: [blocks, page, K, D]; values alike; any strides but the last, which is 1.
        """
        ratio = self.heads // self.key_heads
        kernels.parts_kernel[(self.splits * self.key_heads,)](
            q_NHD, keys, values, self.order, self.members, self.steps, self.pages, self.shares,
            self.shared_out, self.shared_lse, self.own_out, self.own_lse, self.most,
            q_NHD.stride(0), q_NHD.stride(1), keys.stride(0), keys.stride(1), keys.stride(2), scale * math.log2(math.e),
            HEADS=self.heads, KEY_HEADS=self.key_heads, DIM=self.head_dim, PAGE=self.page,
            TILE=self.tile, OWN_TILE=max(16, triton.next_power_of_2(ratio)), BLOCK=self.block, **self.options,
        )  # fmt: skip
        together = math.gcd(self.heads, 8)
        kernels.merge_kernel[(q_NHD.shape[0], self.heads // together)](
            out_NHD, self.shared_out, self.shared_lse, self.own_out, self.own_lse, self.runs, out_NHD.stride(0), out_NHD.stride(1),
            HEADS=self.heads, DIM=self.head_dim, MOST=self.most_members, TOGETHER=together,
        )  # fmt: skip
