"""Triton kernels of ``shared_layout.py``. Place i is in ``ORDER``, the batch's rows ordered so that sharing ones are neighbours."""

# pyright: reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl

FIELDS = tl.constexpr(5)
"""Numbers of an item: place of its first sequence, sequences, first token, the token behind its last, part."""


@triton.jit
def common_kernel(TABLE, ORDER, LENGTHS, COMMON, table_stride, PAGE: tl.constexpr, WIDTH: tl.constexpr):
    """COMMON[i]: full blocks that the i-th sequence in order shares with the one before; never the block being written."""
    i = tl.program_id(0)
    n = 0
    row = tl.load(ORDER + i).to(tl.int64)
    before = tl.load(ORDER + tl.maximum(i - 1, 0)).to(tl.int64)
    if i > 0:
        n = tl.minimum(tl.load(LENGTHS + row) - 1, tl.load(LENGTHS + before) - 1) // PAGE
    first = n
    for j in range(0, n, WIDTH):
        at = j + tl.arange(0, WIDTH)
        ours = tl.load(TABLE + row * table_stride + at, mask=at < n, other=0)
        theirs = tl.load(TABLE + before * table_stride + at, mask=at < n, other=0)
        first = tl.minimum(first, tl.min(tl.where((ours != theirs) & (at < n), at, n), 0))
    tl.store(COMMON + i, tl.maximum(first, 0))


