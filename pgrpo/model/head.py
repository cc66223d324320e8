"""The model's own way from hidden states to logits: output embedding, bias, scale, soft-capping, whatever its forward does.

C rows, E hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from pgrpo.vision.families import never_sampled

PROBE_ROWS, PROBE_WORDS = 3, 8
NEVER = -1e30
"""The logit of an id that is never sampled."""


class Head:
    """From hidden states to logits, by the forward of the model itself with its decoder replaced.

    Attributes:
        scale: the logits are this factor times ``hidden @ weight.T``; None if the head computes anything else.
        banned: ids that are never sampled and have no probability: placeholders of images.
        names: parameters of the model outside of its decoder, and the output embedding, which may be inside (tied).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        embedding = model.get_output_embeddings()
        decoder = {id(p) for p in model.base_model.parameters()}
        own = embedding.weight if embedding is not None else None
        self.names = [n for n, p in model.named_parameters() if p is own or id(p) not in decoder]
        self.banned: list[int] = []  # after the probe, which has few ids
        self.scale = self._scale(embedding)
        self.banned = never_sampled(model.config)

    @property
    def weight(self) -> Tensor:
        """[V, E] the output embedding."""
        return self.model.get_output_embeddings().weight  # pyright: ignore[reportReturnType, reportOptionalMemberAccess]

    @property
    def parameters(self) -> list[Tensor]:
        """The tensors of ``names``."""
        return [self.model.get_parameter(name) for name in self.names]

    def logits(self, hidden_CE: Tensor, parameters: dict[str, Tensor] | None = None) -> Tensor:
        """[C, V] logits, as the model's own forward computes them; ``parameters`` replaces the model's by name."""
        model = self.model
        ids = torch.zeros(1, len(hidden_CE), dtype=torch.long, device=hidden_CE.device)
        inputs = {"input_ids": ids, "use_cache": False}
        output, decoder = _DecoderOutput(hidden_CE.unsqueeze(0)), model.base_model
        decoder.forward = lambda *_, **__: output  # pyright: ignore[reportAttributeAccessIssue]
        try:
            call = model.forward(**inputs) if parameters is None else functional_call(model, parameters, (), inputs)
            return self.ban(call.logits.squeeze(0))
        finally:
            del decoder.forward

    def ban(self, logits_CV: Tensor) -> Tensor:
        """The logits without those of ``banned``, in place where autograd allows. Not minus infinity, which has no entropy."""
        if not self.banned:
            return logits_CV
        fill = logits_CV.index_fill if logits_CV.requires_grad else logits_CV.index_fill_
        return fill(1, torch.tensor(self.banned, device=logits_CV.device), NEVER)

    def _scale(self, embedding: nn.Module | None) -> float | None:
        """Compare the head's logits with those of a plain matrix product, in float64 and on a few rows of the vocabulary."""
        if not isinstance(embedding, nn.Linear) or embedding.bias is not None or len(self.names) != 1:
            return None
        generator = torch.Generator().manual_seed(0)
        shapes = (PROBE_ROWS, embedding.in_features), (PROBE_WORDS, embedding.in_features)
        hidden_CE, weight_VE = (
            torch.randn(shape, generator=generator, dtype=torch.float64).to(embedding.weight.device) for shape in shapes
        )
        plain_CV = hidden_CE @ weight_VE.T
        with torch.no_grad():
            logits_CV = self.logits(hidden_CE, {self.names[0]: weight_VE})
        scale = float((logits_CV[0, 0] / plain_CV[0, 0]).item())
        return scale if torch.allclose(logits_CV.double(), scale * plain_CV, rtol=1e-6, atol=1e-6) else None


class _DecoderOutput:
    """Stands for the output of a decoder: a last hidden state, and None for everything else."""

    def __init__(self, hidden_1CE: Tensor) -> None:
        self.last_hidden_state = hidden_1CE

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]
