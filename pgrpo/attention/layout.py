"""The geometry of a packed batch: the nodes of a forest, who attends to whom, and the kernel calls that compute it."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pgrpo.attention.choose import Ancestry, AttentionChoice
from pgrpo.attention.kernels.segments import Segments


class Node(NamedTuple):
    """A run of rows with one parent.

    Attributes:
        start: its first row in the packed batch.
        length: its rows.
        parent: number of its parent, -1 for a root.
        depth: number of its ancestors.
        offset: position of its first token in every sample through it.
    """

    start: int
    length: int
    parent: int
    depth: int
    offset: int

    @property
    def end(self) -> int:
        return self.start + self.length


class PackedLayout:
    """A row attends to all rows of its node's ancestors and causally to its own node; with a sliding window to the nearest of them.

    Nodes lie in order of depth, children in the order of their parents: then all nodes of a depth are adjacent, and so are all that
    descend from one node. The usual forest is flat: prompts, and behind them the completions of each.

    Attributes:
        nodes: the forest.
        max_sample: the longest sample, in tokens.
        device: of its tensors.
        kernel: name of the flash kernel to use.
        kept: what other layers than attention compute once a batch.
        front: rows of the first node if only its keys and values are there (``model/kept.py``); 0 if it is computed with the rest.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        parents: Sequence[int],
        device: torch.device | str = "cpu",
        choice: AttentionChoice = AttentionChoice(),
        *,
        has_front: bool = False,
    ) -> None:
        self.nodes = nodes_of(lengths, parents)
        self.front = lengths[0] if has_front else 0
        self.max_sample = max((node.offset + node.length for node in self.nodes), default=0)
        self.kernel = choice.kernel
        self.kept: dict[Any, Any] = {}
        self.device = device
        copied = choice.choose(ancestry(self.nodes)).copied
        self._passes: dict[int | None, Passes] = {None: Passes.of(self.nodes, copied, device, self.front)}
        for window in choice.windows:
            self.passes(window)

    def passes(self, window: int | None) -> Passes:
        """The calls of a layer with this sliding window (None: without one).

        Raises:
            RuntimeError: it is not there yet, and this is compiled code, which cannot make it.
        """
        if window not in self._passes:
            if torch.compiler.is_compiling():
                raise RuntimeError("the layout was made without this sliding window: see AttentionChoice.windows")
            if window is None or window >= self.max_sample:
                self._passes[window] = self._passes[None]
            else:
                # Copies of all depths: there are no more depths than nodes.
                self._passes[window] = Passes.of(self.nodes, range(len(self.nodes)), self.device, self.front, window)
        return self._passes[window]


def nodes_of(lengths: Sequence[int], parents: Sequence[int]) -> list[Node]:
    """Nodes with their rows and positions.

    Raises:
        ValueError: they are not in order of depth, or children not in the order of their parents.
    """
    nodes: list[Node] = []
    row = 0
    for length, parent in zip(lengths, parents, strict=True):
        above = nodes[parent] if parent >= 0 else Node(0, 0, -1, -1, 0)
        node = Node(row, length, parent, above.depth + 1, above.offset + above.length)
        if nodes and (node.depth, node.parent) < (nodes[-1].depth, nodes[-1].parent):
            raise ValueError(f"node {len(nodes)} of depth {node.depth} is behind one of depth {nodes[-1].depth}")
        nodes.append(node)
        row += length
    return nodes


class Call(NamedTuple):
    """One call of a flash kernel: queries ``q_start:q_end`` attend to keys ``k_start:k_end`` (or to the copied keys), segment by
    segment. ``cu_q`` and ``cu_k`` are where its segments' starts begin in ``Passes.cu_seqlens``."""

    q_start: int
    q_end: int
    k_start: int
    k_end: int
    segments: int
    cu_q: int
    cu_k: int
    max_q: int
    max_k: int
    causal: int = 0
    window: int = 0
    copied: int = 0

    def on(self, cu_seqlens: Tensor) -> Segments:
        cu_q, cu_k = (cu_seqlens[at : at + self.segments + 1] for at in (self.cu_q, self.cu_k))
        return Segments(cu_q, cu_k, self.max_q, self.max_k)


@dataclass(frozen=True, slots=True)
class Passes:
    """The calls that compute one kind of layer; their results are merged.

    Tensors only, and none of them with a length of 0 or 1: so compiled code does not depend on the forest.

    Attributes:
        table: [calls + 1, fields] int64 on the CPU: a ``Call`` a row, and a last row of zeros.
        cu_seqlens: int32, the starts of all calls' segments.
        copies: the copied keys, or placeholders.
    """

    table: Tensor
    cu_seqlens: Tensor
    copies: Copies

    @staticmethod
    def of(
        nodes: Sequence[Node], copied: Container[int], device: torch.device | str, front: int, window: int | None = None
    ) -> Passes:
        """A causal call of all nodes with themselves behind copies of their ancestors of the depths ``copied``, and a call for each
        pair of depths whose ancestors are not copied. With a window only the last ``window - 1`` rows are copied, all that a node's
        first row sees."""
        depths = [list(group) for _, group in groupby(range(len(nodes)), key=lambda i: nodes[i].depth)]
        ancestors = _ancestors(nodes)
        calls = _Calls(nodes, front)
        calls.within(
            [_last([nodes[i] for i in above if nodes[i].depth in copied], window) for above in ancestors], window
        )
        for d, deeper in enumerate(depths):
            for a in range(d):
                if a not in copied:
                    calls.between(depths[a], deeper, [above[a] for above in ancestors[deeper[0] : deeper[-1] + 1]])
        return calls.passes(device)


def unpack_calls(table: Tensor) -> list[Call]:
    return [Call(*row) for row in table.tolist()[:-1]]


