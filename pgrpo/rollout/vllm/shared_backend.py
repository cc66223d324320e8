"""vLLM's FlashAttention backend with a decode that reads shared keys once. vLLM loads it by the path that ``registered`` gives.

What it touches of vLLM: ``shared_decode.TOUCHED``.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import _cached_get_attn_backend

from pgrpo.rollout.vllm.shared_decode import why_not_layer
from pgrpo.rollout.vllm.shared_layout import DecodeLayout


@contextmanager
def registered(group_size: int) -> Iterator[None]:
    """An engine that starts inside this block takes this backend where it would take FLASH_ATTN. Those that this process started
    before and will start after it do not: vLLM keeps what it chose for layers of a kind, which is forgotten here.

    Args:
        group_size: usual members of a group; others are decoded as well.
    """
    SharedBuilder.group_size = group_size
    register_backend(AttentionBackendEnum.FLASH_ATTN, f"{__name__}.{SharedBackend.__name__}")
    _cached_get_attn_backend.cache_clear()
    try:
        yield
    finally:
        AttentionBackendEnum.FLASH_ATTN.clear_override()
        _cached_get_attn_backend.cache_clear()


def why_not(vllm_config: Any) -> str | None:
    """Why a model cannot share; None if it can. One layer that cannot is enough: such models were not tried. Layers are those that
    keep something of a sequence, keys and values or a state; vLLM lists others beside them (experts), which play no part."""
    # Of the batch, not of a layer: FlashAttention finds it in the metadata.
    if vllm_config.model_config.rswa_window is not None:
        return "completions attend to a window and the whole prompt"
    shapes = set[tuple[int, int, int]]()
    for name, layer in _layers(vllm_config).items():
        if not isinstance(impl := getattr(layer, "impl", None), SharedImpl):
            return f"{name} is computed by {type(impl or layer).__name__}, not by FlashAttention"
        if reason := why_not_layer(impl):
            return reason
        shapes.add((impl.num_heads, impl.num_kv_heads, impl.head_size))
    return None if len(shapes) <= 1 else "layers have unlike heads"


def _layers(vllm_config: Any) -> dict[str, Any]:
    listed = vllm_config.compilation_config.static_forward_context
    return {name: layer for name, layer in listed.items() if isinstance(layer, AttentionLayerBase)}


class SharedImpl(FlashAttentionImpl):
    """Attention of one layer."""

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: FlashAttentionMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        # None: prefill, or a run without metadata that measures memory.
        layout = getattr(attn_metadata, "shared_layout", None)
        if layout is None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        n = attn_metadata.num_actual_tokens
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        out = output.view(-1, self.num_heads, self.head_size)[:n]
        layout.attend(query[:n], keys, values, out, self.scale)
        return output


class SharedBuilder(FlashAttentionMetadataBuilder):
    """What the layers of a step need. vLLM makes it inside the pool of memory that sleep gives up and wipes."""

    # The kernels of a captured graph cannot do a prefill.
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    supports_update_block_table = False  # another table, another layout
    group_size = 1

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.layout, self.sequences = None, vllm_config.scheduler_config.max_num_seqs
        if why_not(vllm_config) is None:
            # Heads as the layers have them: of models that list them by layer, 0.26 tells here another number.
            impl = next(iter(_layers(vllm_config).values())).impl
            self.layout = DecodeLayout(
                self.sequences, impl.num_heads, impl.num_kv_heads, impl.head_size, self.block_size, device,
                vllm_config.model_config.max_model_len, group_size=self.group_size,
            )  # fmt: skip

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> FlashAttentionMetadata:
        given = common_attn_metadata
        decodes = given.max_query_len == 1 and given.num_reqs == given.num_actual_tokens <= self.sequences
        layout = self.layout if decodes and given.causal is True and common_prefix_len == 0 else None
        # fast_build leaves FlashAttention's own schedule out, which only a plain decode needs.
        metadata = super().build(common_prefix_len, given, fast_build or layout is not None)
        metadata.shared_layout = layout
        if layout is not None:
            layout.update(given.block_table_tensor, given.seq_lens[: given.num_reqs])
        return metadata


class SharedBackend(FlashAttentionBackend):
    """What vLLM asks for the classes above."""

    @staticmethod
    def get_impl_cls() -> type[SharedImpl]:
        return SharedImpl

    @staticmethod
    def get_builder_cls() -> type[SharedBuilder]:
        return SharedBuilder
