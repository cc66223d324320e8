"""FLOPs of the matrix products of a step, counted exactly.

P prompt tokens, R tokens of one completion, G completions of a prompt. *Grouped* (``shared``) computes the prompt once,
*repeated* once for each completion. Padding and recomputation are not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

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


def lora_parameter_count(dims: ModelDims, rank: int, targets: Iterable[str]) -> int:
    """Parameters of LoRA adapters beside the named linear layers: two matrices each, [rank, inputs] and [outputs, rank]."""
    return sum(rank * sum(shape) for name in set(targets) for shape in dims.linear_layers[name])


def computed_tokens(prompt: int, completions: Sequence[int], *, shared: bool = True) -> int:
    """Tokens that the layers compute for one prompt and completions of the given lengths."""
    return prompt * (1 if shared else len(completions)) + sum(completions)


def attention_pairs(prompt: int, completions: Sequence[int], *, shared: bool = True, window: int = 0) -> int:
    """Pairs (query, key): causal in the prompt and in each completion; a completion also attends to the whole prompt, or with a
    window to what is less than ``window`` tokens away (0: no window)."""
    causal = _causal_pairs(prompt, window)
    suffixes = sum(_causal_pairs(prompt + n, window) - causal for n in completions)
    return causal * (1 if shared else len(completions)) + suffixes


def _causal_pairs(length: int, window: int) -> int:
    """Of one sequence."""
    inside = min(length, window or length)
    return inside * (inside + 1) // 2 + (length - inside) * window


def forward_flops(
    dims: ModelDims, prompt: int, completions: Sequence[int], *, shared: bool = True, adapters: int = 0
) -> int:
    """FLOPs of one group's log-probs; a multiplication and an addition are two FLOPs.

    Counts linear layers (and ``adapters`` parameters of LoRA) for each computed token, attention for each pair, and the head for
    completion tokens only.
    """
    linear = 2 * (dims.matrices + adapters) * computed_tokens(prompt, completions, shared=shared)
    head = 2 * dims.vocab * dims.hidden * sum(completions)
    return linear + _attention_flops(dims, prompt, completions, shared) + head


def update_flops(
    dims: ModelDims, prompt: int, completions: Sequence[int], *, shared: bool = True, adapters: int = 0
) -> int:
    """FLOPs of one group's forward and backward: ``UPDATE_OVER_FORWARD`` times the forward's. With LoRA (``adapters``: number
    of trained parameters) the frozen weights have no gradient, so that their backward is one product, as large as the forward's."""
    forward = forward_flops(dims, prompt, completions, shared=shared, adapters=adapters)
    if not adapters:
        return UPDATE_OVER_FORWARD * forward
    trained = 2 * adapters * computed_tokens(prompt, completions, shared=shared)
    both_inputs = _attention_flops(dims, prompt, completions, shared) + trained
    return UPDATE_OVER_FORWARD * both_inputs + (UPDATE_OVER_FORWARD - 1) * (forward - both_inputs)


def _attention_flops(dims: ModelDims, prompt: int, completions: Sequence[int], shared: bool) -> int:
    pairs = sum(
        count * attention_pairs(prompt, completions, shared=shared, window=window)
        for window, count in Counter(dims.windows).items()
    )
    return 2 * dims.heads * (dims.head_dim + dims.value_dim) * pairs  # scores and weighted values


def rho(prompt: int, completions: Sequence[int]) -> float:
    """Tokens computed with repeated prompts over tokens computed with shared prompts."""
    return computed_tokens(prompt, completions, shared=False) / computed_tokens(prompt, completions)


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
