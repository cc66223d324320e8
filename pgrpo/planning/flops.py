"""FLOPs of the matrix products of a step, counted exactly. Integers only, no tensors.

P prompt tokens, R tokens of one completion, G completions of a prompt. *Grouped* (``shared``) computes the prompt once,
*repeated* once for each completion. Padding and recomputation are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True, slots=True)
class ModelDims:
    """Sizes of a decoder with gated MLPs. ``biases``: bias elements in one layer; ``head_norms``: q and k are normalised by head
    (Qwen3); ``fused``: q, k and v are one matrix, and so are gate and up (Phi-3)."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    biases: int = 0
    head_norms: bool = False
    fused: bool = False

    @classmethod
    def from_config(cls, config: Any) -> ModelDims:
        """From a Hugging Face config, as an object or as the mapping in config.json.

        Raises:
            ValueError: the config lacks a size.
        """
        values = config if isinstance(config, Mapping) else config.to_dict()

        def size(name: str) -> int:
            if not isinstance(values.get(name), int):
                raise ValueError(f"the model's config has no {name}: pgrpo does not support this kind of model")
            return values[name]

        hidden, heads, intermediate = size("hidden_size"), size("num_attention_heads"), size("intermediate_size")
        kv_heads = values.get("num_key_value_heads") or heads
        head_dim = values.get("head_dim") or hidden // heads
        qkv_rows = (heads + 2 * kv_heads) * head_dim
        biases = 0
        if values.get("model_type") == "qwen2":  # q, k and v always have biases; no key says so
            biases += qkv_rows
        if values.get("attention_bias"):
            biases += qkv_rows + hidden
        if values.get("mlp_bias"):
            biases += 2 * intermediate + hidden
        layers, vocab, tied = size("num_hidden_layers"), size("vocab_size"), bool(values.get("tie_word_embeddings"))
        head_norms, fused = values.get("model_type") == "qwen3", values.get("model_type") == "phi3"
        return cls(layers, hidden, heads, kv_heads, head_dim, intermediate, vocab, tied, biases, head_norms, fused)

    @property
    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each matrix of one layer, by transformers' names."""
        hidden, q, kv = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        if self.fused:
            return {
                "qkv_proj": (hidden, q + 2 * kv),
                "o_proj": (q, hidden),
                "gate_up_proj": (hidden, 2 * self.intermediate),
                "down_proj": (self.intermediate, hidden),
            }
        return {
            "q_proj": (hidden, q),
            "k_proj": (hidden, kv),
            "v_proj": (hidden, kv),
            "o_proj": (q, hidden),
            "gate_proj": (hidden, self.intermediate),
            "up_proj": (hidden, self.intermediate),
            "down_proj": (self.intermediate, hidden),
        }

    @property
    def layer_matrix(self) -> int:
        """Elements of one layer's matrices."""
        return sum(inputs * outputs for inputs, outputs in self.linear_layers.values())


def parameter_count(dims: ModelDims) -> int:
    """Number of parameters; a head tied to the embedding is counted once."""
    layer = dims.layer_matrix + 2 * dims.hidden + dims.biases + (2 * dims.head_dim if dims.head_norms else 0)
    return dims.layers * layer + dims.hidden + dims.vocab * dims.hidden * (1 if dims.tied else 2)


def lora_parameter_count(dims: ModelDims, rank: int, targets: Iterable[str]) -> int:
    """Parameters of LoRA adapters beside the named linear layers: two matrices each, [rank, inputs] and [outputs, rank]."""
    return dims.layers * sum(rank * sum(dims.linear_layers[name]) for name in set(targets))


def computed_tokens(prompt: int, completions: Sequence[int], *, shared: bool = True) -> int:
    """Tokens that the layers compute for one prompt and completions of the given lengths."""
    return prompt * (1 if shared else len(completions)) + sum(completions)


def attention_pairs(prompt: int, completions: Sequence[int], *, shared: bool = True) -> int:
    """Pairs (query, key): causal in the prompt and in each completion; a completion also attends to the whole prompt."""
    causal = prompt * (prompt + 1) // 2
    suffixes = sum(n * prompt + n * (n + 1) // 2 for n in completions)
    return causal * (1 if shared else len(completions)) + suffixes


def forward_flops(
    dims: ModelDims, prompt: int, completions: Sequence[int], *, shared: bool = True, adapters: int = 0
) -> int:
    """FLOPs of one group's log-probs; a multiplication and an addition are two FLOPs.

    Counts linear layers (and ``adapters`` parameters of LoRA) for each computed token, attention for each pair, and the head for
    completion tokens only.
    """
    matrices = dims.layers * dims.layer_matrix + adapters
    linear = 2 * matrices * computed_tokens(prompt, completions, shared=shared)
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
    pair = 4 * dims.layers * dims.heads * dims.head_dim  # scores and weighted values
    return pair * attention_pairs(prompt, completions, shared=shared)


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
