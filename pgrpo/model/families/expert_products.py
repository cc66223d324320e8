"""A mixture's experts as grouped matrix products: one for the first matrices of all experts of a layer, one for the second ones.

transformers' own grouped experts (``grouped_mm``) compute the same. They copy rows by indexing, whose backward on a GPU sorts, or
adds up in bfloat16 in an order that changes; and they keep two copies of every row for each of its experts. Here rows are added up
in a fixed order, and nothing is kept but what the experts compute inside. Routing weights scale the input of the second product
instead of its output: the result is the same, and the input is narrower.

T rows, A experts that are active for a row, S = T * A copies of rows in the order of their experts, X experts, E hidden width,
I width inside an expert (twice that for gate and up).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise, starmap
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from pgrpo.model.families.expert_adapters import ALIGNMENT, adapter_of
from pgrpo.planning.dims import normed_experts

NAME = "pgrpo"


def use_products(model: PreTrainedModel) -> None:
    """Let the stacked experts of a model be computed here; others stay as they are: those that transformers does not stack, and
    those with a norm behind each expert, which routing weights cannot pass."""
    if not normed_experts(model):
        ALL_EXPERTS_FUNCTIONS.register(NAME, forward)
        model.set_experts_implementation(NAME)


class _Recorded:
    """Modules and the experts of their rows, in the order of calls; None: these are not kept."""

    choices: list[tuple[nn.Module, Tensor]] | None = None


@contextmanager
def recorded_choices() -> Iterator[list[tuple[nn.Module, Tensor]]]:
    """Collects, of forwards inside this block that are not compiled, the experts of all rows: [T, A] of every module of experts."""
    _Recorded.choices = found = []
    try:
        yield found
    finally:
        _Recorded.choices = None


def forward(module: Any, hidden_TE: Tensor, experts_TA: Tensor, weights_TA: Tensor) -> Tensor:
    """transformers' interface for experts: [T, E] hidden states, each row's experts and their weights -> [T, E]."""
    if not torch.compiler.is_compiling() and _Recorded.choices is not None:
        _Recorded.choices.append((module, experts_TA))
    active, turned = experts_TA.shape[-1], bool(module.is_transposed)
    experts_S, order_S = experts_TA.flatten().sort(stable=True)
    rows_S = order_S // active
    place_S = torch.empty_like(order_S).scatter(0, order_S, torch.arange(len(order_S), device=order_S.device))
    every_X = torch.arange(module.num_experts, device=order_S.device)
    ends_X = torch.searchsorted(experts_S, every_X, right=True, out_int32=True)
    name = "gate_up_proj" if module.has_gate else "up_proj"
    bias_XI = getattr(module, f"{name}_bias") if module.has_bias else None
    inner_SI = expert_inputs(
        hidden_TE, getattr(module, name), bias_XI, rows_S, place_S, experts_S, ends_X, active, turned
    )
    if low := _low_rank(module, name, hidden_TE, rows_S, place_S, experts_S, ends_X, active):
        inner_SI = inner_SI + expert_inputs(*low, None, None, None, experts_S, ends_X, 1, False)
    inner_SI = module._apply_gate(inner_SI) if module.has_gate else module.act_fn(inner_SI)
    inner_SI = (inner_SI * weights_TA.flatten().index_select(0, order_S).unsqueeze(-1)).to(hidden_TE.dtype)
    out_TE = expert_outputs(inner_SI, module.down_proj, rows_S, place_S, ends_X, active, turned)
    if low := _low_rank(module, "down_proj", inner_SI, None, None, experts_S, ends_X, 1):
        out_TE = out_TE + expert_outputs(*low, rows_S, place_S, ends_X, active, False)
    if not module.has_bias:
        return out_TE
    weights_TX = out_TE.new_zeros(len(out_TE), module.num_experts)
    return out_TE + weights_TX.scatter_add(1, experts_TA, weights_TA.to(out_TE.dtype)) @ module.down_proj_bias


def _low_rank(
    module: nn.Module, name: str, x: Tensor, rows_S: Tensor | None, place_S: Tensor | None, experts_S: Tensor,
    ends_X: Tensor, active: int,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """[S, R] the copies of each row times the first matrices of a parameter's adapter and its scale; and its second matrices
    [X, O, R]. None without an adapter, and while it is off."""
    adapter = adapter_of(module, name)
    if adapter is None or not (scale := adapter.scaling["default"]):
        return None
    a, b = adapter.matrices(x.dtype)
    return scale * expert_inputs(x, a, None, rows_S, place_S, experts_S, ends_X, active, False), b


# Custom ops, because a compiler lays out the inputs of grouped products with strides that these refuse. ``turned``: matrices are
# stored [X, inputs, outputs], not [X, outputs, inputs].


@torch.library.custom_op("pgrpo::expert_inputs", mutates_args=())
def expert_inputs(
    x_TE: Tensor, weight: Tensor, bias_XI: Tensor | None,
    rows_S: Tensor | None, place_S: Tensor | None, experts_S: Tensor, ends_X: Tensor, active: int, turned: bool,
) -> Tensor:  # fmt: skip
    """[S, I]: the copies of each row times the matrices of their experts. Without ``rows_S`` and ``place_S`` the rows are these
    copies: [S, E]."""
    out_SI = _products(_copies(x_TE, rows_S), weight if turned else weight.mT, ends_X)
    return out_SI if bias_XI is None else out_SI.add_(bias_XI.index_select(0, experts_S))


@torch.library.custom_op("pgrpo::expert_inputs_backward", mutates_args=())
def _expert_inputs_backward(
    d_SI: Tensor, x_TE: Tensor, weight: Tensor, bias_trained: bool,
    rows_S: Tensor | None, place_S: Tensor | None, ends_X: Tensor, active: int, turned: bool, trained: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    d_SI = d_SI.contiguous()
    dx_TE = _products(d_SI, weight.mT if turned else weight, ends_X)
    dx_TE = dx_TE if place_S is None else _added(dx_TE, place_S, active)
    dweight, dbias = d_SI.new_empty(0), d_SI.new_empty(0)
    if trained:
        x_SE = _copies(x_TE, rows_S)
        dweight = _outer(x_SE, d_SI, ends_X) if turned else _outer(d_SI, x_SE, ends_X)
    if bias_trained:
        dbias = _outer(d_SI.new_ones(len(d_SI), ALIGNMENT), d_SI, ends_X)[:, 0].contiguous()
    return dx_TE, dweight, dbias


@torch.library.custom_op("pgrpo::expert_outputs", mutates_args=())
def expert_outputs(
    y_SI: Tensor, weight: Tensor, rows_S: Tensor, place_S: Tensor, ends_X: Tensor, active: int, turned: bool
) -> Tensor:
    """[T, E]: rows inside experts times the matrices of these, added up over the copies of each row."""
    return _added(_products(y_SI.contiguous(), weight if turned else weight.mT, ends_X), place_S, active)


@torch.library.custom_op("pgrpo::expert_outputs_backward", mutates_args=())
def _expert_outputs_backward(
    d_TE: Tensor, y_SI: Tensor, weight: Tensor, rows_S: Tensor, ends_X: Tensor, turned: bool, trained: bool
) -> tuple[Tensor, Tensor]:
    d_SE = d_TE.index_select(0, rows_S)
    dy_SI = _products(d_SE, weight.mT if turned else weight, ends_X)
    if not trained:
        return dy_SI, d_TE.new_empty(0)
    y_SI = y_SI.contiguous()
    return dy_SI, _outer(y_SI, d_SE, ends_X) if turned else _outer(d_SE, y_SI, ends_X)


def _copies(x_TN: Tensor, rows_S: Tensor | None) -> Tensor:
    return x_TN.contiguous() if rows_S is None else x_TN.index_select(0, rows_S)


def _added(out_SN: Tensor, place_S: Tensor, active: int) -> Tensor:
    """[T, N]: sums over the copies of each row, in a fixed order."""
    return out_SN.index_select(0, place_S).unflatten(0, (-1, active)).sum(1)


def _products(a_SK: Tensor, b_XKN: Tensor, ends_X: Tensor) -> Tensor:
    """[S, N]: the rows of each expert times its matrix."""
    if _has_grouped_product(a_SK.dtype, *b_XKN.shape[1:]):
        return functional.grouped_mm(a_SK, b_XKN, offs=ends_X)
    return torch.cat([a_SK[rows] @ b for rows, b in zip(_spans(ends_X), b_XKN, strict=True)])


def _outer(a_SM: Tensor, b_SN: Tensor, ends_X: Tensor) -> Tensor:
    """[X, M, N]: the sum of outer products over the rows of each expert."""
    if _has_grouped_product(a_SM.dtype, a_SM.shape[1], b_SN.shape[1]):
        return functional.grouped_mm(a_SM.mT, b_SN, offs=ends_X)
    return torch.stack([a_SM[rows].mT @ b_SN[rows] for rows in _spans(ends_X)])


def _has_grouped_product(dtype: torch.dtype, *sizes: int) -> bool:
    """Whether PyTorch has it: not in float64, nor of strides that are no multiples of 16 bytes."""
    return dtype != torch.float64 and not any(size * dtype.itemsize % ALIGNMENT for size in sizes)


def _spans(ends_X: Tensor) -> Iterator[slice]:
    return starmap(slice, pairwise([0, *ends_X.tolist()]))


@expert_inputs.register_fake
def _(x, weight, bias, rows, place, experts, ends, active, turned):
    return x.new_empty(experts.shape[0], weight.shape[2 if turned else 1])


@_expert_inputs_backward.register_fake
def _(d, x, weight, bias_trained, rows, place, ends, active, turned, trained):
    dweight = weight.new_empty(weight.shape) if trained else d.new_empty(0)
    return (
        x.new_empty(x.shape),
        dweight,
        d.new_empty(len(weight), d.shape[1]) if bias_trained else d.new_empty(0),
    )


@expert_outputs.register_fake
def _(y, weight, rows, place, ends, active, turned):
    return y.new_empty(rows.shape[0] // active, weight.shape[2 if turned else 1])


@_expert_outputs_backward.register_fake
def _(d, y, weight, rows, ends, turned, trained):
    return y.new_empty(y.shape), weight.new_empty(weight.shape) if trained else d.new_empty(0)


def _set_up_inputs(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _, rows, place, _, ends, ctx.active, ctx.turned = inputs
    ctx.save_for_backward(x, weight, rows, place, ends)


def _inputs_backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, rows, place, ends = ctx.saved_tensors
    _, trained, bias_trained, *_ = ctx.needs_input_grad
    dx, dweight, dbias = _expert_inputs_backward(
        d, x, weight, bias_trained, rows, place, ends, ctx.active, ctx.turned, trained
    )
    return dx, dweight if trained else None, dbias if bias_trained else None, *[None] * 6


def _set_up_outputs(ctx: Any, inputs: Any, output: Any) -> None:
    y, weight, rows, _, ends, _, ctx.turned = inputs
    ctx.save_for_backward(y, weight, rows, ends)


def _outputs_backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
    y, weight, rows, ends = ctx.saved_tensors
    trained = ctx.needs_input_grad[1]
    dy, dweight = _expert_outputs_backward(d, y, weight, rows, ends, ctx.turned, trained)
    return dy, dweight if trained else None, *[None] * 5


expert_inputs.register_autograd(_inputs_backward, setup_context=_set_up_inputs)
expert_outputs.register_autograd(_outputs_backward, setup_context=_set_up_outputs)
