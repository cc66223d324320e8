"""The ways to compute a group's log-probs that policy.py compares."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel

from pgrpo.attention.hook import ATTENTION_NAME
from pgrpo.attention.kernels.flash import varlen_backward, varlen_forward
from pgrpo.attention.kernels.segments import Scores, Segments
from pgrpo.commands.bench import Job, Packed
from pgrpo.model.families.linear import has_state
from pgrpo.model.head import Head
from pgrpo.model.logprobs import token_logprobs
from pgrpo.model.policy import Policy
from pgrpo.planning.dims import decoder_layers
from pgrpo.types import Recompute, Sample

METHODS = ("grouped", "repeated_packed", "repeated_padded", "concat", "prefix_grouper", "prefix_grouper_ours")
PEERS = ("prefix_grouper", "prefix_grouper_ours")
PEER_ATTENTION = "prefix_grouper_attention"
PEER_KERNEL = "pgrpo_bench_flash"


def why_not(method: str, device: torch.device, model: PreTrainedModel | None = None) -> str | None:
    """What keeps a method from running here; None if nothing does."""
    if method in PEERS and model is not None and any(map(has_state, model.modules())):
        return "it does not hand the states of linear attention from a prompt to its completions"
    if method in PEERS and device.type != "cuda":
        return "it is compared on a GPU"
    if method in PEERS and importlib.util.find_spec("prefix_grouper") is None:
        return "the package is not installed (pip install prefix-grouper)"
    return None


def make_job(policy: Policy, method: str, samples: list[Sample], repeated_parts: int = 1) -> Job:
    """A method of ``METHODS``, ready to run. All share one copy of the weights, so that each one's peak memory is its own.

    ``grouped``, ``repeated_packed`` and ``concat`` (every completion's own copy of its prompt's keys and values, the method of
    PrefixGrouper) run on our kernels, layers and log-probs. ``repeated_padded`` is a right-padded batch through transformers' own
    sdpa; ``prefix_grouper`` the package as verl called it: eager layers, full logits; ``prefix_grouper_ours`` the package given our
    kernel, compiled layers and chunked log-probs. These three checkpoint whole layers if at all. ``repeated_packed`` is computed in
    ``repeated_parts`` micro-batches: one of long prompts would not fit.
    """
    if method == "repeated_padded":
        return TheirLayers(policy.model, "sdpa", _Padded(samples, policy.device).logprobs)
    if method == "prefix_grouper":
        return TheirLayers(policy.model, PEER_ATTENTION, _PrefixGrouper(samples, policy.device).logprobs)
    if method == "prefix_grouper_ours":
        logprobs = partial(_PrefixGrouper(samples, policy.device).chunked_logprobs, kernel=policy.attention.kernel)
        return TheirLayers(policy.model, PEER_ATTENTION, logprobs, torch.compile(_run, dynamic=False))
    attention = replace(policy.attention, way="copied_keys") if method == "concat" else None
    if method == "repeated_packed":
        return Packed(policy, samples, is_shared=False, parts=repeated_parts)
    return Packed(policy, samples, is_shared=True, attention=attention)


class TheirLayers:
    """A method that runs transformers' own layers, one after the other, and checkpoints whole layers unless told ``none``."""

    def __init__(
        self, model: PreTrainedModel, attention: str, logprobs: Callable[[PreTrainedModel], Tensor],
        run_layer: Callable[..., Any] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.attention, self.logprobs, self.run_layer = model, attention, logprobs, run_layer or _run

    def old(self) -> Tensor:
        with torch.no_grad(), self._set_up("none"):
            return self.logprobs(self.model)

    def update(self, recompute: Recompute, compiled: bool) -> None:
        with self._set_up(recompute):
            self.logprobs(self.model).mean().backward()
        self.model.zero_grad(set_to_none=True)

    @contextmanager
    def _set_up(self, recompute: Recompute) -> Iterator[None]:
        layers = list(decoder_layers(self.model))
        before: list[Any] = [layer.forward for layer in layers]
        self.model.set_attn_implementation(self.attention)
        for layer in layers:
            run = partial(self.run_layer, layer)
            layer.forward = run if recompute == "none" else partial(checkpoint, run, use_reentrant=False)
        try:
            yield
        finally:
            self.model.set_attn_implementation(ATTENTION_NAME)
            for layer, forward in zip(layers, before, strict=True):
                layer.forward = forward


def _run(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)


class _Padded:
    """What a padded trainer does: a right-padded batch, every completion behind a copy of its prompt, transformers' sdpa."""

    def __init__(self, samples: list[Sample], device: torch.device) -> None:
        pairs = [(s.prompt_ids, s.token_ids) for s in samples]
        width = max(len(p) + len(c) for p, c in pairs)
        ids = torch.zeros(len(samples), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        rows: list[int] = []
        for i, (prompt, completion) in enumerate(pairs):
            length = len(prompt) + len(completion)
            ids[i, :length], mask[i, :length] = torch.tensor(prompt + completion), 1
            rows += range(i * width + len(prompt) - 1, i * width + length - 1)
        self.ids, self.mask, self.rows = ids.to(device), mask.to(device), torch.tensor(rows, device=device)
        self.targets = torch.tensor([t for _, completion in pairs for t in completion], device=device)

    def logprobs(self, model: PreTrainedModel) -> Tensor:
        """[L] in the order of a packed batch."""
        hidden = model.base_model(input_ids=self.ids, attention_mask=self.mask, use_cache=False).last_hidden_state
        head: nn.Linear = model.lm_head  # pyright: ignore[reportAssignmentType]
        hidden_LE = hidden.flatten(0, 1).index_select(0, self.rows)
        return token_logprobs(hidden_LE, head.weight, self.targets, Head(model).scale or 1.0).logprobs


class _PrefixGrouper:
    """The package prefix_grouper in its best case: groups alike, so no padding, and flash kernels without unpadding."""

    def __init__(self, samples: list[Sample], device: torch.device) -> None:
        from prefix_grouper import PrefixGrouper  # pyright: ignore[reportMissingImports]
        from prefix_grouper.utils import register_transformers  # pyright: ignore[reportMissingImports]

        # Not traced: its indexing by masks breaks graphs in a dozen places, this way once.
        attend = torch.compiler.disable(register_transformers._prefix_grouper_attention_forward)
        AttentionInterface.register(PEER_ATTENTION, attend)
        groups = [list(own) for _, own in groupby(samples, key=lambda s: s.prompt_ids)]
        lengths = [[len(own[0].prompt_ids), *(len(s.token_ids) for s in own)] for own in groups]
        self.grouper = PrefixGrouper(lengths, device=device)
        ids = [own[0].prompt_ids + [t for s in own for t in s.token_ids] for own in groups]
        prompt, *completions = lengths[0]
        position = [*range(prompt), *(prompt + i for n in completions for i in range(n))]
        self.inputs: dict[str, Any] = {
            "input_ids": torch.tensor(ids, device=device),
            "position_ids": torch.tensor([position] * len(groups), device=device),
            "use_cache": False,
            "prefix_grouper": self.grouper,
            "prefix_grouper_attn_func": PEER_KERNEL,
        }
        self.targets = torch.tensor([t for s in samples for t in s.token_ids], device=device)

    def logprobs(self, model: PreTrainedModel) -> Tensor:
        """[L] in the order of a packed batch, from the full logits, on PyTorch's FlashAttention-2."""
        AttentionInterface.register(PEER_KERNEL, _builtin_flash)
        logits_LV = self._suffix(model(**self.inputs).logits).float()
        return -functional.cross_entropy(logits_LV, self.targets, reduction="none")

    def chunked_logprobs(self, model: PreTrainedModel, kernel: str) -> Tensor:
        """The same on our kernel, without the full logits."""
        AttentionInterface.register(PEER_KERNEL, partial(_our_flash, kernel))
        hidden_LE = self._suffix(model.base_model(**self.inputs).last_hidden_state)
        head: nn.Linear = model.lm_head  # pyright: ignore[reportAssignmentType]
        return token_logprobs(hidden_LE, head.weight, self.targets, Head(model).scale or 1.0).logprobs

    def _suffix(self, output: Tensor) -> Tensor:
        """The rows that predict the completions."""
        _, _, suffix_BRE, _ = self.grouper.split_output(output, include_prefix_last=1)
        return suffix_BRE[:, :-1].flatten(0, 1)


def _builtin_flash(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *more: Any,
    scaling: float | None = None, **other: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface on PyTorch's FlashAttention-2, causal (bottom-right), nothing padded."""
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    causal, dropout = True, 0.0
    out, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], dropout, causal, False, scale=scaling
    )
    return out, None


def _our_flash(
    kernel: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *more: Any,
    scaling: float | None = None, **other: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The same on one of our kernels."""
    samples, _, q_len, dim = query.shape
    k_len = key.shape[2]
    cu_q, cu_k = (torch.arange(samples + 1, dtype=torch.int32, device=query.device) * n for n in (q_len, k_len))
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out: Tensor = _Flash.apply(q, k, v, Segments(cu_q, cu_k, q_len, k_len), scaling or dim**-0.5, kernel)  # pyright: ignore[reportAssignmentType]
    return out.unflatten(0, (samples, q_len)), None


class _Flash(torch.autograd.Function):
    """One variable-length call, causal (bottom-right)."""

    @staticmethod
    def forward(ctx, q, k, v, segments, scale, kernel):
        scores = Scores(scale, causal=True)
        out, lse = varlen_forward(q, k, v, segments, scores, kernel)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = segments, scores, kernel
        return out

    @staticmethod
    def backward(ctx, dout):
        return *varlen_backward(dout, *ctx.saved_tensors, *ctx.call), None, None, None
