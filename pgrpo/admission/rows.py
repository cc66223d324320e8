"""Whether ranks may divide the rows of a model's batch: outside of attention each row must be computed from itself alone.

A small copy (``shrink.py``) runs with an attention in which a row sees only itself: whole, and in two parts. The outputs must be
equal. Layers that look at other rows without calling attention (linear attention, convolutions) then show as a number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from pgrpo.admission.proof import EXACT_PLAIN
from pgrpo.admission.shrink import shrink
from pgrpo.admission.twins import default_dtype, quiet, twins
from pgrpo.attention.hook import attending
from pgrpo.config import ConfigError

ROWS = 16
"""Of the batch, which is cut in the middle. More than the kernel of a short convolution."""


def check_rows(path: str, config: PretrainedConfig, max_sample: int, size: int) -> None:
    """Refuse ``model.sequence_parallel_size`` for a model whose rows depend on each other outside of attention.

    Args:
        path: ``model.path``, for the message.
        config: of the model.
        max_sample: the longest sample of the run.
        size: ranks that compute a batch together.

    Raises:
        ConfigError: with what differs.
    """
    if size == 1:
        return
    try:
        difference = rows_apart(config, max_sample)
        found = f"divided rows differ by {difference:.1e}"
    except Exception as error:
        difference, found = float("nan"), f"{type(error).__name__}: {error}"
        if isinstance(error, AttributeError) and isinstance(error.obj, _Alone):  # layers that ask the layout for more
            found = f"they ask for {error.name}"
    if not difference <= EXACT_PLAIN:
        raise ConfigError(
            f"model.sequence_parallel_size: {size} ranks cannot divide the rows of {path}: layers of this {config.model_type} "
            f"model look at other rows without calling attention, as linear attention does (on a small copy: {found}); set it to 1"
        )


class _Alone:
    """A layout in which a row attends to itself."""

    def attend(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, scale: float, **_: Any) -> Tensor:
        return v_TKD.repeat_interleave(q_THD.shape[1] // v_TKD.shape[1], 1)


@torch.no_grad()
def rows_apart(config: PretrainedConfig, max_sample: int) -> float:
    """The largest difference of a hidden state between whole rows and rows in two parts."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), quiet(), default_dtype(torch.float64):
        small = shrink(config, max_sample)
        model = twins(small, 0)[1].base_model
        ids = torch.randint(3, small.get_text_config().vocab_size - 4, (1, ROWS))
        positions = torch.arange(ROWS)[None]

        def hidden(rows: slice) -> Tensor:
            with attending(_Alone()):
                return model(input_ids=ids[:, rows], position_ids=positions[:, rows], use_cache=False)[0]

        whole, cut = hidden(slice(None)), ROWS // 2
        parts = torch.cat([hidden(slice(0, cut)), hidden(slice(cut, None))], 1)
        return (whole - parts).abs().max().item()
