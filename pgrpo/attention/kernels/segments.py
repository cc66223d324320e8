"""Query and key rows of a variable-length attention call."""

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
