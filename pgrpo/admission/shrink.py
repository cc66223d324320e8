"""A config -> a small config of the same mechanisms: a layer of every kind, few heads, small widths, every flag as it is.

A proof on the small model speaks for the large one if nothing that changes how tokens see each other was lost. So a layer of every
kind stays, heads share keys in the same way, and every length at which the model changes its behaviour (a window, a chunk, a RoPE
that depends on lengths) lies inside the proof's samples, unless no sample of the run can reach it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from pgrpo.admission.kinds import LAYERS, first, has, is_int, keep_every_kind
from pgrpo.admission.vision import shrink_tower
from pgrpo.vision.families import family_of

HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
KV_HEADS = ("num_key_value_heads", "multi_query_group_num", "num_kv_heads", "n_head_kv")
HIDDEN = ("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim")
HEAD_DIMS = ("head_dim", "kv_channels", "attention_head_dim", "d_kv", "global_head_dim", "swa_head_dim")
DROPOUT = ("dropout", "pdrop")
UNKNOWN = 256
"""An integer above it that no rule knows is taken for a length at which the model changes: code of its own may have a window or a
chunk of any name."""


class Small(NamedTuple):
    """Sizes of the small model. A second judge takes others.

    Attributes:
        heads, head_dim: query heads, and their size; MLA has half of it with RoPE and half without.
        value_dim: of MLA's values, unlike that of its keys.
        experts: of a mixture, of which at most two are active.
        reached: a window or chunk that the samples are longer than.
        positions: RoPE's original length, which the longer samples exceed and the shorter ones do not.
        unreached: a length beyond all samples.
        guesses: whether integers that no rule knows are taken for lengths.
    """

    heads: int = 4
    head_dim: int = 16
    value_dim: int = 12
    width: int = 64
    expert_width: int = 16
    experts: int = 4
    rank: int = 16
    vocab: int = 64
    reached: int = 5
    positions: int = 12
    unreached: int = 512
    guesses: bool = True


def shrink(
    config: PretrainedConfig, max_sample: int | None = None, small: Small | None = None, *, all_layers: bool = False
) -> PretrainedConfig:
    """The small config.

    Args:
        config: of the model; not changed.
        max_sample: the longest sample of the run; a window of at least that length does nothing. None: all lengths are reached.
        small: its sizes.
        all_layers: keep them all, not one of every kind.

    Raises:
        Exception: the class of the config refuses the small values.
    """
    small = small or Small()
    values = _shrunken(config.to_dict(), max_sample, small, all_layers)
    if family_of(config):
        shrink_tower(values, small.heads * small.head_dim, small.vocab)
    result = _rebuilt(config, values)
    result._experts_implementation = "eager"  # the others compute in half precision only
    return result


def few_layers(config: PretrainedConfig) -> PretrainedConfig:
    """The config with a layer of every kind, and otherwise as it is."""
    values = config.to_dict()
    for one in (values, values.get("text_config")):  # of a model with images the language model
        if isinstance(one, dict):
            keep_every_kind(one)
    return _rebuilt(config, values)


def _rebuilt(config: PretrainedConfig, values: dict[str, Any]) -> PretrainedConfig:
    for name in (
        "transformers_version",
        "architectures",
        "dtype",
        "torch_dtype",
        "_name_or_path",
        "quantization_config",
    ):
        values.pop(name, None)
    result = type(config).from_dict(values)
    result._name_or_path = config._name_or_path  # where the code of a remote model is, and of which revision
    result._commit_hash = getattr(config, "_commit_hash", None)
    return result


def _shrunken(values: dict[str, Any], max_sample: int | None, small: Small, all_layers: bool) -> dict[str, Any]:
    d = copy.deepcopy(values)
    if not all_layers:
        keep_every_kind(d)
    _few_heads(d, small)
    _state_spaces(d, small)
    _widths(d, small)
    _lengths(d, max_sample, small)
    for name, value in d.items():
        if any(part in name for part in DROPOUT) and isinstance(value, float):
            d[name] = 0.0
        if name.endswith("_config") and isinstance(value, dict) and first(value, LAYERS):
            d[name] = _shrunken(value, max_sample, small, all_layers)
    return d


def _few_heads(d: dict[str, Any], small: Small) -> None:
    """Keep the way in which heads share keys: all their own, groups of them, or one for all."""
    key = first(d, HEADS)
    if key is None:
        return
    shared = first(d, KV_HEADS)
    before, kv_before = d[key], d[shared] if shared else d[key]
    kv_heads = small.heads if kv_before == before else 1 if kv_before == 1 else small.heads // 2
    has_mla = d.get("qk_rope_head_dim") is not None
    half = small.head_dim // 2
    _replace(d, HEADS, small.heads)
    _replace(d, KV_HEADS, kv_heads)
    _replace(d, HEAD_DIMS, small.head_dim)
    if has_mla and d.get("head_dim"):
        d["head_dim"] = half  # in these configs it is the part with RoPE
    _replace(d, ("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), half)
    _replace(d, ("qk_head_dim",), small.head_dim)
    _replace(d, ("v_head_dim",), small.value_dim if has_mla else small.head_dim)
    _replace(d, HIDDEN, small.heads * small.head_dim)
    if "head_dim" in d and d["head_dim"] is None:
        d["head_dim"] = half if has_mla else small.head_dim
    if "num_key_value_heads" in d and d["num_key_value_heads"] is None:
        d["num_key_value_heads"] = small.heads


def _state_spaces(d: dict[str, Any], small: Small) -> None:
    """Sizes of linear layers, of which validators want that heads times their size are the inner width."""
    hidden = d.get(first(d, HIDDEN) or "", small.width)
    inner = int((d.get("mamba_expand", d.get("expand", 2)) or 2) * hidden)
    names = ("mamba_n_heads", "mamba_d_head"), ("n_mamba_heads", "mamba_headdim"), ("mamba_num_heads", "mamba_head_dim")
    for heads, head_dim in names:
        if d.get(heads):
            d[heads], d[head_dim] = small.heads, inner // small.heads
    if d.get("model_type") == "mamba2":
        d["num_heads"], d["head_dim"] = small.heads, inner // small.heads
    _replace(d, ("mamba_d_ssm",), inner)
    _replace(d, ("mamba_d_state", "state_size", "ssm_state_size", "mamba_chunk_size", "chunk_size"), 8)
    _replace(d, ("mamba_n_groups", "n_groups", "mamba_ngroups"), 1)
    _replace(d, ("linear_num_heads",), small.heads)
    _replace(d, ("linear_head_dim",), 8)
    if d.get("linear_num_value_heads"):
        own = d["linear_num_key_heads"] == d["linear_num_value_heads"]
        d["linear_num_value_heads"], d["linear_num_key_heads"] = small.heads, small.heads if own else small.heads // 2
        _replace(d, ("linear_key_head_dim",), 8)
        _replace(d, ("linear_value_head_dim",), small.value_dim)


WIDTHS: list[tuple[Callable[[str], bool], Callable[[int, Small], int]]] = [
    (lambda k: k in ("vocab_size", "vocab_size_per_layer_input"), lambda v, s: s.vocab),
    (lambda k: "expert" in k and has(k, ("intermediate", "size", "dim")), lambda v, s: s.expert_width if v else v),
    (
        lambda k: k in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_total_experts"),
        lambda v, s: min(v, s.experts),
    ),
    (
        lambda k: (
            k in ("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token", "top_k_experts", "n_group")
        ),
        lambda v, s: min(v, 2),
    ),
    (lambda k: k in ("topk_group", "n_shared_experts", "num_shared_experts"), lambda v, s: min(v, 1)),
    (
        lambda k: has(k, ("intermediate", "ffn", "inner", "d_ff", "mlp_dim", "lru_width")),
        lambda v, s: s.width if v else v,
    ),
    (lambda k: k.endswith("_rank"), lambda v, s: s.rank if v else v),
    (lambda k: k == "hidden_size_per_layer_input", lambda v, s: 8 if v else v),
    (lambda k: k.endswith(("token_id", "token_index")), lambda v, s: min(v, s.vocab - 1)),
    (lambda k: k == "query_pre_attn_scalar", lambda v, s: s.head_dim),
    (lambda k: k == "padding_idx", lambda v, s: 0),
    (lambda k: has(k, ("size", "dim", "hidden", "width")), lambda v, s: s.width if v > 256 else v),
]
"""(whether an integer of that name is meant, its small value): the first that fits counts."""


def _widths(d: dict[str, Any], small: Small) -> None:
    fixed = {*HIDDEN, *HEADS, *KV_HEADS, *HEAD_DIMS, *LAYERS}
    for name, value in d.items():
        if is_int(value) and name not in fixed and not _is_length(name):
            d[name] = next((made(value, small) for fits, made in WIDTHS if fits(name)), value)
    d |= {name: i for i, name in enumerate(("pad_token_id", "bos_token_id", "eos_token_id")) if name in d}
    d["initializer_range"] = 0.2


def _lengths(d: dict[str, Any], max_sample: int | None, small: Small) -> None:
    """Put every length at which the model changes inside the samples, or beyond all of them where the run's samples end before."""

    def put(value: int, inside: int) -> int:
        return inside if max_sample is None or value < max_sample else small.unreached

    stated, original = d.get("max_position_embeddings"), d.get("original_max_position_embeddings")
    for name in [k for k, v in d.items() if "window" in k and isinstance(v, list)]:  # one a layer
        d[name] = [put(v, small.reached) if is_int(v) and v > 0 else v for v in d[name]]
    for name, value in d.items():
        if small.guesses and is_int(value) and value > UNKNOWN and not _is_known(name):
            d[name] = put(value, small.reached)
        if not is_int(value) or value <= 0 or not _is_length(name):
            continue
        if "window" in name or name == "attention_chunk_size":
            d[name] = put(value, small.reached)
        elif name == "index_topk":
            d[name] = put(value, small.reached - 1)
        else:
            d[name] = small.unreached
    ropes = [r for k in ("rope_parameters", "rope_scaling") if isinstance(r := d.get(k), dict)]
    ropes += [r for one in ropes for r in one.values() if isinstance(r, dict)]
    for rope in ropes:
        _shrink_rope(rope, d, put, small)
        if rope.get("rope_type", rope.get("type")) == "dynamic" and stated:
            d["max_position_embeddings"] = put(stated, small.positions)
    if original:
        d["original_max_position_embeddings"] = put(original, small.positions)


