"""Conversations in the shapes that people have: read, or refused with what to write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from test_data import make_tokenizer

from pgrpo.config import ConfigError, DataConfig, PromptConfig
from pgrpo.data import load_prompts

CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "2+2?"}]
SHARED = [{"from": "system", "value": "be brief"}, {"from": "human", "value": "2+2?"}]
PARTS = [{"role": "system", "content": "be brief"}, {"role": "user", "content": [{"type": "text", "text": "2+"}, "2?"]}]
ANSWER = {"role": "assistant", "content": "4"}


def load(rows: Any, column: str = "chat", answer_column: str | None = None):
    prompt = PromptConfig(messages_column=column, answer_column=answer_column)
    return load_prompts(DataConfig(path="unused"), prompt, make_tokenizer(), dataset=rows).prompts


@pytest.mark.parametrize(
    "chat",
    [
        CHAT,
        tuple(CHAT),
        np.array(CHAT, dtype=object),
        json.dumps(CHAT),
        SHARED,
        json.dumps(SHARED),
        PARTS,
        {"role": ["system", "user"], "content": ["be brief", "2+2?"]},
        [{"from": None, "value": None, **message} for message in CHAT],  # as a columnar file that mixes both has it
    ],
    ids=["list", "tuple", "numpy", "json", "sharegpt", "sharegpt json", "parts", "lists", "nulls"],
)
def test_every_shape_of_a_conversation_gives_the_same_prompt(chat: Any):
    prompt = load([{"chat": chat}])[0]
    assert prompt.messages == CHAT
    assert prompt.text == "<s>[system]be brief[user]2+2?[assistant]"


def test_a_conversation_in_a_field_of_a_parquet_column(tmp_path: Path):
    Dataset.from_list([{"sample": {"conversations": SHARED}}] * 2).to_parquet(tmp_path / "a.parquet")
    prompt = PromptConfig(messages_column="sample.conversations")
    loaded = load_prompts(DataConfig(path=str(tmp_path / "a.parquet")), prompt, make_tokenizer()).prompts
    assert [p.messages for p in loaded] == [CHAT] * 2


def test_the_assistants_answer_at_the_end_becomes_a_column():
    rows = [{"chat": [*CHAT, ANSWER]}, {"chat": [*SHARED, {"from": "gpt", "value": "5"}]}]
    loaded = load(rows, answer_column="gold")
    assert [(p.messages, p.columns["gold"]) for p in loaded] == [(CHAT, "4"), (CHAT, "5")]
    assert "gold" not in rows[0]
    with pytest.raises(
        ConfigError, match=r"ends with an assistant message.*prompt\.answer_column=NAME makes a column NAME"
    ):
        load(rows)
    with pytest.raises(ConfigError, match=r"row 1, column `chat`: must end with the assistant's answer"):
        load([rows[0], {"chat": CHAT}], answer_column="gold")
    with pytest.raises(ConfigError, match=r"row 0, column `chat`: has an answer alone"):
        load([{"chat": [ANSWER]}], answer_column="gold")
    with pytest.raises(ConfigError, match=r"prompt\.answer_column: the data already has a column `chat`"):
        load(rows, answer_column="chat")


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ("[{'role': 'user', 'content': 'a'}]", r"must be a list of messages or its JSON, not .*convert it in a function that"),
        ({"messages": CHAT}, r"is a mapping; name its field: chat\.messages$"),
        ({"user": "2+2?", "assistant": "4"}, r"must be a list of messages, not \{.*data\.path names \(file\.py:function\) to \[\{"),
        ([{"speaker": "a", "text": "b"}], r"a message is a dict with `role` and `content`.*convert it"),
        ([["user", "2+2?"]], r"a message is a dict with `role` and `content`"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"it has an image, which needs a vision-language model"),
        ([{"role": "user", "content": 4}], r"a content is a text, or a list of parts with a `text`, not 4"),
        (None, r"must be a list of messages, not None"),
    ],
)  # fmt: skip
def test_other_shapes_are_refused_with_what_to_write(chat: Any, message: str):
    with pytest.raises(ConfigError, match=rf"prompt\.messages_column: row 1, column `chat`: {message}"):
        load([{"chat": CHAT}, {"chat": chat}])


def test_a_field_that_a_row_lacks_is_named():
    with pytest.raises(ConfigError, match=r"row 0: the data has no column `a\.c`; a has b"):
        load([{"a": {"b": CHAT}}], "a.c")