@triton.jit(do_not_specialize=["n", "shared_blocks"])
def groups_kernel(
    ORDER, LENGTHS, COMMON, SHARED, MEMBERS, n, shared_blocks,
    PAGE: tl.constexpr, MOST: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """SHARED[i]: tokens that the i-th sequence reads together with its group. MEMBERS[i]: the size of the group that it
    leads, 0 of one that it does not lead.

    A sequence joins the one before unless it has clearly less in common with it than either of them with its other
    neighbour. (All may share a system prompt, and groups their prompts behind it.) By this bound even MOST sequences
    joined over the shorter stretch read no more than in groups over the longer ones.
    """
    i = tl.program_id(0)
    at = tl.arange(0, WIDTH)
    common = tl.load(COMMON + at, mask=at < n, other=0)
    before = tl.load(COMMON + at - 1, mask=(at > 0) & (at <= n), other=0)
    after = tl.load(COMMON + at + 1, mask=at + 1 < n, other=0)
    cut = (common < shared_blocks) | (common * MOST < (MOST - 1) * tl.maximum(before, after)) | (at >= n)
    begin = tl.max(tl.where(cut & (at <= i), at, 0), 0)
    end = tl.min(tl.where(cut & (at > i), at, n), 0)
    each = tl.cdiv(end - begin, tl.cdiv(end - begin, MOST))  # more than a tile holds: cut into equal shares
    lead = begin + (i - begin) // each * each
    size = tl.minimum(end - lead, each)
    shared = tl.min(tl.where((at > lead) & (at < lead + size), common, 1 << 24), 0)
    tl.store(SHARED + i, tl.where(size > 1, shared, 0) * PAGE)
    tl.store(MEMBERS + i, tl.where(i == lead, size, 0))


@triton.jit(do_not_specialize=["n", "item_tokens", "slots"])
def items_kernel(
    ORDER, LENGTHS, SHARED, MEMBERS, PARTS, ITEMS, COUNT, n, item_tokens, slots,
    PAGE: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The items of the i-th sequence, first those of all shared tokens (most work), then those of all own tokens.

    All tokens are spread over ``slots`` items of about equal length, HALF of them a sequence at most.
    """
    i = tl.program_id(0)
    at = tl.arange(0, WIDTH)
    length = tl.load(LENGTHS + tl.load(ORDER + at, mask=at < n, other=0), mask=at < n, other=0)
    shared = tl.load(SHARED + at, mask=at < n, other=0)
    members = tl.load(MEMBERS + at, mask=at < n, other=0)
    own = tl.maximum(length - shared, 0)
    led = tl.where(members > 0, shared, 0)
    step = tl.maximum(tl.cdiv(tl.cdiv(tl.sum(led + own, 0), slots), PAGE) * PAGE, item_tokens)
    shared_step = even(shared, step, PAGE, HALF)
    own_step = even(own, step, PAGE, HALF)
    shared_items, own_items = tl.cdiv(led, shared_step), tl.cdiv(own, own_step)
    all_shared = tl.sum(shared_items, 0)
    if i == 0:
        tl.store(COUNT, all_shared)
        tl.store(COUNT + 1, all_shared + tl.sum(own_items, 0))
        tl.store(COUNT + 2, 0)
    here = at == i
    tokens, kept = tl.sum(tl.where(here, shared, 0), 0), tl.sum(tl.where(here, own, 0), 0)
    stride, own_stride = tl.sum(tl.where(here, shared_step, 0), 0), tl.sum(tl.where(here, own_step, 0), 0)
    before = tl.cdiv(tokens, stride)
    item = ITEMS + tl.sum(tl.where(at < i, shared_items, 0), 0) * FIELDS
    for part in range(tl.sum(tl.where(here, shared_items, 0), 0)):
        tl.store(item, i)
        tl.store(item + 1, tl.sum(tl.where(here, members, 0), 0))
        tl.store(item + 2, part * stride)
        tl.store(item + 3, tl.minimum((part + 1) * stride, tokens))
        tl.store(item + 4, part)
        item += FIELDS
    item = ITEMS + (all_shared + tl.sum(tl.where(at < i, own_items, 0), 0)) * FIELDS
    for part in range(tl.cdiv(kept, own_stride)):
        tl.store(item, i)
        tl.store(item + 1, 1)
        tl.store(item + 2, tokens + part * own_stride)
        tl.store(item + 3, tokens + tl.minimum((part + 1) * own_stride, kept))
        tl.store(item + 4, before + part)
        item += FIELDS
    tl.store(PARTS + tl.load(ORDER + i), before + tl.cdiv(kept, own_stride))


@triton.jit
def even(tokens, step, PAGE: tl.constexpr, HALF: tl.constexpr):
    """Whole pages of each of the equal items that tokens are cut into: as many as make them about ``step`` long, HALF at most."""
    items = tl.minimum(tl.maximum((tokens + step // 2) // step, 1), HALF)
    return tl.maximum(tl.cdiv(tl.cdiv(tokens, items), PAGE), 1) * PAGE


@triton.jit
def parts_kernel(
    Q, K, V, TABLE, ORDER, ITEMS, COUNT, PARTIAL, PARTIAL_LSE, q_stride, q_head_stride, block_stride, token_stride,
    head_stride, table_stride, scale,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, PARTS: tl.constexpr,
    TILE: tl.constexpr, OWN_TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Persistent: a program takes the next (item, key head) that none has taken, of shared tokens first, then of own ones, whose
    tiles are as small as they can be. COUNT[2] counts those taken."""
    shared = tl.load(COUNT) * KEY_HEADS
    both = tl.load(COUNT + 1) * KEY_HEADS
    work = tl.atomic_add(COUNT + 2, 1)
    while work < shared:
        following = tl.atomic_add(COUNT + 2, 1)  # early: it takes as long as several loads
        _part(
            work, Q, K, V, TABLE, ORDER, ITEMS, PARTIAL, PARTIAL_LSE, q_stride, q_head_stride, block_stride, token_stride,
            head_stride, table_stride, scale, HEADS, KEY_HEADS, DIM, PAGE, PARTS, TILE, BLOCK,
        )  # fmt: skip
        work = following
    while work < both:
        following = tl.atomic_add(COUNT + 2, 1)
        _part(
            work, Q, K, V, TABLE, ORDER, ITEMS, PARTIAL, PARTIAL_LSE, q_stride, q_head_stride, block_stride, token_stride,
            head_stride, table_stride, scale, HEADS, KEY_HEADS, DIM, PAGE, PARTS, OWN_TILE, BLOCK,
        )  # fmt: skip
        work = following


@triton.jit
def _part(
    work, Q, K, V, TABLE, ORDER, ITEMS, PARTIAL, PARTIAL_LSE, q_stride, q_head_stride, block_stride, token_stride,
    head_stride, table_stride, scale,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, PARTS: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Attention of an item's sequences, at one key head's query heads, over the item's tokens."""
    RATIO: tl.constexpr = HEADS // KEY_HEADS
    head = work % KEY_HEADS
    item = ITEMS + work // KEY_HEADS * FIELDS
    lead, members, part = tl.load(item), tl.load(item + 1), tl.load(item + 4)
    begin, end = tl.load(item + 2), tl.load(item + 3)
    rows = tl.arange(0, TILE)
    dims = tl.arange(0, DIM)
    ours = rows // RATIO < members
    sequence = tl.load(ORDER + lead + rows // RATIO, mask=ours, other=0).to(tl.int64)
    heads = head * RATIO + rows % RATIO
    q = tl.load(
        Q + sequence[:, None] * q_stride + heads[:, None] * q_head_stride + dims[None, :], mask=ours[:, None], other=0.0
    )
    highest = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    out = tl.zeros([TILE, DIM], tl.float32)
    table = TABLE + tl.load(ORDER + lead).to(tl.int64) * table_stride
    for j in range(begin, end, BLOCK):
        token = j + tl.arange(0, BLOCK)
        there = token < end
        block = tl.load(table + token // PAGE, mask=there, other=0).to(tl.int64)
        at = block * block_stride + (token % PAGE) * token_stride + head * head_stride
        k = tl.load(K + at[None, :] + dims[:, None], mask=there[None, :], other=0.0)
        logits = tl.where(there[None, :], tl.dot(q, k, input_precision="ieee") * scale, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        weights = tl.exp2(logits - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(V + at[:, None] + dims[None, :], mask=there[:, None], other=0.0)
        # Weights as the sum of two numbers of the cache's precision: their rounding would be most of this kernel's error.
        rounded = weights.to(v.dtype)
        rest = (weights - rounded.to(tl.float32)).to(v.dtype)
        out = tl.dot(rounded, v, out * shrink[:, None], input_precision="ieee")
        out = tl.dot(rest, v, out, input_precision="ieee")
        highest = higher
    to = (sequence * PARTS + part) * HEADS + heads
    tl.store(PARTIAL + to[:, None] * DIM + dims[None, :], out / total[:, None], mask=ours[:, None])
    tl.store(PARTIAL_LSE + to, highest + tl.log2(total), mask=ours)


@triton.jit
def merge_kernel(
    OUT, PARTIAL, PARTIAL_LSE, PARTS_OF, COUNT, out_stride, out_head_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, PARTS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """The parts of one sequence, at TOGETHER heads, weighted by their sums of exponentials (base 2)."""
    sequence = tl.program_id(0).to(tl.int64)
    if (sequence == 0) & (tl.program_id(1) == 0):
        tl.store(COUNT + 2, 0)  # for the next layer
    heads = tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER)
    dims = tl.arange(0, DIM)
    highest = tl.full([TOGETHER], float("-inf"), tl.float32)
    total = tl.zeros([TOGETHER], tl.float32)
    out = tl.zeros([TOGETHER, DIM], tl.float32)
    for part in range(tl.load(PARTS_OF + sequence)):
        at = (sequence * PARTS + part) * HEADS + heads
        lse = tl.load(PARTIAL_LSE + at)
        higher = tl.maximum(highest, lse)
        shrink, weight = tl.exp2(highest - higher), tl.exp2(lse - higher)
        out = out * shrink[:, None] + tl.load(PARTIAL + at[:, None] * DIM + dims[None, :]) * weight[:, None]
        total = total * shrink + weight
        highest = higher
    total = tl.where(total == 0.0, 1.0, total)
    to = OUT + sequence * out_stride + heads[:, None] * out_head_stride + dims[None, :]
    tl.store(to, (out / total[:, None]).to(OUT.dtype.element_ty))
