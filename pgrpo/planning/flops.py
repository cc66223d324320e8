"""FLOPs of the matrix products of a step, counted exactly.

P prompt tokens, R tokens of one completion, G completions of a prompt. *Grouped* (``shared``) computes the prompt once,
*repeated* once for each completion. Padding and recomputation are not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np

from pgrpo.config import ModelConfig
from pgrpo.packing.forest import Work
from pgrpo.planning.dims import ModelDims

GIB = 2**30
UPDATE_OVER_FORWARD = 3
"""The backward has two products for each product of the forward. This holds for attention too: a flash backward also recomputes the
scores (others count its backward as 2.5 times the forward), and recomputation is not counted."""


PEAK_TFLOPS = {
    "B200": 2250, "GH200 480GB": 989, "H200": 989, "H100 80GB HBM3": 989, "H100 PCIe": 756, "H100 NVL": 835,
    "A100-SXM4-40GB": 312, "A100-SXM4-80GB": 312, "A100-PCIE-40GB": 312, "A100 80GB PCIe": 312,
    "L40S": 362, "L40": 181, "L4": 121, "A10G": 70, "A10": 125, "RTX A6000": 155,
    "GeForce RTX 5090": 210, "GeForce RTX 4090": 165, "GeForce RTX 3090": 71,
}  # fmt: skip
"""Dense bfloat16 rate in TFLOP/s, from data sheets, by the whole name that CUDA gives the device, without "NVIDIA "."""


def adapter_parameters(config: ModelConfig, dims: ModelDims) -> int:
    """Parameters of a run's LoRA adapters; 0 without LoRA."""
    return lora_parameter_count(dims, config.lora_rank, config.lora_targets)


def active_adapters(config: ModelConfig, dims: ModelDims) -> int:
    """Those parameters that one token is multiplied with: of adapters beside experts, those of the active ones."""
    return lora_parameter_count(dims, config.lora_rank, config.lora_targets, experts=dims.active)


def lora_parameter_count(dims: ModelDims, rank: int, targets: Collection[str], experts: int | None = None) -> int:
    """Parameters of LoRA adapters for ``model.lora_targets``: two matrices each, [rank, inputs] and [outputs, rank], beside linear
    layers and beside experts; of every layer's experts ``experts``, by default all."""
    linear, stacked = dims.adapted(targets)
    sizes = sum(sum(shape) for name in linear for shape in dims.linear_layers[name])
    for name in stacked:
        sizes += sum((count if experts is None else experts) * (i + o) for count, i, o in dims.expert_matrices[name])
    return rank * sizes


def flat_work(prompt: int, completions: Sequence[int], *, shared: bool = True) -> Work:
    """The work of one prompt and completions of the given lengths."""
    scored = np.array(completions, dtype=np.int64)
    if not shared:
        return Work(np.zeros_like(scored), prompt + scored, scored)
    starts = np.array([0, *(prompt for _ in completions)])
    return Work(starts, np.array([prompt, *(prompt + scored)]), np.array([0, *scored]))


def forest_forward_flops(dims: ModelDims, work: Work, *, adapters: int = 0) -> np.ndarray:
    """FLOPs of the log-probs of each run of rows; a multiplication and an addition are two FLOPs.

    Counts linear layers (with ``adapters`` parameters of LoRA: ``active_adapters``) and recurrences for each row, attention for
    each pair, and the head for tokens with a log-prob only.
    """
    head = 2 * dims.vocab * dims.hidden * work.scored
    return 2 * (dims.matrices + adapters) * work.rows + _attention_flops(dims, work) + head


def forest_update_flops(dims: ModelDims, work: Work, *, adapters: int = 0) -> np.ndarray:
    """FLOPs of the forward and backward of each run of rows: ``UPDATE_OVER_FORWARD`` times the forward's. With LoRA
    (``adapters`` as above) the frozen weights have no gradient, so that their backward is one product, as large as the
    forward's."""
    forward = forest_forward_flops(dims, work, adapters=adapters)
    if not adapters:
        return UPDATE_OVER_FORWARD * forward
    both_inputs = _attention_flops(dims, work) + 2 * adapters * work.rows
    return UPDATE_OVER_FORWARD * both_inputs + (UPDATE_OVER_FORWARD - 1) * (forward - both_inputs)


def forward_flops(
    dims: ModelDims, prompt: int, completions: Sequence[int], *, shared: bool = True, adapters: int = 0
) -> int:
    """``forest_forward_flops`` of one group."""
    return int(forest_forward_flops(dims, flat_work(prompt, completions, shared=shared), adapters=adapters).sum())


def update_flops(
    dims: ModelDims, prompt: int, completions: Sequence[int], *, shared: bool = True, adapters: int = 0
) -> int:
    """``forest_update_flops`` of one group."""
    return int(forest_update_flops(dims, flat_work(prompt, completions, shared=shared), adapters=adapters).sum())


def pairs(work: Work, window: int | None = None) -> np.ndarray:
    """Pairs of a query and a key that it sees, of each run of rows; with a sliding window only the last ``window`` keys."""

    def before(position: np.ndarray) -> np.ndarray:
        seen = position * (position + 1) // 2
        if window is not None:  # a row at position p sees p + 1 keys, of which p + 1 - window are hidden
            hidden = np.maximum(position - window, 0)
            seen -= hidden * (hidden + 1) // 2
        return seen

    return before(work.ends) - before(work.starts)


def _attention_flops(dims: ModelDims, work: Work) -> np.ndarray:
    seen = sum(count * pairs(work, window or None) for window, count in Counter(dims.windows).items())
    # scores and weighted values; recurrences, which have no weights either
    return 2 * dims.heads * (dims.head_dim + dims.value_dim) * seen + dims.state_flops * work.rows


def rho(prompt: int, completions: Sequence[int]) -> float:
    """Tokens computed with repeated prompts over tokens computed with shared prompts."""
    return flat_work(prompt, completions, shared=False).rows.sum() / flat_work(prompt, completions).rows.sum()


def flop_ratio(dims: ModelDims, prompt: int, completions: Sequence[int]) -> float:
    """FLOPs with repeated prompts over FLOPs with shared prompts: the upper bound of the speed-up."""
    return forward_flops(dims, prompt, completions, shared=False) / forward_flops(dims, prompt, completions)


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a GPU by the name that CUDA gives it; None when ``PEAK_TFLOPS`` has no such name: a similar name
    may be of a GPU of another rate."""
    tera = PEAK_TFLOPS.get(device_name.removeprefix("NVIDIA "))
    return tera * 1e12 if tera else None


def mfu(flops: float, seconds: float, peak: float) -> float:
    """Model FLOPs utilisation: useful FLOP/s of one device over its peak FLOP/s."""
    return flops / seconds / peak
