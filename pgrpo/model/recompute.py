"""Runs a model's decoder layers on packed batches: compiled or not, and with activation checkpointing layer by layer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.fx.experimental._config
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from pgrpo.attention.hook import AttentionLayout, Front, current
from pgrpo.attention.layout import PackedLayout
from pgrpo.distributed.sequence import SplitLayout
from pgrpo.model.families.linear import compile_parts
from pgrpo.model.families.vision import WholeImages
from pgrpo.types import Recompute


class Seen(NamedTuple):
    """What rows of a layer attend to: the layout, and what is there of a kept first node. An argument of what is compiled, which
    then has it as an input, and no guard on its identity."""

    layout: AttentionLayout
    front: Front | None


def is_training(layout: object) -> bool:
    """Whether it is of a packed batch, and not of a rollout."""
    return isinstance(layout.layout if isinstance(layout, WholeImages) else layout, PackedLayout | SplitLayout)


def set_up_layers(layers: Iterable[nn.Module], recompute: Sequence[Recompute], *, compiled: bool) -> None:
    """Replace the forward of each layer on packed batches; other forwards (sampling) are unchanged.

    Hooks of the layer (FSDP2's) stay outside: they see one forward and one backward, whatever is recomputed.

    Args:
        layers: decoder layers.
        recompute: one entry a layer: what its backward recomputes.
        compiled: use ``torch.compile`` with dynamic shapes; all layers of a kind share one compilation for each gradient mode.
            Of layers with a state, whose calls depend on the forest, the parts are compiled.
    """
    for number, (layer, mode) in enumerate(zip(layers, recompute, strict=True)):
        stateful = compile_parts(layer, compile_dynamic if compiled else None)
        mode = "full" if stateful and mode in ("attention", "matmuls") else mode  # neither can be kept in these layers
        layer.forward = partial(_forward, layer, number, mode, compiled and not stateful)  # pyright: ignore


def _forward(layer: nn.Module, number: int, mode: Recompute, compiled: bool, *args: Any, **kwargs: Any) -> Tensor:
    layout = current.layout
    if layout is None or not is_training(layout):
        return type(layer).forward(layer, *args, **kwargs)
    if not torch.is_grad_enabled():
        mode, compiled = "none", compiled and not current.is_eager
    if current.keep is not None:
        current.keep.append([])
        compiled = False  # compiled code cannot hand out the keys and values that a checkpoint inside it makes
    front = current.fronts[number] if current.fronts else None
    try:
        run = RUNS.get(mode, _everything)
        return (compile_dynamic(run) if compiled else run)(layer, Seen(layout, front), *args, **kwargs)
    finally:
        current.layout = layout


@contextmanager
def not_compiled() -> Iterator[None]:
    """Forwards without gradients inside this block run as they are: for few tokens, which compiled code makes faster by less than
    its compilation takes."""
    current.is_eager = True
    try:
        yield
    finally:
        current.is_eager = False


@cache
def compile_dynamic(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` by ``torch.compile``, once for all sizes."""
    compiled_run = torch.compile(run, dynamic=True, fullgraph=True)

    def run_compiled(*args: Any, **kwargs: Any) -> Any:
        # By default two sizes that are equal in the first batch (groups and tokens, say) are compiled as one symbol.
        # They may differ in the next batch, so give each size a symbol of its own. Numbers such as a norm's epsilon never change:
        # as inputs they would be tensors on the CPU, for which inductor traces twice and runs a C++ compiler for a minute.
        # Parts that models share are compiled for each of policy, reference and teacher, with gradients and without, for one row
        # and for more, with a kept first node and without: up to 24 times, where PyTorch by default fails at the ninth.
        sizes = torch.fx.experimental._config.patch(use_duck_shape=False)  # pyright: ignore[reportAttributeAccessIssue]
        with sizes, torch._dynamo.config.patch(specialize_float=True, recompile_limit=96):  # pyright: ignore
            return compiled_run(*args, **kwargs)

    return run_compiled


def _plain(layer: nn.Module, seen: Seen, *args: Any, **kwargs: Any) -> Tensor:
    return _attending(seen, partial(type(layer).forward, layer), *args, **kwargs)


# PyTorch warns about in-place ops in every checkpointed region. Our layers have none, so silence that logger.
logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)


def _all_but_matmuls(layer: nn.Module, seen: Seen, *args: Any, **kwargs: Any) -> Tensor:
    return _attending(seen, partial(RECOMPUTED, context_fn=SAVE_MATMULS), layer, seen, *args, **kwargs)


def _all_but_attention(layer: nn.Module, seen: Seen, *args: Any, **kwargs: Any) -> Tensor:
    return _attending(seen, partial(RECOMPUTED, context_fn=SAVE_ATTENTION), layer, seen, *args, **kwargs)


def _everything(layer: nn.Module, seen: Seen, *args: Any, **kwargs: Any) -> Tensor:
    return _attending(seen, RECOMPUTED, layer, seen, *args, **kwargs)


def _attending(seen: Seen, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    """``hook.attending`` for a layer."""
    current.layout, current.front = seen
    try:
        return run(*args, **kwargs)
    finally:
        current.layout = current.front = None


def _again(layer: nn.Module, seen: Seen, *args: Any, **kwargs: Any) -> Tensor:
    """The part of a layer that a checkpoint runs, and runs again in the backward. Compiled code has no side effects in here, and
    needs none: its backward does not run Python again."""
    forward = partial(type(layer).forward, layer)
    return forward(*args, **kwargs) if torch.compiler.is_compiling() else _attending(seen, forward, *args, **kwargs)


def _save(names: Container[str], _: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if str(op) in names else CheckpointPolicy.PREFER_RECOMPUTE


RECOMPUTED = partial(checkpoint, _again, use_reentrant=False)
RUNS: dict[Recompute, Any] = {"none": _plain, "matmuls": _all_but_matmuls, "attention": _all_but_attention}
# By name, as PyTorch 2.11 keeps no compiled graph on disk whose checkpoint has operators as arguments.
ATTENTION = ("pgrpo.grouped_attention.default",)
MATMULS = tuple(f"aten.{name}.default" for name in ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm"))
# Products of experts are in the order that the first choice of experts gave, so that is kept too.
EXPERTS = ("pgrpo.expert_inputs.default", "pgrpo.expert_outputs.default", "aten.sort.stable")
SAVE_ATTENTION: Any = partial(create_selective_checkpoint_contexts, partial(_save, ATTENTION))
SAVE_MATMULS: Any = partial(create_selective_checkpoint_contexts, partial(_save, ATTENTION + MATMULS + EXPERTS))
# AOTAutograd stores compiled graphs on disk only if it knows that these decide as they did.
SAVE_ATTENTION.cache_hash, SAVE_MATMULS.cache_hash = str(ATTENTION), str(ATTENTION + MATMULS + EXPERTS)
