"""Plays episodes for tests: an engine that says a script, with the tokenizer of the tools quick start."""

from __future__ import annotations

import json
import runpy
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pgrpo.config import DataConfig, PromptConfig
from pgrpo.config.task import EnvironmentConfig, MessageConfig
from pgrpo.data import load_prompts
from pgrpo.environments.episodes import ToolLoop
from pgrpo.environments.toolbox import Toolbox
from pgrpo.environments.tools import load_kinds, load_tools
from pgrpo.environments.workers import Nursery
from pgrpo.types import Completion, Episode, Prompt, SamplingParams

ROOT = Path(__file__).resolve().parents[1]
MAKE = runpy.run_path(str(ROOT / "scripts" / "make_tiny_tool_model.py"))
TOKENIZER = MAKE["make_tokenizer"]()
END: Any = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
PARAMS = SamplingParams(max_completion_tokens=200)


def ids(text: str, tokenizer: Any = TOKENIZER) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


class Scripted:
    """An engine that answers what the script says: given the text so far, the text of the turn. One without <|im_end|> at its end
    was cut, or ended by a stop string where it ends in a !."""

    def __init__(self, script: Callable[[str], str], tokenizer: Any = TOKENIZER) -> None:
        self.tokenizer = tokenizer
        self.script, self.rounds, self.said, self.requests = script, [], {}, []

    def sample(self, requests, params, on_finished, more):
        position, batch = 0, list(requests) or list(more("all"))
        while batch:
            self.rounds.append(len(batch))
            for request in batch:
                text = self.script(self.tokenizer.decode(request.token_ids))
                said = ids(text, self.tokenizer)[: request.max_tokens]
                is_done = said[-1:] == [END] or text.endswith("!")
                plain = self.tokenizer.decode(said, skip_special_tokens=True)
                self.said.setdefault(request.seeds[0], []).append(said)
                self.requests.append(request)
                on_finished(position, [Completion(said, [-0.5] * len(said), "stop" if is_done else "length", plain, 3)])
                position += 1
            batch = list(more("all"))


def prompt_of(toolbox: Toolbox, text: str = "go", tokenizer: Any = TOKENIZER, **columns: Any) -> Prompt:
    messages = [{"role": "user", "content": text}]
    schemas = toolbox.schemas_of(columns)
    rendered = tokenizer.apply_chat_template(
        messages, tools=schemas or None, tokenize=False, add_generation_prompt=True
    )
    return Prompt(0, rendered, ids(rendered, tokenizer), columns, messages)


def play(
    script: Callable[[str], str],
    *,
    tools=(),
    environment=None,
    rows=({},),
    size=1,
    turn=200,
    episode=600,
    prompt=300,
    tokenizer=TOKENIZER,
    reader: Any = None,
    **settings: Any,
) -> tuple[list[list[Episode]], Scripted]:
    """The episodes of each row, and the engine. A row may have ``images``, which ``reader`` reads."""
    chosen = EnvironmentConfig(**settings)
    named = [tool for tool in tools if isinstance(tool, str)]
    is_named = isinstance(environment, str) or (
        isinstance(environment, dict) and str in map(type, environment.values())
    )
    nursery = Nursery(chosen.secrets, reader and reader.limits) if named or is_named else None
    kinds = load_kinds(None, chosen.args, environment, nursery)
    toolbox = Toolbox(load_tools(named, [tool for tool in tools if tool not in named], nursery), kinds, nursery=nursery)
    engine: Any = Scripted(script, tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    chats = toolbox.chats(tokenizer, [end], {}, chosen.history, reader, chosen.max_images)
    made = ToolLoop(engine, toolbox.tools, kinds, chats, chosen, episode, prompt, lambda: False, nursery)
    prompts = [prompt_of(toolbox, tokenizer=tokenizer, **row) for row in rows]
    if reader is not None:
        asked = PromptConfig(images_column="images", messages=[MessageConfig("user", "{text}")])
        rows = [{"text": "go", "images": None} | row for row in rows]
        data = DataConfig(max_prompt_tokens=prompt)
        prompts = load_prompts(data, asked, tokenizer, dataset=rows, tools=toolbox.schemas_of, reader=reader).prompts
    seeds = [[100 * i + j for j in range(size)] for i in range(len(prompts))]
    groups = []
    try:
        groups = made.generate(prompts, SamplingParams(turn), seeds, len(prompts), lambda *_: None)
        made.check(groups)
        return [group.episodes for group in groups], engine
    finally:
        if is_named:
            made.release(groups)
        made.close()


def one(script: Callable[[str], str], **settings: Any) -> Episode:
    return play(script, **settings)[0][0][0]


def turns(*texts: str) -> Callable[[str], str]:
    """A script of turns, whatever is said between them."""
    return lambda text: texts[text.count("<|im_start|>assistant") - 1]


def printable_tokenizer() -> Any:
    """The same with a token for each printable character."""
    tokenizer = MAKE["make_tokenizer"]()
    tokenizer.add_tokens([c for c in string.printable if c not in tokenizer.get_vocab()])
    return tokenizer


def thinking_tokenizer() -> Any:
    """The same with reasoning, which the template leaves out of turns in front of the last user message, as Qwen3's does."""
    tokenizer = MAKE["make_tokenizer"]()
    tokenizer.add_tokens(["<think>", "</think>"])
    turn = "{{ '<|im_start|>' + message.role + '\n' + message.content }}"
    template = str(tokenizer.chat_template)
    assert turn in template
    thought = (
        "{{ '<|im_start|>' + message.role + '\n' }}{% if message.reasoning_content and loop.index0 > last.user %}"
        "{{ '<think>' + message.reasoning_content + '</think>' }}{% endif %}{{ message.content }}"
    )
    last = (
        "{%- set last = namespace(user=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}{% set last.user = loop.index0 %}"
        "{%- endif %}{%- endfor %}"
    )
    tokenizer.chat_template = last + template.replace(turn, thought)
    return tokenizer
