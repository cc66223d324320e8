"""Divides samples into micro-batches of the token budget, so that what shares a beginning lies together, and distributes them over
ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, zip_longest

import numpy as np

from pgrpo.attention.choose import AttentionChoice
from pgrpo.attention.layout import ancestry, nodes_of
from pgrpo.packing.forest import Each, Forest, Sorted, length
from pgrpo.types import Sample

LEAST_SHARED = (1, 4, 16, 64, 256, 1024, 4096, 2**62)
"""Shortest beginnings, in tokens, that are tried as the least that is worth a node; the last one shares prompts alone."""


def share_out(
    samples: Sequence[Sample],
    dp_size: int,
    token_budget: int,
    cost: Callable[[Each], np.ndarray],
    attention: AttentionChoice | None = None,
    *,
    is_shared: bool = True,
) -> list[list[Forest]]:
    """Micro-batches of every rank: ``plan[rank][i]`` is a forest of at most ``token_budget`` rows.

    A node more saves the rows that samples would repeat, and costs attention a pass or copies. A prompt is always shared; of other
    beginnings several least lengths are tried, and the division is taken whose ranks should be done first. All ranks get the same
    number of micro-batches, as FSDP requires: a rank with fewer gets fillers, the shortest sample with no token in the loss.

    Args:
        cost: FLOPs of the forward and backward of each run of rows.
        attention: its ``flops_per_ns`` weighs passes against rows; 0 shares every beginning.
        is_shared: False gives every sample rows of its own.

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
    divisions = _divisions(whole, dp_size, token_budget, cost, attention or AttentionChoice(), is_shared)
    best = min(divisions, key=lambda division: division.seconds)
    plan = [[_forest(whole, pieces, best.least, token_budget) for pieces in batches] for batches in best.plan]
    rounds = max(map(len, plan))
    filler = Forest.of([weightless(min(samples, key=length))])
    for batches in plan:
        batches.extend(replace(filler, is_filler=True) for _ in range(rounds - len(batches)))
    return plan


@dataclass(frozen=True, slots=True)
class Piece:
    """Samples ``first`` to ``end`` of a ``Sorted``, which stay together: their rows and cost."""

    first: int
    end: int
    rows: int
    cost: float


@dataclass(frozen=True, slots=True)
class _Division:
    """Micro-batches (lists of pieces) of each rank, and about how long they take, in FLOPs."""

    least: int
    plan: list[list[list[Piece]]]
    seconds: float


def _divisions(
    whole: Sorted,
    dp_size: int,
    budget: int,
    cost: Callable[[Each], np.ndarray],
    attention: AttentionChoice,
    is_shared: bool,
) -> Iterator[_Division]:
    tried: list[np.ndarray] = []
    longest = int(whole.shared.max())  # above it all leasts are alike
    leasts = [n for n in LEAST_SHARED[:-1] if n <= longest] + [LEAST_SHARED[-1]]
    leasts = leasts if attention.flops_per_ns else LEAST_SHARED[:1]
    for least in leasts if is_shared else (0,):
        runs = list(whole.runs(least)) if is_shared else []
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
        largest = int(trees.sizes().max())
        finer = (min(budget, share * fair) for share in (1, 2, 4) if dp_size > 1)
        for limit in sorted({min(max(n, int(whole.lengths.max())), largest) for n in (budget, *finer)}):
            plan = _assign(trees.pieces(limit), dp_size, budget)
            rounds = zip_longest(
                *([sum(p.cost for p in batch) for batch in batches] for batches in plan), fillvalue=0.0
            )
            yield _Division(least, plan, passes + sum(map(max, rounds)))


@dataclass(frozen=True, slots=True)
class _Trees:
    """Samples as trees: rows and cost of each sample behind what is kept, and of each as the first of a piece."""

    lengths: np.ndarray
    kept: np.ndarray
    behind: tuple[np.ndarray, np.ndarray]
    first: tuple[np.ndarray, np.ndarray]

    @staticmethod
    def of(whole: Sorted, kept: np.ndarray, cost: Callable[[Each], np.ndarray]) -> _Trees:
        def each(starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            scored = np.maximum(whole.lengths - np.maximum(whole.prompts, starts), 0)
            return whole.lengths - starts, cost(Each(starts, whole.lengths, scored))

        return _Trees(whole.lengths, kept, each(kept), each(np.zeros_like(kept)))

    def sizes(self) -> np.ndarray:
        """Rows of each tree."""
        return np.add.reduceat(self.behind[0], np.flatnonzero(self.kept == 0))

    def pieces(self, limit: int) -> list[Piece]:
        """Whole trees, and trees of more than ``limit`` rows cut into pieces that fit."""
        roots = pairwise([*np.flatnonzero(self.kept == 0).tolist(), len(self.kept)])
        cuts: list[int] = []
        for (a, b), rows in zip(roots, self.sizes().tolist(), strict=True):
            inner = cut_tree(self.lengths[a:b], self.kept[a:b], limit) if rows > limit else [0, b - a]
            cuts += [a + cut for cut in inner[:-1]]
        found = []
        for behind, first in zip(self.behind, self.first, strict=True):
            behind = behind.copy()
            behind[cuts] = first[cuts]
            found.append(np.add.reduceat(behind, cuts).tolist())
        return [Piece(*piece) for piece in zip(cuts, [*cuts[1:], len(self.kept)], *found, strict=True)]


def cut_tree(lengths: np.ndarray, kept: np.ndarray, limit: int) -> list[int]:
    """Where to cut the samples of a tree, both ends included: pieces of at most ``limit`` rows, with as few rows computed again as
    possible, and of these the most even. ``kept[0]`` is 0."""
    count = len(lengths)
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


def _assign(pieces: Sequence[Piece], dp_size: int, budget: int) -> list[list[list[Piece]]]:
    """The costliest remaining piece goes to the rank with the least cost so far (longest-processing-time rule)."""
    ranks = [_Bin(0) for _ in range(dp_size)]
    for piece in sorted(pieces, key=lambda piece: -piece.cost):
        min(ranks, key=lambda rank: rank.cost).add(piece)
    plan = [fill_micro_batches(rank.pieces, budget) for rank in ranks]
    for batches in plan:  # ranks wait for each other: equal costs at a time
        batches.sort(key=lambda batch: -sum(piece.cost for piece in batch))
    return plan


def _forest(whole: Sorted, pieces: Sequence[Piece], least: int, budget: int) -> Forest:
    taken = whole.take(np.sort(np.concatenate([np.arange(piece.first, piece.end) for piece in pieces])))
    if not least:
        return Forest.repeated(taken.forest().samples)
    forest = taken.forest(least)
    # With fewer samples other nodes may be too short, and there may be more rows; not if everything is shared.
    return forest if forest.rows <= budget else taken.forest()


def weightless(sample: Sample) -> Sample:
    """The sample with no token in the loss."""
    count = len(sample.token_ids)
    return replace(sample, mask=[False] * count, advantages=[0.0] * count)


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
