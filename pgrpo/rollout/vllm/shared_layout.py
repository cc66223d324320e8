"""Decode attention over a paged cache that reads keys and values shared by several sequences once.

``DecodeLayout.update`` runs once a step, before the layers and outside of CUDA graphs: it finds, from the block table alone, which
sequences share their first blocks, and cuts all keys that must be read into items of about equal size. ``DecodeLayout.attend`` runs
once a layer: one persistent kernel computes a partial attention for each item and key head, one merges the parts of each sequence
by their log-sum-exps, in float32. Items take unequal time however they are cut, so a program takes the next one that none has taken
(on an H100 up to 7 % less time than by turns). Both kernels have fixed shapes and addresses, so that a captured CUDA graph replays
with whatever the arrays hold by then. ``update`` writes everything that ``attend`` reads: vLLM's sleep wipes these arrays.

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
"""The most rows (sequences times query heads a key head) that one item of shared keys serves. Larger groups are cut."""
ITEM_TOKENS = 256
"""About the least tokens of an item, unless a sequence has no more."""
ITEMS_PER_PROGRAM = 2
"""Items and key heads a program of the persistent kernel gets on average: more even out unequal lengths, and cost more partial
sums. The best of 2, 3, 4, 6 and 8 on an H100 for groups of 8 and 16."""


class DecodeLayout:
    """Who reads which keys together in one decode step, and the arrays of their partial sums.

    Args:
        sequences: the most of a batch.
        heads: query heads.
        key_heads: of which each serves ``heads // key_heads`` query heads.
        head_dim: a power of 2.
        page: tokens of a block.
        most_parts: of a sequence, shared and own parts together; bounds ``partial``.
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
        *,
        most_parts: int = 16,
        item_tokens: int = ITEM_TOKENS,
        shared_tokens: int = SHARED_TOKENS,
        group_size: int | None = None,
        tile: int = TILE,
    ) -> None:
        self.heads, self.key_heads, self.head_dim, self.page = heads, key_heads, head_dim, page
        self.most_parts, self.item_tokens = most_parts, item_tokens
        rows = triton.next_power_of_2((group_size or tile) * (heads // key_heads))
        self.tile = max(16, min(tile, rows))  # 16 is the least of a matrix product
        self.shared_blocks = max(1, shared_tokens // page)
        self.width = triton.next_power_of_2(sequences)
        on_gpu = device.type == "cuda"
        # Programs, BLOCK, warps and stages: the best of 60 combinations on an H100 for groups of 4, 8 and 16.
        self.programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 3
        self.options = {"BLOCK": 64, "num_warps": 4, "num_stages": 5} if on_gpu else {"BLOCK": 16}

        def integers(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=torch.int32, device=device)

        self.order, self.common, self.shared, self.members, self.parts = (integers(sequences) for _ in range(5))
        self.items = integers(sequences * most_parts, kernels.FIELDS.value)
        self.count = integers(3)  # items of shared tokens, all items, (item, key head)s that a program has taken
        self.partial = torch.empty(sequences, most_parts, heads, head_dim, dtype=torch.float32, device=device)
        self.partial_lse = torch.empty(sequences, most_parts, heads, dtype=torch.float32, device=device)

    def update(self, block_table: Tensor, lengths_N: Tensor) -> None:
        """The layout of the next step.

        Args:
            block_table: [N, blocks] int32, each sequence's blocks of the cache in order; behind its last, anything.
            lengths_N: int32, tokens of each sequence in the cache, the one that is decoded included.
        """
        n = lengths_N.shape[0]
        # The block that ends the shortest shared stretch is the same in all who share it, and in nobody else: sorted by it,
        # siblings are neighbours however vLLM ordered them. Padded and short sequences go last.
        column = min(self.shared_blocks, block_table.shape[1]) - 1
        long_enough = lengths_N > self.shared_blocks * self.page
        key = torch.where(long_enough, block_table[:n, column], torch.iinfo(torch.int32).max)
        self.order[:n] = key.sort(stable=True).indices
        arrays = (self.order, lengths_N, self.common)
        kernels.common_kernel[(n,)](block_table, *arrays, block_table.stride(0), PAGE=self.page, WIDTH=self.width)
        kernels.groups_kernel[(n,)](
            *arrays, self.shared, self.members, n, self.shared_blocks,
            PAGE=self.page, MOST=self.tile // (self.heads // self.key_heads), WIDTH=self.width,
        )  # fmt: skip
        kernels.items_kernel[(n,)](
            self.order, lengths_N, self.shared, self.members, self.parts, self.items, self.count, n, self.item_tokens,
            self.programs * ITEMS_PER_PROGRAM // self.key_heads or 1,
            PAGE=self.page, HALF=self.most_parts // 2, WIDTH=self.width,
        )  # fmt: skip

    def attend(self, q_NHD: Tensor, keys: Tensor, values: Tensor, table: Tensor, out_NHD: Tensor, scale: float) -> None:
        """Writes the attention of each sequence's one query to ``out_NHD``; zeros for padded sequences.

        Args:
            keys: [blocks, page, K, D]; values alike; any strides but the last, which is 1.
            table: the block table of ``update``.
        """
        ratio = self.heads // self.key_heads
        kernels.parts_kernel[(self.programs,)](
            q_NHD, keys, values, table, self.order, self.items, self.count, self.partial, self.partial_lse,
            q_NHD.stride(0), q_NHD.stride(1), keys.stride(0), keys.stride(1), keys.stride(2),
            table.stride(0), scale * math.log2(math.e),
            HEADS=self.heads, KEY_HEADS=self.key_heads, DIM=self.head_dim, PAGE=self.page, PARTS=self.most_parts,
            TILE=self.tile, OWN_TILE=max(16, triton.next_power_of_2(ratio)), **self.options,
        )  # fmt: skip
        together = math.gcd(self.heads, 8)
        kernels.merge_kernel[(q_NHD.shape[0], self.heads // together)](
            out_NHD, self.partial, self.partial_lse, self.parts, self.count, out_NHD.stride(0), out_NHD.stride(1),
            HEADS=self.heads, DIM=self.head_dim, PARTS=self.most_parts, TOGETHER=together,
        )  # fmt: skip