def ancestry(nodes: Sequence[Node]) -> list[Ancestry]:
    """What each depth costs as an ancestor, the roots first."""
    depths = [[0, 0] for _ in range(nodes[-1].depth + 1)] if nodes else []
    below = [0] * len(nodes)  # descendants that have rows
    for i in reversed(range(len(nodes))):
        node = nodes[i]
        if node.parent >= 0:
            below[node.parent] += below[i] + (node.length > 0)
        depths[node.depth][0] += node.length
        depths[node.depth][1] += node.length * below[i]
    return [Ancestry(*sums) for sums in depths]


def _ancestors(nodes: Sequence[Node]) -> list[list[int]]:
    """Numbers of each node's ancestors, its root first."""
    paths: list[list[int]] = []
    for node in nodes:
        paths.append([*paths[node.parent], node.parent] if node.parent >= 0 else [])
    return paths


def _last(nodes: Sequence[Node], window: int | None) -> list[tuple[int, int]]:
    """(first row, rows) of each node; with a window of their last ``window - 1`` rows together."""
    missing = sum(node.length for node in nodes) if window is None else window - 1
    ranges = []
    for node in reversed(nodes):
        taken = min(missing, node.length)
        ranges.append((node.end - taken, taken))
        missing -= taken
    return ranges[::-1]


@dataclass
class _Calls:
    """Collects the calls of a layer. ``copies``: the copied keys' rows, and of how many; placeholders until there are some."""

    nodes: Sequence[Node]
    front: int
    table: list[Call] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    copies: tuple[np.ndarray, int] = (np.zeros(2, dtype=np.int64), 1)

    def within(self, fronts: Sequence[Sequence[tuple[int, int]]], window: int | None) -> None:
        """Every node with itself, causal, behind copies of the given (first row, rows) of its ancestors."""
        nodes = self.nodes[self.front > 0 :]  # a kept first node has no rows here
        fronts = fronts[self.front > 0 :]
        own = [node.length for node in nodes]
        front = [sum(n for _, n in ranges) if length else 0 for ranges, length in zip(fronts, own, strict=True)]
        if copied := any(front):
            ranges = [r for node, f in zip(nodes, fronts, strict=True) if node.length for r in (*f, node[:2])]
            self.copies = rows_of(ranges), self.front + sum(own)
        keys = [a + b for a, b in zip(front, own, strict=True)]
        every = self.front, self.front + sum(own)
        self._add(every, every, own, keys, causal=1, window=window or 0, copied=int(copied))

    def between(self, shallow: Sequence[int], deep: Sequence[int], ancestor: Sequence[int]) -> None:
        """The nodes ``deep`` of one depth with their ancestors among the nodes ``shallow`` of another."""
        rows = dict.fromkeys(shallow, 0)
        for i, above in zip(deep, ancestor, strict=True):
            rows[above] += self.nodes[i].length
        q, k = ((self.nodes[depth[0]].start, self.nodes[depth[-1]].end) for depth in (deep, shallow))
        self._add(q, k, list(rows.values()), [self.nodes[i].length for i in shallow])

    def _add(self, q: tuple[int, int], k: tuple[int, int], queries: list[int], keys: list[int], **flags: int) -> None:
        """Rows ``q`` (first, end) attend to rows ``k``, in segments of so many queries and keys."""
        if q[0] == q[1] or k[0] == k[1]:
            return
        cu_q = self._cumulative(queries)
        cu_k = cu_q if queries == keys else self._cumulative(keys)
        rows = q[0] - self.front, q[1] - self.front, *k
        self.table.append(Call(*rows, len(queries), cu_q, cu_k, max(queries), max(keys), **flags))

    def _cumulative(self, lengths: Sequence[int]) -> int:
        """Where the starts of segments of these lengths begin; at a multiple of 16 bytes, as kernels want."""
        self.starts += [0] * (-len(self.starts) % 4)
        at = len(self.starts)
        self.starts += accumulate(lengths, initial=0)
        return at

    def passes(self, device: torch.device | str) -> Passes:
        table = torch.tensor([*self.table, [0] * len(Call._fields)], dtype=torch.int64).reshape(-1, len(Call._fields))
        if len(table) == 1:
            table = table.repeat(2, 1)  # no rows at all: one call that does nothing
        starts = torch.tensor(self.starts or [0, 0], dtype=torch.int32).to(device)
        return Passes(table, starts, Copies.of(*self.copies, device))


def rows_of(ranges: Sequence[tuple[int, int]]) -> np.ndarray:
    """[C] int64: the rows of all (first row, rows), one range after another."""
    starts, lengths = np.array(ranges, dtype=np.int64).reshape(-1, 2).T
    before = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(starts - before, lengths)


@dataclass(frozen=True, slots=True)
class Copies:
    """The copied keys: every node's own rows behind copies of its ancestors'. C copied rows.

    Attributes:
        source: [C] int64, the packed row of which each copied row is a copy.
        order: [C] int32, the copies sorted by their source.
        offsets: [T + 1] int32, where each packed row's copies begin in ``order``.
    """

    source: Tensor
    order: Tensor
    offsets: Tensor

    @staticmethod
    def of(source: np.ndarray, rows: int, device: torch.device | str) -> Copies:
        offsets = np.concatenate([[0], np.bincount(source, minlength=rows).cumsum()])
        order = source.argsort(kind="stable")
        made = (torch.from_numpy(source), torch.from_numpy(order).int(), torch.from_numpy(offsets).int())
        return Copies(*(x.to(device) for x in made))


def cumulative(lengths: Sequence[int], device: torch.device | str) -> Tensor:
    """[0, a, a + b, ...] as int32."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
