"""Divides samples into micro-batches of the token budget, so that what shares a beginning lies together, and distributes them over
ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, zip_longest

import numpy as np

from pgrpo.attention.choose import AttentionChoice
from pgrpo.attention.layout import ancestry, nodes_of
from pgrpo.packing.forest import Forest, Sorted, Work, length
from pgrpo.types import Sample

LEAST_SHARED = (1, 4, 16, 64, 256, 1024, 4096, 2**62)
"""Shortest beginnings, in tokens, that are tried as the least that is worth a node; the last one shares prompts alone."""
KEEP_NS = 1e6
"""Time, in each layer's forward and backward, of computing a beginning by itself: launches, and gathering the layer once more. An
estimate."""


def share_out(
    samples: Sequence[Sample],
    dp_size: int,
    token_budget: int,
    cost: Callable[[Work], np.ndarray],
    attention: AttentionChoice = AttentionChoice(),
    *,
    is_shared: bool = True,
    most_kept: int = 0,
) -> list[list[Forest]]:
    """Micro-batches of every rank: ``plan[rank][i]`` is a forest of at most ``token_budget`` rows.

    A node more saves the rows that samples would repeat, and costs attention a pass or copies. A prompt is always shared; of other
    beginnings several least lengths are tried, and the division is taken whose ranks should be done first. All ranks get the same
    number of micro-batches, as FSDP requires: a rank with fewer gets fillers, the shortest sample with no token in the loss.

    What does not fit the budget together is cut, and its beginning computed again or, where that saves time, kept: forests with
    ``kept`` are then the passes of a span, which begins and ends at the same micro-batch on all ranks.

    Args:
        cost: FLOPs of the forward and backward of each run of rows.
        attention: its ``flops_per_ns`` weighs passes against rows; 0 shares every beginning.
        is_shared: False gives every sample rows of its own.
        most_kept: tokens of the longest beginning that may be kept.

    Raises:
        ValueError: a single sample is larger than the budget.
    """
    if not samples:
        return [[] for _ in range(dp_size)]
    if (most := max(map(length, samples))) > token_budget:
        raise ValueError(
            f"a sample of {most} tokens does not fit train.token_budget={token_budget}: "
            "raise train.token_budget or lower data.max_prompt_tokens or rollout.max_completion_tokens"
        )
    whole = Sorted.of(samples)
    if not is_shared:  # as if no two samples began alike
        whole = replace(whole, shared=np.zeros_like(whole.shared))
    divisions = _divisions(whole, dp_size, token_budget, cost, attention, most_kept)
    best = min(divisions, key=lambda division: division.seconds)
    shortest = min(samples, key=length)
    nothing = [False] * len(shortest.token_ids)
    filler = replace(Forest.of([replace(shortest, mask=nothing, advantages=[0.0 for _ in nothing])]), is_filler=True)
    plan = [
        [_forest(whole, pieces, best.least, token_budget) if pieces else filler for pieces in batches]
        for batches in best.plan
    ]
    for start, count in best.spans:
        for batches in plan:
            batches[start] = replace(batches[start], span=count)
    return plan


@dataclass(frozen=True, slots=True)
class Piece:
    """Samples ``first`` to ``end`` of a ``Sorted``, which stay together: their rows and cost. ``passes`` are its parts if it is
    more than a micro-batch; each begins with ``kept`` tokens, which all but the first pass do not compute."""

    first: int
    end: int
    rows: int
    cost: float
    kept: int = 0
    is_again: bool = False
    passes: tuple[Piece, ...] = ()


@dataclass(frozen=True, slots=True)
class _Division:
    """Micro-batches (lists of pieces, none for a filler) of each rank, where spans begin and how long they are, and about how long
    all take, in FLOPs."""

    least: int
    plan: list[list[list[Piece]]]
    spans: list[tuple[int, int]]
    seconds: float


def _divisions(
    whole: Sorted,
    dp_size: int,
    budget: int,
    cost: Callable[[Work], np.ndarray],
    attention: AttentionChoice,
    most_kept: int,
) -> Iterator[_Division]:
    tried: list[np.ndarray] = []
    longest = int(whole.shared.max())  # above it all leasts are alike
    leasts = [n for n in LEAST_SHARED[:-1] if n <= longest] + [LEAST_SHARED[-1]]
    for least in leasts if attention.flops_per_ns else LEAST_SHARED[:1]:
        runs = list(whole.runs(least))
        kept = whole.kept(runs)
        if any(np.array_equal(kept, other) for other in tried):
            continue
        tried.append(kept)
        nodes = nodes_of([run.stop - run.start for run in runs], [run.parent for run in runs])
        passes = attention.flops_per_ns * attention.choose(ancestry(nodes)).ns / dp_size
        trees = _Trees.of(whole, kept, cost)
        # A tree that holds most samples may be cut finer than the budget, so that no rank waits for another: into about one, a half
        # or a quarter of a piece a rank, as each piece computes the tree's beginning again.
        fair = -(-int((whole.lengths - kept).sum()) // dp_size)
        # Where beginnings are kept, a tree may also be whole, in passes.
        most = int(trees.sizes().max()) if most_kept else min(int(trees.sizes().max()), budget)
        limits = budget, fair, 2 * fair, 4 * fair, most
        keeping = attention.flops_per_ns * KEEP_NS
        for limit in sorted({min(max(n, int(whole.lengths.max())), most) for n in limits}):
            cut = trees.pieces(limit)
            pieces = [part for piece in cut for part in trees.passes(piece, budget, most_kept, keeping)]
            plan, spans = _assign(pieces, dp_size, budget)
            rounds = zip(*([sum(p.cost for p in batch) for batch in batches] for batches in plan), strict=True)
            yield _Division(least, plan, spans, passes + sum(map(max, rounds)) + keeping * len(spans))


@dataclass(frozen=True, slots=True)
class _Trees:
    """Samples as trees: rows and cost of each sample behind what is kept, and of each as the first of a piece."""

    whole: Sorted
    kept: np.ndarray
    cost: Callable[[Work], np.ndarray]
    behind: tuple[np.ndarray, np.ndarray]
    first: tuple[np.ndarray, np.ndarray]

    @staticmethod
    def of(whole: Sorted, kept: np.ndarray, cost: Callable[[Work], np.ndarray]) -> _Trees:
        def each(starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            scored = np.maximum(whole.lengths - np.maximum(whole.prompts, starts), 0)
            return whole.lengths - starts, cost(Work(starts, whole.lengths, scored))

        return _Trees(whole, kept, cost, each(kept), each(np.zeros_like(kept)))

    def sizes(self) -> np.ndarray:
        """Rows of each tree."""
        return np.add.reduceat(self.behind[0], np.flatnonzero(self.kept == 0))

    def pieces(self, limit: int) -> list[Piece]:
        """Whole trees, and trees of more than ``limit`` rows cut into pieces that fit."""
        roots = pairwise([*np.flatnonzero(self.kept == 0).tolist(), len(self.kept)])
        cuts: list[int] = []
        for (a, b), rows in zip(roots, self.sizes().tolist(), strict=True):
            cuts += self._cut(a, b, limit)[:-1] if rows > limit else [a]
        return self._between([*cuts, len(self.kept)])

    def passes(self, piece: Piece, budget: int, most_kept: int, keeping: float) -> list[Piece]:
        """A piece of more than ``budget`` rows as one of several passes, or as pieces that fit where ``keeping`` costs more than
        the rows that these compute again."""
        if piece.rows <= budget:
            return [piece]
        parts = self._between(self._cut(piece.first, piece.end, budget))
        inside = slice(piece.first + 1, piece.end)
        # Nothing in the kept rows is in the loss, except the last row's prediction.
        kept = min(int(self.kept[inside].min()), int(self.whole.prompts[piece.first : piece.end].min()), most_kept)
        saved = float(self.cost(Work(*(np.array([n]) for n in (0, kept, 0))))[0])
        if (len(parts) - 1) * saved <= keeping or min(part.rows for part in parts) <= kept:
            return parts
        passes = [
            replace(part, kept=kept, is_again=i > 0, cost=part.cost - (i > 0) * saved) for i, part in enumerate(parts)
        ]
        rows = sum(part.rows for part in parts) - kept * (len(parts) - 1)
        return [Piece(piece.first, piece.end, rows, sum(p.cost for p in passes) + keeping, passes=tuple(passes))]

    def _cut(self, first: int, end: int, limit: int) -> list[int]:
        return [first + cut for cut in cut_tree(self.whole.lengths[first:end], self.kept[first:end], limit)]

    def _between(self, cuts: list[int]) -> list[Piece]:
        found = []
        for behind, first in zip(self.behind, self.first, strict=True):
            rows = behind[: cuts[-1]].copy()
            rows[cuts[:-1]] = first[cuts[:-1]]
            found.append(np.add.reduceat(rows, cuts[:-1]).tolist())
        return [Piece(*piece) for piece in zip(cuts, cuts[1:], *found, strict=False)]


def cut_tree(lengths: np.ndarray, kept: np.ndarray, limit: int) -> list[int]:
    """Where to cut the samples of a tree, both ends included: pieces of at most ``limit`` rows, with as few rows computed again as
    possible, and of these the most even."""
    count, kept = len(lengths), np.append(0, kept[1:])
    before = np.concatenate([[0], np.cumsum(lengths - kept)])
    starts = before[:-1] - kept  # rows of a piece i to j: before[j] - starts[i]; never falls with i
    best = np.zeros(count + 1)
    cut = np.zeros(count + 1, dtype=np.int64)
    for j in range(1, count + 1):
        low = int(np.searchsorted(starts[:j], before[j] - limit))
        unevenness = ((before[j] - starts[low:j]) / limit) ** 2 / (count + 1)  # of all pieces, less than one row
        total = best[low:j] + kept[low:j] + unevenness
        cut[j] = low + int(total.argmin())
        best[j] = total.min()
    cuts = [count]
    while cuts[-1]:
        cuts.append(int(cut[cuts[-1]]))
    return cuts[::-1]


def _assign(
    pieces: Sequence[Piece], dp_size: int, budget: int
) -> tuple[list[list[list[Piece]]], list[tuple[int, int]]]:
    """The costliest remaining piece goes to the rank with the least cost so far (longest-processing-time rule)."""
    ranks = [_Bin(0) for _ in range(dp_size)]
    for piece in sorted(pieces, key=lambda piece: -piece.cost):
        min(ranks, key=lambda rank: rank.cost).add(piece)
    owned = [rank.pieces for rank in ranks]
    filled = [fill_micro_batches([piece for piece in own if not piece.passes], budget) for own in owned]
    # Ranks wait for each other: equal costs at a time.
    rest = [sorted(batches, key=lambda batch: -sum(piece.cost for piece in batch)) for batches in filled]
    # Spans, the longest first. A rank without one has other micro-batches meanwhile, as it keeps next to nothing.
    plan: list[list[list[Piece]]] = [[] for _ in owned]
    spans: list[tuple[int, int]] = []
    parts = [sorted((piece.passes for piece in own if piece.passes), key=len, reverse=True) for own in owned]

    def extend(count: int, passes: Sequence[Sequence[Piece]]) -> None:
        for batches, own, more in zip(plan, passes, rest, strict=True):
            taken = [[part] for part in own] or [more.pop(0) for _ in more[:count]]
            batches += [*taken, *([] for _ in range(count - len(taken)))]

    for span in zip_longest(*parts, fillvalue=()):
        spans.append((len(plan[0]), max(map(len, span))))
        extend(spans[-1][1], span)
    extend(max(map(len, rest)), [()] * len(owned))
    return plan, spans


def _forest(whole: Sorted, pieces: Sequence[Piece], least: int, budget: int) -> Forest:
    taken = whole.take(np.sort(np.concatenate([np.arange(piece.first, piece.end) for piece in pieces])))
    forest, first = taken.forest(least), pieces[0]
    # With fewer samples other nodes may be too short, and there may be more rows; not if everything is shared.
    if forest.rows > budget or (first.kept and forest.parents.count(-1) > 1):
        forest = taken.forest()
    if not first.kept:
        return forest
    goes_on = first.is_again and whole.samples[first.first].prompt_ids == whole.samples[first.first - 1].prompt_ids
    return replace(forest, kept=first.kept, is_again=first.is_again, goes_on=goes_on)


def fill_micro_batches(pieces: Sequence[Piece], token_budget: int) -> list[list[Piece]]:
    """Bins of at most ``token_budget`` rows and about equal cost, as few as first-fit decreasing finds.

    Costs should be equal because ranks wait for each other in every micro-batch. Deterministic. Every piece must fit the budget.
    """
    bins = _first_fit(pieces, token_budget)
    even = [_Bin(token_budget) for _ in bins]
    for piece in sorted(pieces, key=lambda piece: piece.cost, reverse=True):
        found = min((b for b in even if piece.rows <= b.room), key=lambda b: b.cost, default=None)
        if found is None:  # even costs take more bins
            return [b.pieces for b in bins]
        found.add(piece)
    return [b.pieces for b in even]


def _first_fit(pieces: Sequence[Piece], token_budget: int) -> list[_Bin]:
    bins: list[_Bin] = []
    for piece in sorted(pieces, key=lambda piece: piece.rows, reverse=True):
        found = next((b for b in bins if piece.rows <= b.room), None)
        if found is None:
            bins.append(found := _Bin(token_budget))
        found.add(piece)
    return bins


@dataclass(slots=True)
class _Bin:
    """Pieces, the rows for which there is still room, and the sum of their costs."""

    room: int
    cost: float = 0.0
    pieces: list[Piece] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        self.pieces.append(piece)
        self.room -= piece.rows
        self.cost += piece.cost
