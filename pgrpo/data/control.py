"""Texts of others (rows, tools, environments) in a rendered chat: they never become control tokens.

``guard`` puts a mark behind the first character of every control string in such a text. The chat template copies the mark into
its output, where ``encode`` tokenizes the pieces between marks one by one: none of them spells a control token, and their ids
decode to the same text.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "\U0010fffe"
"""A noncharacter, which no text for interchange contains."""


class Control:
    """The control strings of a tokenizer.

    Args:
        special_only: guard against the tokens that decoding skips; False: against all added tokens, such as those around a call.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, special_only: bool) -> None:
        added = tokenizer.added_tokens_decoder.values()
        strings = {str(token) for token in added if len(str(token)) > 1 and (token.special or not special_only)}
        self._tokenizer = tokenizer
        self._lengths = {"": 0}  # of what stood in front of a text, in tokens
        # The rest behind a control string's first character may begin another one, so look at every position.
        parts = sorted((re.escape(text) for text in strings), key=len, reverse=True)
        self._pattern = re.compile(f"(?=(?:{'|'.join(parts)}))(.)", re.DOTALL) if parts else None

    def guard(self, text: str) -> str:
        """The text with a mark inside every control string."""
        text = text.replace(MARK, "")
        return self._pattern.sub(rf"\1{MARK}", text) if self._pattern else text

    def encode(self, text: str, behind: str = "") -> list[int]:
        """Token ids of rendered text, in which marks separate pieces.

        Args:
            behind: a control string that stands in front of the text; not in the result.
        """
        first, *rest = text.split(MARK)
        ids = self._encode(behind, first)
        for piece in rest:
            ids += self._encode(behind or self._any(), piece)
        return ids

    def _any(self) -> str:
        """A control string to stand in front of a piece, as some tokenizers put a space at the beginning of a text."""
        return str(next(iter(self._tokenizer.added_tokens_decoder.values()), ""))

    def _encode(self, behind: str, text: str) -> list[int]:
        def tokenize(text: str) -> Any:
            return self._tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)[
                "input_ids"
            ]

        if behind not in self._lengths:
            self._lengths[behind] = len(tokenize(behind))
        return list(tokenize(behind + text)[self._lengths[behind] :])


def unmarked(value: Any) -> Any:
    """A text without marks; or messages, whose contents are such texts."""
    if isinstance(value, str):
        return value.replace(MARK, "")
    if isinstance(value, dict):
        return {name: unmarked(item) for name, item in value.items()}
    return [unmarked(item) for item in value] if isinstance(value, list) else value
