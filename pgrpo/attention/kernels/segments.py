"""What a variable-length attention call is about: rows, and how scores are made."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Segments(NamedTuple):
    """Query and key rows of a variable-length call. ``cu_q`` and ``cu_k`` are [segments + 1] int32 on the tensors' device;
    ``max_q`` and ``max_k`` are at least the longest segment."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int


class Scores(NamedTuple):
    """How the scores of a call are made and masked.

    Attributes:
        scale: factor of the products of queries and keys.
        causal: a query sees no key behind it. Queries are aligned with the last keys (bottom-right).
        window: keys that a query sees, its own included (causal calls only); 0 is all of them.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 leaves them alone.
    """

    scale: float
    causal: bool = False
    window: int = 0
    softcap: float = 0.0
