"""The attention function that transformers models call. It requires a layout, and refuses everything that it would not compute
exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pgrpo.attention.grouped import grouped_attention
from pgrpo.attention.layout import PackedLayout

ATTENTION_NAME = "pgrpo"
Front = Sequence[Tensor]
"""What a layer's rows read of a kept first node: its keys and values, or where a layer has a state instead, the inputs that a short
convolution reaches back to, and the state behind the node's last row."""


class AttendingLayout(Protocol):
    """A layout with an attention of its own: a packed batch of which this process has some rows
    (``distributed.sequence.SplitLayout``), or a rollout, which keeps keys, values and states between calls
    (``rollout.embedded.cache.DecodeCache``)."""

    def attend(self, *args: Any, **kwargs: Any) -> Tensor:
        """As ``grouped_attention``, with the calling module instead of a layout: ``attend(q, k, v, scale, module=attention,
        window=None, softcap=None, sinks_H=None)``."""
        ...


AttentionLayout = PackedLayout | AttendingLayout
"""Who attends to whom."""


class Current:
    """The layout of the forward that runs now. Models need not hand it down: some decoders drop keywords that they do not know."""

    layout: AttentionLayout | None = None
    front: Front | None = None
    """Of the layer that runs now, if its layout has a kept first node."""
    fronts: Sequence[Front] | None = None
    """The same of all layers (``model/recompute.py`` picks from it)."""
    keep: list[list[Tensor]] | None = None
    """The layer that runs now appends to the last one what it would read of such a node."""
    is_eager = False
    """Whether layers run as they are, not compiled (``model/recompute.py``)."""


current = Current()


@contextmanager
def attending(
    layout: AttentionLayout,
    fronts: Sequence[Front] | None = None,
    keep: list[list[Tensor]] | None = None,
) -> Iterator[None]:
    """Attention of forwards inside this block is that of ``layout``."""
    current.layout, current.fronts, current.keep = layout, fronts, keep
    try:
        yield
    finally:
        current.layout = current.fronts = current.keep = None


class UnsupportedAttentionError(RuntimeError):
    """The model asks for something that grouped attention would get wrong."""


WITHOUT_EFFECT = {
    "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "cu_seq_lens_q",
}  # fmt: skip
"""Arguments that models hand down to attention and that change nothing in a packed batch."""


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, H, T, D], key [1, K, T, D], value [1, K, T, Dv] -> ([1, T, H, Dv], None).

    Raises:
        UnsupportedAttentionError: no layout was passed, the batch is padded or not packed, or the layer wants dropout or something
            that grouped attention does not know.
    """
    attention_layout = current.layout
    if attention_layout is None:
        raise UnsupportedAttentionError(
            "grouped attention was called without its layout: call the policy, not the bare model "
            "(for ordinary generation load the model with attn_implementation='sdpa')"
        )
    if attention_mask is not None:
        raise UnsupportedAttentionError("grouped attention got a padding mask: packed batches have no padding")
    if query.shape[0] != 1:
        raise UnsupportedAttentionError(f"grouped attention wants one packed row, got a batch of {query.shape[0]}")
    if dropout:
        raise UnsupportedAttentionError(
            f"attention dropout {dropout} is not supported: set it to 0 in the model's config"
        )
    if is_causal is False:
        raise UnsupportedAttentionError("attention that is not causal is not supported")
    for name, argument in other.items():
        if argument is not None and name not in WITHOUT_EFFECT:
            raise UnsupportedAttentionError(f"attention with {name!r} is not supported")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q_THD, k_TKD, v_TKD = (x_1HTD.squeeze(0).transpose(0, 1) for x_1HTD in (query, key, value))
    options: dict[str, Any] = {"window": sliding_window, "softcap": softcap, "sinks_H": s_aux}
    if isinstance(attention_layout, PackedLayout):
        out_THD = grouped_attention(q_THD, *behind_front(k_TKD, v_TKD), attention_layout, scale, **options)
    else:
        out_THD = attention_layout.attend(q_THD, k_TKD, v_TKD, scale, module=module, **options)
    return out_THD.unsqueeze(0), None


def behind_front(k_TKD: Tensor, v_TKD: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's keys and values of a whole layout, behind those of the layout's kept first node, if it has one. ``current.keep``
    gets them where they are to be kept themselves."""
    if current.keep is not None:
        current.keep[-1] += [k_TKD, v_TKD]
    if current.front is None:
        return k_TKD, v_TKD
    return torch.cat([current.front[0], k_TKD]), torch.cat([current.front[1], v_TKD])
