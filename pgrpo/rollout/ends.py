"""The tokens that end a completion, and a check that the chat template's end of a turn is one of them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from pgrpo.config import ConfigError, ModelConfig, PromptConfig

log = logging.getLogger(__name__)
CONTENT = "END-OF-TURN-PROBE"


def generation_eos(config: ModelConfig, hf_config: PretrainedConfig) -> int | list[int] | None:
    """Ids that end a completion, by the model's generation_config.json, or config.json where there is none."""
    try:
        generation = GenerationConfig.from_pretrained(config.path, revision=config.revision or "main")
    except OSError:
        generation = GenerationConfig.from_model_config(hf_config)
    return generation.eos_token_id


def end_token_ids(
    tokenizer: PreTrainedTokenizerBase,
    generation_eos: int | Sequence[int] | None,
    stop: Sequence[str],
    keep_special_tokens: bool = False,
) -> list[int]:
    """Ids of the tokenizer's eos, the generation config's eos, and stop strings that are a token: decoded text does not have
    special ones. Other stop strings, and other tokens with these in them, are found in the text.

    Raises:
        ConfigError: there is no eos, or a stop string mixes a special token, which text leaves out, with other text.
    """
    ids: set[int] = set()
    for eos in (tokenizer.eos_token_id, generation_eos):
        ids |= {eos} if isinstance(eos, int) else set(eos or ())  # pyright: ignore[reportAssignmentType]
    if not ids:
        raise ConfigError("model.path: neither the tokenizer nor generation_config.json has an eos token: add one")
    special, vocabulary = special_tokens(tokenizer), tokenizer.get_vocab()
    for text in stop:
        if text in special or (text in vocabulary and tokenizer.decode([vocabulary[text]]) == text):
            ids.add(vocabulary[text])
        elif not keep_special_tokens and (found := next((token for token in special if token in text), None)):
            raise ConfigError(
                f"rollout.stop: {text!r} would never be found, as text leaves out the special token {found!r}: "
                f"write {found!r} alone"
            )
    return sorted(ids)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Text -> id of the tokens that decoding skips."""
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
        return  # the template refuses this chat; the data's own chats are checked with the data
    tail = text.rpartition(CONTENT)[2].lstrip()
    end = next((token for token in special_tokens(tokenizer).items() if tail.startswith(token[0])), None)
    if end and end[1] not in end_ids:
        log.warning(
            "model.path: the chat template ends a turn with %r, which does not end a completion: the model may go on to "
            "rollout.max_completion_tokens. Set rollout.stop='[\"%s\"]'",
            end[0], end[0],
        )  # fmt: skip
