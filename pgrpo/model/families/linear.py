"""Layers that carry a state from token to token, over a packed forest: Gated DeltaNet (Qwen3.5, Qwen3-Next, OLMo hybrid; arXiv
2412.06464) and short convolutions (also alone, as in LFM2).

A prompt's state is shared by its completions as its keys are. No forward of a model is replaced: transformers mixes tokens in two
functions of each modelling file, ``causal_conv1d_fn`` and ``torch_chunk_gated_delta_rule``. ``follow_states`` replaces these by
functions that follow the layout of the forward that runs; without a layout they are transformers' own.

``convolution.py`` has the first of these functions, ``delta_rule.py`` the second.

The second is a graph break: it computes depth by depth, and fla-core's kernels cannot be traced. So ``compile_parts`` compiles what
is around it: a function for each class of parts, whatever the forest.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pgrpo.attention.hook import current
from pgrpo.attention.layout import PackedLayout
from pgrpo.model.families.convolution import Functions, convolve
from pgrpo.model.families.delta_rule import delta_rule

CONV, RULE, STEP = "causal_conv1d_fn", "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"
UNCOMPILED = "parts are not compiled"


Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


class _Now:
    """The layer whose forward runs, for states of a rollout, and what compiles its convolution; and whether models without a layout
    must not use fla-core."""

    layer = 0
    compile: Compile | None = None
    plain = False


def follow_states(model: nn.Module) -> list[nn.Module]:
    """Let the linear-attention and convolution layers of a model follow the layouts of its forwards. Returns these layers."""
    found = [module for module in model.modules() if has_state(module)]
    for module in found:
        _replace_functions(sys.modules[type(module).__module__].__dict__)
        if _note_layer not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_note_layer)
    return found


def has_state(module: nn.Module) -> bool:
    """Whether the forward of this module itself calls the function of a short convolution (every such layer has one)."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and CONV in code.co_names and CONV in sys.modules[type(module).__module__].__dict__


def compile_parts(layer: nn.Module, compile_: Compile | None) -> bool:
    """Let the parts of a layer with a state run compiled on packed batches: norms, MLPs, the convolution. None: as they are.
    Returns whether the layer has a state; others stay untouched.

    Not its linear layers: one product has nothing to fuse. And no part that knows its layer's number, as attention does: it would
    be compiled for each layer.
    """
    if not any(map(has_state, layer.modules())):
        return False
    for part in _parts(layer):
        part.compile_ = compile_  # pyright: ignore[reportArgumentType]
        part.forward = partial(_run_part, part)  # pyright: ignore[reportAttributeAccessIssue]
    for module in filter(has_state, layer.modules()):
        module.compile_ = compile_  # pyright: ignore[reportArgumentType]
    return True


def _parts(layer: nn.Module) -> Iterator[nn.Module]:
    for child in layer.children():
        if any(map(has_state, child.modules())):
            yield from _parts(child)
        elif not _is_linear(child) and not any(hasattr(module, "layer_idx") for module in child.modules()):
            yield child


def _is_linear(module: nn.Module) -> bool:
    """Also with an adapter beside it."""
    return isinstance(getattr(module, "base_layer", module), nn.Linear | nn.Conv1d)


def forward_of(part: nn.Module, kind: type[nn.Module]) -> Callable[..., Any]:
    """``kind.forward``; compiled for packed batches, but not for few tokens without gradients or a prefix that is kept, if
    ``compile_parts`` had the part's layer. Parts of one class share what is compiled."""
    compile_: Compile | None = getattr(part, "compile_", None)
    return compile_(kind.forward) if compile_ is not None and _is_compiled() else kind.forward


def _is_compiled() -> bool:
    """Not where a kept prefix is computed, as whole layers are not (``recompute.py``), nor where its backward computes it again,
    which is outside ``keep``: its layout, which no other forward has, remembers."""
    layout = current.layout
    if not isinstance(layout, PackedLayout):
        return False
    if current.keep is not None:
        layout.kept[UNCOMPILED] = True
    return UNCOMPILED not in layout.kept and (torch.is_grad_enabled() or not current.is_eager)


def _run_part(part: nn.Module, *args: Any, **kwargs: Any) -> Any:
    kind = type(part)
    # An MLP in parts of the rows (``training/long_samples.py``) compiles these, so that the activations of one exist at a time.
    run = kind.forward if hasattr(kind, "whole") else forward_of(part, kind)
    return run(part, *args, **kwargs)


def states_text(model: nn.Module, device: torch.device, *, compiled: bool) -> str:
    """What computes the layers with a state, for the log; empty for a model without any."""
    layers = [module for module in model.modules() if has_state(module)]
    if not layers:
        return ""
    rules = sum(RULE in inspect.unwrap(type(layer).forward).__code__.co_names for layer in layers)
    by = "fla-core" if rules and device.type == "cuda" else "transformers' functions in PyTorch"
    parts = "; their norms, MLPs and convolutions are compiled" if compiled else ""
    if compiled and rules:
        parts += f", with a graph break at the recurrence of {rules} of them"
    return f"{len(layers)} layers with a state: by {by}{parts}"


@contextmanager
def plain_functions() -> Iterator[None]:
    """Models without a layout compute in PyTorch inside this block, on a GPU too: to be compared with."""
    _Now.plain = True
    try:
        yield
    finally:
        _Now.plain = False


def _note_layer(module: Any, _: Any) -> None:
    _Now.layer, _Now.compile = module.layer_idx, getattr(module, "compile_", None)


def _replace_functions(namespace: dict[str, Any]) -> None:
    for name, follow in ((CONV, convolve), (RULE, delta_rule)):
        original = namespace.get(name)
        if original is not None and not hasattr(original, "follows"):
            step = inspect.unwrap(namespace[STEP]) if name == RULE else None
            namespace[name] = _following(follow, original, step)


def _following(follow: Callable[..., Any], original: Any, step: Any) -> Callable[..., Any]:
    in_torch = inspect.unwrap(original)  # transformers decides at import by what is installed, not by the device

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if current.layout is not None:
            functions = Functions(in_torch, step, _Now.compile if _is_compiled() else None)
            return follow(current.layout, _Now.layer, functions, x, *args, **kwargs)
        return (original if x.is_cuda and not _Now.plain else in_torch)(x, *args, **kwargs)

    run.follows, run.__wrapped__ = True, original  # pyright: ignore[reportFunctionMemberAccess]
    return run
