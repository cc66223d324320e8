"""Decoding that reads a group's prompt once a step, not once a completion: when it is used, and what it needs of vLLM.

``shared_backend.py`` is vLLM's FlashAttention backend with another decode, ``shared_layout.py`` says who reads what together, and
``shared_kernels.py`` computes it. Prefill, and what the kernels cannot do, stay vLLM's own.

Measured on one H100 (32 query heads, 8 key heads, head dim 128, bfloat16, inside CUDA graphs; prompts of 512 to 16,384 tokens in
groups of 4 to 16): attention is 0.54 (where it reads 2.4 times fewer tokens) to 0.42 times (6) as much faster as it reads less,
since a GPU's L2 cache already spares plain decoding some of the repeated reads. So it pays from about 2.2 times on.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from pgrpo.config import Config, ConfigError

log = logging.getLogger(__name__)
PLAIN = "each completion reads its prompt for itself: {}"
KNOWN, RAN = ("0.26", "0.28", "0.29", "0.30", "0.31", "0.32"), ("0.26",)
"""Releases of vLLM whose parts below were read, which ``always`` needs; those with which this code ran on a GPU, which ``auto``
needs."""
FLASH_ATTN, BACKEND = "v1/attention/backends/flash_attn.py", "v1/attention/backend.py"
TOUCHED = {
    "config/model.py": {"ModelConfig.rswa_window": ["self"]},
    "model_executor/layers/attention_layer_base.py": {"AttentionLayerBase": ["impl"]},
    "v1/attention/backends/registry.py": {
        "register_backend": ["backend", "class_path", "is_mamba"],
        "AttentionBackendEnum": ["FLASH_ATTN"],
        "AttentionBackendEnum.clear_override": ["self"],
    },
    "v1/attention/selector.py": {"_cached_get_attn_backend": None},
    BACKEND: {
        "AttentionCGSupport": ["UNIFORM_SINGLE_TOKEN_DECODE"],
        "CommonAttentionMetadata": [
            "seq_lens", "num_reqs", "num_actual_tokens", "max_query_len", "block_table_tensor", "causal",
        ],
    },
    FLASH_ATTN: {
        "FlashAttentionBackend.get_impl_cls": [],
        "FlashAttentionBackend.get_builder_cls": [],
        "FlashAttentionMetadata": ["num_actual_tokens", "block_table"],
        "FlashAttentionMetadataBuilder": ["_cudagraph_support", "supports_update_block_table"],
        "FlashAttentionMetadataBuilder.__init__": ["self", "kv_cache_spec", "layer_names", "vllm_config", "device"],
        "FlashAttentionMetadataBuilder.build": ["self", "common_prefix_len", "common_attn_metadata", "fast_build"],
        "FlashAttentionImpl.__init__": [
            "self", "num_heads", "head_size", "scale", "num_kv_heads", "alibi_slopes", "sliding_window", "kv_cache_dtype",
            "logits_soft_cap", "attn_type", "kv_sharing_target_layer_name", "sinks",
        ],
        "FlashAttentionImpl.forward": [
            "self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output", "output_scale",
            "output_block_scale",
        ],
    },
}  # fmt: skip
"""What is subclassed, called or read, by file: parameters of functions, in order (None: any), and members of classes. Beyond
names: the cache is [blocks, key heads, page, 2 head dim], keys before values; keys and values of a step are written before its
attention; padded sequences have length 0; a decode step has one token a sequence; layers with a cache or a state are
``AttentionLayerBase``."""
HELPS_FROM, LEAST_PROMPT = 2.2, 512
"""Times fewer tokens, and the longest prompt, from which ``auto`` takes it."""


def read_less(group_size: int, prompt_tokens: int, completion_tokens: int) -> float:
    """How many times fewer tokens' keys a decode step reads, halfway through the completions."""
    own = completion_tokens / 2
    return (prompt_tokens + own) / (prompt_tokens / group_size + own)


def not_wanted(config: Config, device_type: str) -> str | None:
    """Why a run that could share decodes plainly; None if it wants to share."""
    mode, group_size = config.rollout.shared_decode, config.rollout.group_size
    prompt, completion = config.data.max_prompt_tokens, config.max_sampled_tokens
    less = read_less(group_size, prompt, completion)
    if mode == "never":
        return "rollout.shared_decode=never"
    if mode == "auto" and device_type != "cuda":
        return "it needs a GPU"
    if mode == "auto" and (less < HELPS_FROM or prompt < LEAST_PROMPT):
        return (
            f"a step would read {less:.1f} times fewer keys (rollout.group_size {group_size}, data.max_prompt_tokens {prompt}, "
            f"rollout.max_completion_tokens {completion}); it pays from {HELPS_FROM:.1f} times and {LEAST_PROMPT} tokens on"
        )
    return None


def cannot(config: Config, device_type: str, version: str) -> str | None:
    """Why this vLLM on such a device cannot share; None if nothing is against it before the model is known."""
    is_known, has_run = (version.startswith(tuple(f"{one}." for one in versions)) for versions in (KNOWN, RAN))
    if device_type != "cuda":
        return "it needs a GPU"
    if not is_known:
        return f"it knows vLLM {', '.join(KNOWN)}, and this is {version}"
    if config.rollout.shared_decode == "auto" and not has_run:
        return f"it has not run on a GPU with vLLM {version} yet; rollout.shared_decode=always tries it"
    return None


def plainly(config: Config, reason: str) -> None:
    """Tell why a run that wants to share decodes plainly.

    Raises:
        ConfigError: it was told to share ``always``.
    """
    if config.rollout.shared_decode == "always":
        raise ConfigError(f"rollout.shared_decode: always, but {reason}; set it to auto, which decodes plainly then")
    if os.environ.get("RANK", "0") == "0":
        log.warning("rollout.shared_decode=auto: " + PLAIN.format(reason))


def why_not_layer(layer: Any) -> str | None:
    """Why the kernels cannot do what an attention layer does; it has the attributes of vLLM's ``FlashAttentionImpl``."""
    ratio = layer.num_heads // layer.num_kv_heads
    for cannot, reason in (
        (layer.attn_type != "decoder", f"attention is of the type {layer.attn_type}"),
        (layer.head_size not in (64, 128), f"head dim {layer.head_size} is not 64 or 128"),
        (ratio > 32, f"{ratio} query heads share a key head, more than 32"),
        (layer.kv_cache_dtype not in ("auto", "bfloat16", "float16"), f"the cache is {layer.kv_cache_dtype}"),
        (tuple(layer.sliding_window) != (-1, -1), "a layer has a sliding window"),
        (layer.sinks is not None, "a layer has attention sinks"),
        (bool(layer.logits_soft_cap), "a layer caps its logits"),
        (layer.alibi_slopes is not None, "a layer has ALiBi slopes"),
        (layer.kv_sharing_target_layer_name is not None, "a layer uses the cache of another"),
    ):
        if cannot:
            return reason
    return None
