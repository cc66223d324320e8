"""Turns a data set into tokenized prompts and iterates over them.

``load_prompts`` (begin there) reads the rows, fills in the template, applies the chat template and tokenizes. It reports
every error in the user's data before any weight is loaded. ``PromptStream`` yields the prompts epoch after epoch, and is
resumable.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgrpo.config import ConfigError, DataConfig, PromptConfig
from pgrpo.data.render import ToolsOf, render_prompts
from pgrpo.data.sources import check_rows, describe_row, read_rows
from pgrpo.data.stream import PromptStream
from pgrpo.data.templates import NoValueError
from pgrpo.types import Prompt
from pgrpo.vision.reader import ImageReader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["LoadedPrompts", "PromptStream", "load_prompts"]


@dataclass(slots=True)
class LoadedPrompts:
    """Prompts in row order, and the number of overlong rows that were dropped or truncated (``data.overlong``)."""

    prompts: list[Prompt]
    dropped: int
    truncated: int


def load_prompts(
    data: DataConfig,
    prompt: PromptConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    held_out: bool = False,
    first: int | None = None,
    dataset: Iterable[Mapping[str, Any]] | None = None,
    tools: ToolsOf | None = None,
    reader: ImageReader | None = None,
) -> LoadedPrompts:
    """Read, render and tokenize a data set.

    Args:
        data: source of the rows, and the length limit.
        prompt: template or messages that turn a row into text.
        tokenizer: tokenizer of the trained model.
        held_out: read ``data.eval_path`` / ``data.eval_split`` instead of the training rows.
        first: maximum number of rows to use. None uses all.
        dataset: rows in memory (a ``datasets.Dataset`` or a list of dicts) that replace ``data.path``.
        tools: JSON schemas of a row's tools, for the chat template.
        reader: reads images; None for a model without a vision tower.

    Raises:
        ConfigError: the rows cannot be read, there are none, the template names a missing column, a prompt is empty, or
            a prompt exceeds ``data.max_prompt_tokens`` under ``overlong: error``.
    """
    rows, source = read_rows(data, held_out) if dataset is None else (check_rows(dataset, "dataset"), "dataset")
    if not rows:
        raise ConfigError(f"{source} has no rows; give at least one")
    rows = rows[:first]
    path = Path((data.eval_path if held_out else None) or data.path or "").expanduser()
    file = path if dataset is None and path.is_file() else None
    try:
        rendered = render_prompts(rows, prompt, tokenizer, tools, reader, file.parent if file else Path())
    except NoValueError as error:
        where = describe_row(rows[error.index], error.index, error.column, source, file)
        raise ConfigError(f"{where}; {error.key} needs it") from None
    prompts: list[Prompt] = []
    dropped = truncated = 0
    for index, (row, (text, messages, ids, images)) in enumerate(zip(rows, rendered, strict=True)):
        if len(ids) > data.max_prompt_tokens:
            if data.overlong == "error":
                over = [len(other.ids) for other in rendered if len(other.ids) > data.max_prompt_tokens]
                raise ConfigError(
                    f"row {index} of {source}: the prompt has {len(ids)} tokens, data.max_prompt_tokens is "
                    f"{data.max_prompt_tokens} ({len(over)} of {len(rows)} rows exceed it, the longest has {max(over)}); "
                    "raise it, or set data.overlong to drop or truncate"
                )
            if data.overlong == "drop":
                dropped += 1
                continue
            if images:
                raise ConfigError(
                    f"data.overlong=truncate: row {index} of {source} has images, which cannot be cut ({len(ids)} tokens, "
                    f"data.max_prompt_tokens is {data.max_prompt_tokens}); set data.overlong=drop, or lower data.image.max_pixels"
                )
            truncated += 1
            ids = ids[-data.max_prompt_tokens :]
            text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        prompts.append(Prompt(index, text, ids, row, messages, images))
    if not prompts:
        raise ConfigError(
            f"data.overlong=drop dropped all {dropped} rows of {source}: every prompt is longer than "
            f"data.max_prompt_tokens={data.max_prompt_tokens}; raise it"
        )
    return LoadedPrompts(prompts, dropped, truncated)
