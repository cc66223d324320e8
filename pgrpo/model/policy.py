"""A transformers model with grouped attention: takes a packed batch, returns log-probs of its completion tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from pgrpo.attention.choose import AttentionChoice
from pgrpo.attention.hook import ATTENTION_NAME, AttentionLayout, Front, attending, attention_forward
from pgrpo.attention.layout import PackedLayout
from pgrpo.config import ModelConfig
from pgrpo.distributed.sequence import SplitLayout, Ulysses
from pgrpo.model.families.expert_products import use_products
from pgrpo.model.families.linear import follow_states
from pgrpo.model.families.vision import Vision
from pgrpo.model.head import Head
from pgrpo.model.logprobs import TeacherRows, TokenLogprobs, token_logprobs
from pgrpo.packing.batch import GroupedBatch
from pgrpo.planning.dims import windows
from pgrpo.planning.hub import load_hf_config, pretrained_model
from pgrpo.vision.families import attention_names
from pgrpo.vision.rows import ImageRows

AttentionInterface.register(ATTENTION_NAME, attention_forward)


class Kept(NamedTuple):
    """What passes read of a kept prefix: [1, E] the hidden state of its last row, and what every layer has of it."""

    last_1E: Tensor
    fronts: Sequence[Front]


class Policy(nn.Module):
    """Wraps a causal language model, with or without a vision tower. Everything that reads its weights is a method of this class:
    with FSDP2 only a call of the root module gathers sharded weights.

    Args:
        model: loaded with ``attn_implementation="pgrpo"`` (``load_model``).
        temperature: logits are divided by it, so that log-probs are those of the distribution that the rollout samples from.
        attention: how attention is computed; batches must be built for it (``build_batch(..., attention=policy.attention)``).
        ranks: those that compute each batch together, if there are several. They call ``forward`` with equal batches.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        temperature: float = 1.0,
        attention: AttentionChoice = AttentionChoice(),
        ranks: Ulysses | None = None,
    ) -> None:
        super().__init__()
        self.model, self.ranks = model, ranks
        self.temperature = temperature
        self.attention = replace(attention, windows=sliding_windows(model))
        self.head = Head(model)
        follow_states(model)
        use_products(model)
        self.vision = Vision.of(model)
        self.kept: Kept | None = None
        """Set while ``kept.kept_prefix`` runs."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(
        self,
        batch: GroupedBatch,
        *,
        entropy: bool = False,
        temperature: float | None = None,
        teacher: TeacherRows | None = None,
    ) -> TokenLogprobs:
        """Log-probs [L] (and entropy [L], and the KL [L] to a teacher) of the batch's completion tokens; ``batch.unpack`` turns
        them into rows of samples. ``temperature`` replaces the policy's."""
        hidden_UE, numbers_U = self._rows(batch)
        targets_U = batch.target_ids.index_select(0, batch.distinct)
        if numbers_U is not None:
            targets_U = targets_U.index_select(0, numbers_U)
        scale = (self.head.scale or 1.0) / (self.temperature if temperature is None else temperature)
        head = self.head if self.head.scale is None else self.head.weight
        found = token_logprobs(hidden_UE, head, targets_U, scale, entropy=entropy, teacher=teacher, ban=self.head.ban)
        if self.ranks is not None and numbers_U is not None:
            every = partial(self.ranks.all_values, numbers=numbers_U, count=len(batch.distinct))
            found = found._make(x if x is None else every(x) for x in found)
        return found._make(x if x is None else x.index_select(0, batch.pair_index) for x in found)

    def teacher_rows(self, batch: GroupedBatch) -> TeacherRows:
        """For the KL of another policy to this one, in the forward of that. With FSDP the head stays gathered until ``reshard``. Of
        several ranks, those of its own rows: both policies must keep the batch's prefix, or neither."""
        return TeacherRows(self._rows(batch)[0], self.head, (self.head.scale or 1.0) / self.temperature)

    def keep(self, batch: GroupedBatch) -> Tensor:
        """Compute a batch's kept rows, or its first row if it has none, into ``kept``; returns the last row's hidden state, by
        which FSDP learns of the backward."""
        rows = batch.kept.front if batch.kept else 1
        layout = PackedLayout([rows], [-1], batch.logit_index.device, self.attention)
        inputs, layout = self._own({name: x[..., :rows] for name, x in batch.inputs.items()}, layout)
        fronts: list[list[Tensor]] = []
        hidden_PE = self._hidden(inputs, layout, None, keep=fronts)
        if not all(0 < len(front) < 3 for front in fronts):  # keys and values; inputs of a convolution (and a state)
            raise RuntimeError("layers do not each call attention once, or have one state")
        last = rows - 1 - (self.ranks.bounds(rows)[0] if self.ranks else 0)
        last = max(0, min(last, len(hidden_PE) - 1))  # any row of ranks that do not have it
        self.kept = Kept(hidden_PE[last : last + 1].clone(), fronts)
        return self.kept.last_1E

    def _rows(self, batch: GroupedBatch) -> tuple[Tensor, Tensor | None]:
        """[U, E] hidden states of the rows that predict the distinct completion tokens; of several ranks, those of its own rows,
        and their numbers."""
        kept, numbers_U, images = self.kept if batch.kept else None, None, batch.images
        layout = (kept and batch.kept) or batch.layout
        every = {name: x[..., layout.front :] for name, x in batch.inputs.items()}
        rows_U = batch.logit_index.index_select(0, batch.distinct) - layout.front
        if self.ranks is not None:
            total = every["input_ids"].shape[-1]
            numbers_U, rows_U = self.ranks.owned(rows_U, total, layout.front)
            images = images and images.between(*self.ranks.bounds(total))
        hidden_TE = self._hidden(*self._own(every, layout), images, kept and kept.fronts)
        if kept is not None:
            hidden_TE, rows_U = torch.cat([kept.last_1E, hidden_TE]), rows_U + 1
        # The last prompt row occurs once for each completion. The backward of index_select adds up its gradients in a fixed order;
        # that of indexing does not, and would not be bit-stable.
        return hidden_TE.index_select(0, rows_U), numbers_U

    def _own(self, inputs: dict[str, Tensor], layout: AttentionLayout) -> tuple[dict[str, Tensor], AttentionLayout]:
        """This rank's rows of those that several ranks compute together, and a layout for them."""
        if self.ranks is None:
            return inputs, layout
        return self.ranks.rows(inputs), SplitLayout(layout, inputs["input_ids"], self.ranks)

    def next_logits(
        self, inputs: Mapping[str, Tensor], layout: AttentionLayout, rows_B: Tensor, images: ImageRows | None = None
    ) -> Tensor:
        """Logits [B, V] at the given packed rows, as the model's own forward computes them (without temperature)."""
        return self.head.logits(self._hidden(inputs, layout, images).index_select(0, rows_B))

    def _hidden(
        self,
        inputs: Mapping[str, Tensor],
        layout: AttentionLayout,
        images: ImageRows | None,
        fronts: Sequence[Front] | None = None,
        keep: list[list[Tensor]] | None = None,
    ) -> Tensor:
        if self.vision is not None:
            return self.vision.hidden(inputs, layout, images)
        with attending(layout, fronts, keep):
            output = self.model.base_model(**{name: x.unsqueeze(0) for name, x in inputs.items()}, use_cache=False)
        return output[0].squeeze(0)


def sliding_windows(model: PreTrainedModel) -> tuple[int, ...]:
    """The sliding windows of the model's layers, in tokens: by its config, and as modules have them."""
    found = {getattr(module, "sliding_window", None) for module in model.modules()}
    found |= {*windows(model.config.get_text_config())} - {0}
    return tuple(sorted(window for window in found if isinstance(window, int)))


def load_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model on the CPU, ready for ``Policy``. Whether grouped attention is exact on it is for ``check_model`` to say.

    Args:
        config: which model.
        dtype: of the weights; float32 for weights that are trained (master weights).

    Raises:
        ConfigError: the model cannot be loaded.
    """
    hf_config = load_hf_config(config)
    attention = attention_names(hf_config, ATTENTION_NAME)
    return pretrained_model(hf_config, config, dtype=dtype, attn_implementation=attention).train()
