"""The loss of a run: ours, or the function that ``loss.function`` names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from pgrpo.algorithm.loss import LossOutput, policy_loss
from pgrpo.config import ConfigError, LossConfig
from pgrpo.config.functions import load_function

INPUTS = tuple(inspect.signature(policy_loss).parameters)
ZEROS = [torch.zeros(())] * (len(LossOutput._fields) - 1)


def loss_function(config: LossConfig) -> Callable[..., LossOutput]:
    """``policy_loss``, or the user's function. Either is called with all of ``policy_loss``'s arguments as keywords; the user's
    gets those that its signature names. It returns the loss of the micro-batch (a scalar, whose sum over micro-batches and ranks
    is the loss of the update), or a ``LossOutput``.

    Raises:
        ConfigError: there is no such function, or it needs an argument that losses do not get.
    """
    if config.function is None:
        return policy_loss
    name, function = config.function, load_function(config.function, "loss.function")
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    needed = {p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    if unknown := sorted((needed - set(INPUTS)) | (needed - named)):
        raise ConfigError(
            f"loss.function={name}: it needs `{unknown[0]}`; a loss is called with the keywords {', '.join(INPUTS)}"
        )

    def own_loss(**inputs: Any) -> LossOutput:
        result = function(**{key: value for key, value in inputs.items() if takes_all or key in named})
        output = result if isinstance(result, LossOutput) else LossOutput(result, *ZEROS)
        if not isinstance(output.loss, torch.Tensor) or output.loss.ndim or not output.loss.requires_grad:
            raise RuntimeError(
                f"loss.function={name} returned {output.loss!r:.200}: return a tensor of one number that depends on logprobs_BR"
            )
        return output

    return own_loss
