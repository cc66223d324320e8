"""The ways to compute a group's log-probs that ``pgrpo bench`` compares, each as a function of no arguments."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel

from pgrpo.attention.interface import ATTENTION_NAME
from pgrpo.batch import build_batch
from pgrpo.layers import Keep, set_up_layers
from pgrpo.logprobs import token_logprobs
from pgrpo.policy import Policy, logit_scale
from pgrpo.training.placement import decoder_layers
from pgrpo.types import Group

METHODS = ("grouped", "repeated_packed", "repeated_padded", "concat", "prefix_grouper")
PEER_ATTENTION = "pgrpo_bench_flash"


def why_not(method: str, device: torch.device, groups: Sequence[Group]) -> str | None:
    """What keeps a method from running here; None if nothing does."""
    if method == "prefix_grouper":
        if device.type != "cuda":
            return "it is compared on a GPU"
        if importlib.util.find_spec("prefix_grouper") is None:
            return "the package is not installed (pip install prefix-grouper)"
        if len({(len(g.prompt.token_ids), *(len(c.token_ids) for c in g.completions)) for g in groups}) > 1:
            return "its best case has no padding: groups must be alike"
    return None


class Job:
    """One method, ready to run. All methods share one copy of the weights, so that each one's peak memory is its own.

    ``grouped``, ``repeated_packed`` and ``concat`` (every completion's own copy of its prompt's keys and values, the method of
    PrefixGrouper) run on our kernels, layers and log-probs. ``repeated_padded`` is a right-padded batch through transformers' own
    sdpa; ``prefix_grouper`` the package as verl called it: eager layers, full logits; both checkpoint whole layers if at all.
    """

    def __init__(self, policy: Policy, method: str, groups: list[Group]) -> None:
        self.model, self.attention = policy.model, ATTENTION_NAME
        self.layers = list(decoder_layers(policy.model))
        self.own_layers = method in ("repeated_padded", "prefix_grouper")
        self.forward: Callable[[], Tensor]
        if method == "repeated_padded":
            self.attention, padded = "sdpa", _Padded(groups, policy.device)
            self.forward = partial(padded.logprobs, self.model)
        elif method == "prefix_grouper":
            self.attention, peer = "prefix_grouper_attention", _PrefixGrouper(groups, policy.device)
            self.forward = partial(peer.logprobs, self.model)
        else:
            choice = replace(policy.attention, plan="concat") if method == "concat" else policy.attention
            share = method != "repeated_packed"
            batch = build_batch(groups, share_prompts=share, device=policy.device, attention=choice)
            self.forward = lambda: policy(batch).logprobs

    def old(self) -> Tensor:
        with torch.no_grad(), self._set_up("none"):
            return self.forward()

    def update(self, keep: Keep, compiled: bool) -> None:
        if not self.own_layers:
            set_up_layers(self.layers, [keep for _ in self.layers], compiled=compiled)
        with self._set_up(keep):
            self.forward().mean().backward()
        self.model.zero_grad(set_to_none=True)

    @contextmanager
    def _set_up(self, keep: Keep) -> Iterator[None]:
        """The method's attention, and for a method with layers of its own whole-layer checkpointing unless ``none``."""
        self.model.set_attn_implementation(self.attention)
        before: list[Any] = [layer.forward for layer in self.layers]
        for layer in self.layers if self.own_layers else ():
            run = partial(type(layer).forward, layer)
            layer.forward = run if keep == "none" else partial(checkpoint, run, use_reentrant=False)
        try:
            yield
        finally:
            for layer, forward in zip(self.layers, before, strict=True):
                layer.forward = forward


class _Padded:
    """What a padded trainer does: a right-padded batch, every completion behind a copy of its prompt, transformers' sdpa."""

    def __init__(self, groups: list[Group], device: torch.device) -> None:
        samples = [(g.prompt.token_ids, c.token_ids) for g in groups for c in g.completions]
        width = max(len(p) + len(c) for p, c in samples)
        ids = torch.zeros(len(samples), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        rows: list[int] = []
        for i, (prompt, completion) in enumerate(samples):
            length = len(prompt) + len(completion)
            ids[i, :length], mask[i, :length] = torch.tensor(prompt + completion), 1
            rows += range(i * width + len(prompt) - 1, i * width + length - 1)
        self.ids, self.mask, self.rows = ids.to(device), mask.to(device), torch.tensor(rows, device=device)
        self.targets = torch.tensor([t for _, completion in samples for t in completion], device=device)

    def logprobs(self, model: PreTrainedModel) -> Tensor:
        """[L] in the order of a packed batch."""
        hidden = model.base_model(input_ids=self.ids, attention_mask=self.mask, use_cache=False).last_hidden_state
        head: nn.Linear = model.lm_head  # pyright: ignore[reportAssignmentType]
        hidden_LE = hidden.flatten(0, 1).index_select(0, self.rows)
        return token_logprobs(hidden_LE, head.weight, self.targets, logit_scale(model.config)).logprobs


class _PrefixGrouper:
    """The package prefix_grouper in its best case: groups alike, so no padding, and PyTorch's flash kernel without unpadding."""

    def __init__(self, groups: list[Group], device: torch.device) -> None:
        from prefix_grouper import PrefixGrouper  # pyright: ignore[reportMissingImports]
        from prefix_grouper.utils.register_transformers import (  # pyright: ignore[reportMissingImports]
            register_attention,
        )

        register_attention()
        AttentionInterface.register(PEER_ATTENTION, _flash_of_equal_lengths)
        lengths = [[len(g.prompt.token_ids), *(len(c.token_ids) for c in g.completions)] for g in groups]
        self.grouper = PrefixGrouper(lengths, device=device)
        ids = [g.prompt.token_ids + [t for c in g.completions for t in c.token_ids] for g in groups]
        self.ids = torch.tensor(ids, device=device)
        prompt, *completions = lengths[0]
        position = [*range(prompt), *(prompt + i for n in completions for i in range(n))]
        self.positions = torch.tensor([position] * len(groups), device=device)
        self.targets = torch.tensor([c.token_ids for g in groups for c in g.completions], device=device)

    def logprobs(self, model: PreTrainedModel) -> Tensor:
        """[L] in the order of a packed batch, from the full logits."""
        inputs: dict[str, Any] = {"input_ids": self.ids, "position_ids": self.positions, "use_cache": False}
        inputs |= {"prefix_grouper": self.grouper, "prefix_grouper_attn_func": PEER_ATTENTION}
        logits = model(**inputs).logits
        _, _, suffix, _ = self.grouper.split_output(logits, include_prefix_last=1)
        logits_BRV = suffix[:, :-1].float()
        return -functional.cross_entropy(logits_BRV.flatten(0, 1), self.targets.flatten(), reduction="none")


def _flash_of_equal_lengths(
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
