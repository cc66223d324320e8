"""Layers of every kind: which layers of a config differ, by all that its values say of single layers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
PERIODS = ("interval", "pattern", "period", "sparse_step", "layer_freq", "every_n", "_step", "frequency")
"""Parts of names of integers of which each layer's kind depends on its index modulo that integer."""
LEADING = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
"""Integers that say how many of the first layers are dense."""


def keep_every_kind(d: dict[str, Any]) -> None:
    """Keep one layer of every kind, in order, and at least two. A kind is all that per-layer values say of a layer."""
    key = first(d, LAYERS)
    count = d[key] if key else 0
    if count < 2:
        return
    indices = [k for k, v in d.items() if _is_list_of_layers(k, v, count)]
    lists = [k for k, v in d.items() if isinstance(v, list) and len(v) == count and k not in indices]
    mappings = [
        k for k, v in d.items() if isinstance(v, dict) and v and "label" not in k and all(str(x).isdigit() for x in v)
    ]
    periods = [
        k for k, v in d.items() if is_int(v) and 1 < v <= 16 and has(k, PERIODS) and "rope" not in k and not lists
    ]
    leading = [k for k in LEADING if d.get(k)]

    def kind(layer: int) -> str:
        of_mappings = [d[k].get(layer, d[k].get(str(layer))) for k in mappings]
        listed = [d[k][layer] for k in lists], [layer in d[k] for k in indices], [layer % d[k] for k in periods]
        return json.dumps([listed, of_mappings], sort_keys=True, default=str)

    kept = list({kind(layer): layer for layer in reversed(range(count))}.values())[::-1]
    if len(kept) < 2:
        kept = list(range(2))
    if leading and not lists:
        kept = list(range(max(len(kept), 3)))
    kept = [layer for layer in sorted(kept) if layer < count]
    for k in lists:
        d[k] = [d[k][layer] for layer in kept]
    for k in indices:
        d[k] = [i for i, layer in enumerate(kept) if layer in d[k]]
    for k in mappings:
        d[k] = {
            i: d[k].get(layer, d[k].get(str(layer)))
            for i, layer in enumerate(kept)
            if layer in d[k] or str(layer) in d[k]
        }
    for k in leading:
        d[k] = 1
    for k in LAYERS:
        if is_int(d.get(k)):
            d[k] = len(kept)
    if d.get("max_window_layers"):
        d["max_window_layers"] = 1
    if d.get("moe_layer_end_index"):
        d["moe_layer_end_index"] = -1


def _is_list_of_layers(name: str, value: Any, count: int) -> bool:
    """Whether it names layers by their indices, as ``moe_layers: [1, 3, 5]``."""
    if not (has(name, ("layer", "idx", "indices")) and isinstance(value, list) and value and all(map(is_int, value))):
        return False
    return len({*value}) == len(value) and max(value) < count


def first(d: dict[str, Any], names: Iterable[str]) -> str | None:
    return next((name for name in names if is_int(d.get(name))), None)


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def has(name: str, parts: Iterable[str]) -> bool:
    return any(part in name for part in parts)
