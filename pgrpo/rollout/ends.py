"""Which tokens end a completion, and whether the chat template's own end of a turn is among them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from pgrpo.config import ConfigError, PromptConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
CONTENT = "END-OF-TURN-PROBE"


def end_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation_eos: int | Sequence[int] | None, stop: Sequence[str]
) -> list[int]:
    """The tokenizer's eos, those that the model's generation config adds, and every stop string that is a special token, which text
    leaves out, so that it could not be found there. Any other stop string is found in the text.

    Raises:
        ConfigError: there are none, or a stop string has a special token beside other text.
    """
    ids: set[int] = set()
    for eos in (tokenizer.eos_token_id, generation_eos):
        ids |= {eos} if isinstance(eos, int) else set(eos or ())  # pyright: ignore[reportAssignmentType]
    if not ids:
        raise ConfigError("model.path: neither the tokenizer nor generation_config.json has an eos token: add one")
    special = special_tokens(tokenizer)
    for text in stop:
        if text in special:
            ids.add(special[text])
        elif found := next((token for token in special if token in text), None):
            raise ConfigError(
                f"rollout.stop: {text!r} would never be found, as text leaves out the special token {found!r}: "
                f"write {found!r} alone"
            )
    return sorted(ids)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Text -> id of the tokens that decoding leaves out."""
    return {str(added): token for token, added in tokenizer.added_tokens_decoder.items() if added.special}


def check_turn_end(tokenizer: PreTrainedTokenizerBase, prompt: PromptConfig, end_ids: Collection[int]) -> None:
    """Warn when the chat template ends the model's turn with a special token that does not end a completion."""
    if prompt.template is not None:
        return
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": CONTENT}]
    kwargs: dict[str, Any] = prompt.chat_template_kwargs
    try:
        text = str(tokenizer.apply_chat_template(chat, tokenize=False, **kwargs))
    except (TemplateError, ValueError, TypeError):
        return  # it has no such chat; what it makes of the data's own is checked with the data
    tail = text.rpartition(CONTENT)[2].lstrip()
    end = next((token for token in special_tokens(tokenizer).items() if tail.startswith(token[0])), None)
    if end and end[1] not in end_ids:
        log.warning(
            "model.path: the chat template ends a turn with %r, which does not end a completion: the model may go on to "
            "rollout.max_completion_tokens. Set rollout.stop='[\"%s\"]'",
            end[0], end[0],
        )  # fmt: skip
