"""Triton kernels of ``shared_layout.py``. Place i is in ``ORDER``, the batch's rows ordered so that sharing ones are neighbours."""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

FIELDS = tl.constexpr(4)
"""Numbers of a step (BLOCK tokens at most): its sequence, the tokens of its stretch from it on, where its run's partial sums begin,
and the steps of its run from it on. The sequence is a row, but for shared tokens the place of the group's first sequence."""


@triton.jit(do_not_specialize=["n"])
def ranks_kernel(TABLE, LENGTHS, RANKS, n, table_stride, PAGE: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """RANKS: of the i-th row the number of rows whose full blocks come before its own in lexicographic order, so that sorting by it
    makes those with a common beginning neighbours. One that ends comes behind those that go on; padded ones are last.

    A block of vLLM's prefix cache stands for all tokens up to its end, so a bisection finds how many two rows share. (They share
    fewer than it finds where vLLM computed a block twice. Then neighbours may be missed, and ranks may be equal.)
    """
    i = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    ours = tl.maximum(tl.load(LENGTHS + i) - 1, 0) // PAGE
    theirs = tl.maximum(tl.load(LENGTHS + at, mask=at < n, other=0) - 1, 0) // PAGE
    table, tables = TABLE + i * table_stride, TABLE + at.to(tl.int64) * table_stride
    common = tl.zeros([WIDTH], tl.int32)
    for bit in range(BITS):
        more = common + (1 << (BITS - 1 - bit))
        both = more <= tl.minimum(ours, theirs)
        equal = tl.load(table + more - 1, mask=both, other=0) == tl.load(tables + more - 1, mask=both, other=0)
        common = tl.where(both & equal, more, common)
    our_next = tl.load(table + common, mask=common < ours, other=0x7FFFFFFF)
    their_next = tl.load(tables + common, mask=common < theirs, other=0x7FFFFFFF)
    tl.store(RANKS + i, tl.sum((their_next < our_next).to(tl.int32), 0))


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


@triton.jit(do_not_specialize=["n", "splits", "least", "most"])
def steps_kernel(
    TABLE, ORDER, LENGTHS, SHARED, MEMBERS, STEPS, PAGES, SHARES, RUNS, n, splits, least, most, table_stride,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr, WIDTH: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """The steps of the i-th sequence in order: those of its group's shared tokens, if it leads the group, and those of its own.

    All steps of shared tokens are cut into ``splits`` equal shares, and so are those of own tokens. A run is what one share has of
    the steps of a group or sequence. SHARES: shared steps, those of a share, and the same of own steps.

    A run's partial sums are a row for each of its sequences. In the s-th share, the i-th sequence in order has row i + MOST s of
    shared runs (no group is larger, so no two runs meet), and i + s of own ones. RUNS: of a sequence the row of its first shared
    run, the number of these, and the same of its own runs.
    """
    i = tl.program_id(0)
    at = tl.arange(0, WIDTH)
    row = tl.load(ORDER + i)
    length = tl.load(LENGTHS + tl.load(ORDER + at, mask=at < n, other=0), mask=at < n, other=0)
    shared = tl.load(SHARED + at, mask=at < n, other=0)
    members = tl.load(MEMBERS + at, mask=at < n, other=0)
    own = tl.maximum(length - shared, 0)
    led = tl.where(members > 0, shared, 0)
    led_steps, own_steps = tl.cdiv(led, BLOCK), tl.cdiv(own, BLOCK)
    led_share = tl.maximum(tl.cdiv(tl.sum(led_steps, 0), splits), least)
    own_share = tl.maximum(tl.cdiv(tl.sum(own_steps, 0), splits), least)
    if i == 0:
        tl.store(SHARES, tl.sum(led_steps, 0))
        tl.store(SHARES + 1, led_share)
        tl.store(SHARES + 2, tl.sum(own_steps, 0))
        tl.store(SHARES + 3, own_share)
    lead = tl.max(tl.where((members > 0) & (at <= i), at, 0), 0)
    table = TABLE + row.to(tl.int64) * table_stride
    tokens = tl.sum(tl.where(at == lead, led, 0), 0)
    first = tl.sum(tl.where(at < lead, led_steps, 0), 0)
    if i == lead:
        _write_steps(table, STEPS, PAGES, lead, 0, tokens, first, led_share, lead, MOST, PAGE, BLOCK, TOGETHER)
    _write_runs(RUNS + row * 4, i, MOST, first, tl.cdiv(tokens, BLOCK), led_share)
    before, tokens = tl.sum(tl.where(at == i, shared, 0), 0), tl.sum(tl.where(at == i, own, 0), 0)
    first = tl.sum(tl.where(at < i, own_steps, 0), 0)
    _write_steps(
        table, STEPS + most * FIELDS, PAGES + most * (BLOCK // PAGE), row, before, tokens, first, own_share, i, 1,
        PAGE, BLOCK, TOGETHER,
    )  # fmt: skip
    _write_runs(RUNS + row * 4 + 2, i, 1, first, tl.cdiv(tokens, BLOCK), own_share)


@triton.jit
def _write_steps(
    table, STEPS, PAGES, sequence, before, tokens, first, share, place, apart,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Steps of a stretch of tokens behind ``before`` others (whole pages), of which the first is step ``first``."""
    steps = tl.cdiv(tokens, BLOCK)
    for j in range(0, steps, TOGETHER):
        step = j + tl.arange(0, TOGETHER)
        there = step < steps
        to = STEPS + (first + step) * FIELDS
        tl.store(to, sequence, mask=there)
        tl.store(to + 1, tokens - step * BLOCK, mask=there)
        tl.store(to + 2, place + apart * ((first + step) // share), mask=there)
        tl.store(to + 3, tl.minimum(steps - step, share - (first + step) % share), mask=there)
        for page in tl.static_range(BLOCK // PAGE):
            number = tl.minimum(step * (BLOCK // PAGE) + page, (tokens - 1) // PAGE)  # behind the last, the last again
            block = tl.load(table + before // PAGE + number, mask=there, other=0)
            tl.store(PAGES + (first + step) * (BLOCK // PAGE) + page, block, mask=there)


@triton.jit
def _write_runs(to, place, apart, first, steps, share):
    tl.store(to, place + apart * (first // share))
    tl.store(to + 1, tl.where(steps > 0, (first + steps - 1) // share - first // share + 1, 0))


@triton.jit(do_not_specialize=["most"])
def parts_kernel(
    Q, K, V, ORDER, MEMBERS, STEPS, PAGES, SHARES, SHARED_OUT, SHARED_LSE, OWN_OUT, OWN_LSE, most,
    q_stride, q_head_stride, block_stride, token_stride, head_stride, scale,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    TILE: tl.constexpr, OWN_TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One share of shared steps and one of own steps, at one key head. Its loads of keys and values never wait for a run to end."""
    head = tl.program_id(0) % KEY_HEADS
    split = tl.program_id(0) // KEY_HEADS
    step, until = _share(SHARES, split)
    while step < until:
        step = _shared_run(
            step, head, Q, K, V, ORDER, MEMBERS, STEPS, PAGES, SHARED_OUT, SHARED_LSE, q_stride, q_head_stride,
            block_stride, token_stride, head_stride, scale, HEADS, KEY_HEADS, DIM, PAGE, TILE, BLOCK,
        )  # fmt: skip
    step, until = _share(SHARES + 2, split)
    _own_runs(
        step, until, head, Q, K, V, STEPS + most * FIELDS, PAGES + most * (BLOCK // PAGE), OWN_OUT, OWN_LSE,
        q_stride, q_head_stride, block_stride, token_stride, head_stride, scale,
        HEADS, KEY_HEADS, DIM, PAGE, OWN_TILE, BLOCK,
    )  # fmt: skip


@triton.jit
def _share(SHARES, split):
    """Its first step, and the one behind its last. Programs above those that there are steps for get none."""
    steps, share = tl.load(SHARES), tl.load(SHARES + 1)
    return tl.minimum(split * share, steps), tl.minimum((split + 1) * share, steps)


@triton.jit
def _shared_run(
    step, head, Q, K, V, ORDER, MEMBERS, STEPS, PAGES, OUT, LSE, q_stride, q_head_stride,
    block_stride, token_stride, head_stride, scale,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The run that begins with ``step``: a group's sequences at one key head's query heads. Returns the step behind it."""
    RATIO: tl.constexpr = HEADS // KEY_HEADS
    lead, run = tl.load(STEPS + step * FIELDS), tl.load(STEPS + step * FIELDS + 2)
    until = step + tl.load(STEPS + step * FIELDS + 3)
    rows, dims = tl.arange(0, TILE), tl.arange(0, DIM)
    ours = rows // RATIO < tl.load(MEMBERS + lead)
    sequence = tl.load(ORDER + lead + rows // RATIO, mask=ours, other=0).to(tl.int64)
    heads = head * RATIO + rows % RATIO
    q = tl.load(
        Q + sequence[:, None] * q_stride + heads[:, None] * q_head_stride + dims[None, :], mask=ours[:, None], other=0.0
    )
    highest = tl.full([TILE], float("-inf"), tl.float32)
    totals = tl.zeros([TILE, BLOCK], tl.float32)
    out = tl.zeros([TILE, DIM], tl.float32)
    pages = _pages(PAGES, step, PAGE, BLOCK)
    for at in range(step, until):
        cached = _cached(pages, head, block_stride, token_stride, head_stride, PAGE, BLOCK)
        pages = _pages(PAGES, at + 1, PAGE, BLOCK)
        left = tl.load(STEPS + at * FIELDS + 1)
        highest, totals, out = _step(q, K, V, cached, left, highest, totals, out, scale, DIM, BLOCK)
    total = tl.sum(totals, 1)
    to = (run + rows // RATIO).to(tl.int64) * HEADS + heads
    tl.store(OUT + to[:, None] * DIM + dims[None, :], out / total[:, None], mask=ours[:, None])
    tl.store(LSE + to, highest + tl.log2(total), mask=ours)
    return until


@triton.jit
def _own_runs(
    step, until, head, Q, K, V, STEPS, PAGES, OUT, LSE, q_stride, q_head_stride,
    block_stride, token_stride, head_stride, scale,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Runs of own tokens, one after the other in one loop: most are short, and a loop for each would begin without keys."""
    RATIO: tl.constexpr = HEADS // KEY_HEADS
    rows, dims = tl.arange(0, TILE), tl.arange(0, DIM)
    ours = rows < RATIO
    heads = head * RATIO + rows
    highest = tl.full([TILE], float("-inf"), tl.float32)
    totals = tl.zeros([TILE, BLOCK], tl.float32)
    out = tl.zeros([TILE, DIM], tl.float32)
    pages = _pages(PAGES, step, PAGE, BLOCK)
    row = tl.load(STEPS + step * FIELDS).to(tl.int64)
    for at in range(step, until):
        cached = _cached(pages, head, block_stride, token_stride, head_stride, PAGE, BLOCK)
        q = tl.load(Q + row * q_stride + heads[:, None] * q_head_stride + dims[None, :], mask=ours[:, None], other=0.0)
        pages = _pages(PAGES, at + 1, PAGE, BLOCK)
        row = tl.load(STEPS + (at + 1) * FIELDS).to(tl.int64)
        left, rest = tl.load(STEPS + at * FIELDS + 1), tl.load(STEPS + at * FIELDS + 3)
        highest, totals, out = _step(q, K, V, cached, left, highest, totals, out, scale, DIM, BLOCK)
        if rest == 1:
            total = tl.sum(totals, 1)
            to = tl.load(STEPS + at * FIELDS + 2).to(tl.int64) * HEADS + heads
            tl.store(OUT + to[:, None] * DIM + dims[None, :], out / total[:, None], mask=ours[:, None])
            tl.store(LSE + to, highest + tl.log2(total), mask=ours)
        # The next run begins with nothing. -inf alone would drop finite sums, but pass one sequence's NaN on to the next.
        highest = tl.where(rest == 1, float("-inf"), highest)
        totals, out = tl.where(rest == 1, 0.0, totals), tl.where(rest == 1, 0.0, out)


@triton.jit
def _step(q, K, V, cached, left, highest, totals, out, scale, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Attention of q over BLOCK tokens, of which ``left`` count, added to that over those before."""
    dims = tl.arange(0, DIM)
    there = tl.arange(0, BLOCK) < left
    k = tl.load(K + cached[None, :] + dims[:, None])  # of tokens that do not count anything
    logits = tl.where(there[None, :], tl.dot(q, k, input_precision="ieee") * scale, float("-inf"))
    higher = tl.maximum(highest, tl.max(logits, 1))
    weights = tl.exp2(logits - higher[:, None])
    shrink = tl.exp2(highest - higher)
    v = tl.load(V + cached[:, None] + dims[None, :], mask=there[:, None], other=0.0)  # 0 times anything may be NaN
    # Weights as the sum of two numbers of the cache's precision: their rounding would be most of this kernel's error.
    rounded = weights.to(v.dtype)
    rest = (weights - rounded.to(tl.float32)).to(v.dtype)
    out = tl.dot(rounded, v, out * shrink[:, None], input_precision="ieee")
    out = tl.dot(rest, v, out, input_precision="ieee")
    return higher, totals * shrink[:, None] + weights, out


@triton.jit
def _pages(PAGES, step, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """Blocks of the cache that a step reads, each a scalar: a vector would be laid out anew for keys and for values."""
    found = ()
    for page in tl.static_range(BLOCK // PAGE):
        found = found + (tl.load(PAGES + step * (BLOCK // PAGE) + page).to(tl.int64),)  # noqa: RUF005
    return found


@triton.jit
def _cached(pages, head, block_stride, token_stride, head_stride, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """Where in the cache a step's keys (and values) of one key head are: [BLOCK]."""
    token = tl.arange(0, BLOCK)
    block = tl.zeros([BLOCK], tl.int64)
    for page in tl.static_range(BLOCK // PAGE):
        block = tl.where(token // PAGE == page, pages[page], block)
    return block * block_stride + token % PAGE * token_stride + head * head_stride


@triton.jit
def merge_kernel(
    OUT, SHARED_OUT, SHARED_LSE, OWN_OUT, OWN_LSE, RUNS, out_stride, out_head_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, MOST: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """The runs of one sequence, at TOGETHER heads, weighted by their sums of exponentials (base 2)."""
    sequence = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER)
    runs = RUNS + sequence * 4
    shared, own = tl.load(runs).to(tl.int64), tl.load(runs + 2).to(tl.int64)
    highest = tl.full([TOGETHER], float("-inf"), tl.float32)
    total = tl.zeros([TOGETHER], tl.float32)
    out = tl.zeros([TOGETHER, DIM], tl.float32)
    for run in range(tl.load(runs + 1)):
        at = (shared + run * MOST) * HEADS + heads
        highest, total, out = _merged(SHARED_OUT, SHARED_LSE, at, highest, total, out, DIM)
    for run in range(tl.load(runs + 3)):
        highest, total, out = _merged(OWN_OUT, OWN_LSE, (own + run) * HEADS + heads, highest, total, out, DIM)
    total = tl.where(total == 0.0, 1.0, total)
    to = OUT + sequence * out_stride + heads[:, None] * out_head_stride + tl.arange(0, DIM)[None, :]
    tl.store(to, (out / total[:, None]).to(OUT.dtype.element_ty))


@triton.jit
def _merged(PARTIAL, LSE, at, highest, total, out, DIM: tl.constexpr):
    lse = tl.load(LSE + at)
    higher = tl.maximum(highest, lse)
    shrink, weight = tl.exp2(highest - higher), tl.exp2(lse - higher)
    partial = tl.load(PARTIAL + at[:, None] * DIM + tl.arange(0, DIM)[None, :])
    return higher, total * shrink + weight, out * shrink[:, None] + partial * weight[:, None]