def _shrink_rope(rope: dict[str, Any], d: dict[str, Any], put: Callable[[int, int], int], small: Small) -> None:
    """One set of RoPE parameters: a factor a frequency, sections of the frequencies, and its original length."""
    share = rope.get("partial_rotary_factor") or d.get("partial_rotary_factor") or 1.0
    half = int(small.head_dim * float(share)) // 2
    for name in ("short_factor", "long_factor"):
        if isinstance(factors := rope.get(name), list):
            rope[name] = (factors * half)[:half]
    if isinstance(sections := rope.get("mrope_section"), list):
        parts = [half // len(sections)] * len(sections)
        rope["mrope_section"] = [parts[0] + half - sum(parts), *parts[1:]]
    if original := rope.get("original_max_position_embeddings"):
        rope["original_max_position_embeddings"] = put(original, small.positions)


def _is_known(name: str) -> bool:
    """Whether an integer of that name is a size, a number of something, or a length that has a rule."""
    counts = {*HEADS, *KV_HEADS, *HEAD_DIMS, *HIDDEN, *LAYERS, "max_window_layers"}
    return (
        name in counts or _is_length(name) or any(fits(name) for fits, _ in WIDTHS) or "rope" in name or "theta" in name
    )


def _is_length(name: str) -> bool:
    lengths = (
        "attention_chunk_size",
        "index_topk",
        "seq_length",
        "max_seq_len",
        "n_positions",
        "n_ctx",
        "max_sequence_length",
    )
    return name in lengths or "position_embeddings" in name or ("window" in name and name != "max_window_layers")


def _replace(d: dict[str, Any], names: Iterable[str], value: int) -> None:
    """Give the keys that have a value this one."""
    d.update({name: value for name in names if d.get(name)})
