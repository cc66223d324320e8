"""Reads the calls of tools in what a model wrote.

A tokenizer's own response template comes first. Without one, a family below is chosen by what the chat template writes: the one
that reads the template's rendering of a call back. A call that cannot be read is a ``Call`` with an ``error``; the good ones
beside it stay.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a tool.

    Attributes:
        name: of the tool; empty where it could not be read.
        arguments: by name, as the model wrote them.
        error: why it cannot be read; None if it can.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


class Reply(NamedTuple):
    """A turn of the model, in parts. ``content`` is what is neither reasoning nor a call."""

    content: str
    reasoning: str
    calls: list[Call]


Parse = Callable[[str, bool], Reply]
"""Of a turn without its end token; the flag says that the prompt ended inside reasoning."""


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _named(value: dict[str, Any], *keys: str) -> Call:
    """A call from ``{"name": ..., "arguments": {...}}``; arguments may be a text of JSON."""
    arguments = next((value[key] for key in keys if value.get(key) is not None), {})
    if isinstance(arguments, str):
        arguments = _json_object(arguments)
    if not isinstance(name := value.get("name"), str) or not name or not isinstance(arguments, dict):
        raise ValueError("a call needs a name and an object of arguments")
    return Call(name, arguments)


class Text(str):
    """An argument that was written without quotes: its type is the schema's to say."""


def _between(text: str, start: str, end: str) -> tuple[str, list[str | None]]:
    """The text outside of ``start ... end``, and what is inside of each; None for one without an end."""
    outside, *blocks = text.split(start)
    inside: list[str | None] = []
    for block in blocks:
        body, ended, rest = block.partition(end)
        inside.append(body if ended else None)
        outside += rest
    return outside.strip(), inside


def split_reasoning(text: str, is_thinking: bool) -> tuple[str, str]:
    """(reasoning, the rest) of a text with ``<think> ... </think>`` at its beginning. Without an end all is reasoning."""
    opened = text.lstrip().startswith("<think>")
    if not (opened or is_thinking):
        return "", text
    before, _, rest = text.partition("</think>")
    return before.replace("<think>", "", 1).strip(), rest


def _tagged(start: str, end: str, read: Callable[[str], Sequence[Call]]) -> Parse:
    """Calls between two tags, each read by ``read``, which raises ``ValueError``."""

    def parse(text: str, is_thinking: bool) -> Reply:
        reasoning, text = split_reasoning(text, is_thinking)
        content, blocks = _between(text, start, end)
        calls: list[Call] = []
        for block in blocks:
            try:
                if block is None:
                    raise ValueError(f"{end} is missing")
                calls += read(block.strip())
            except ValueError as error:
                calls.append(Call(_some_name(block or text), error=str(error)))
        return Reply(content, reasoning, calls)

    return parse


def _some_name(text: str) -> str:
    """The name in a call that cannot be read, if there is one."""
    found = re.search(r'"name"\s*:\s*"(\w+)"|<function=(\w+)|call:(\w+)|^\s*(\w+)', text)
    return next((name for name in found.groups() if name), "") if found else ""


def _hermes(block: str) -> list[Call]:
    return [_named(_json_object(block), "arguments", "parameters")]


def _xml(block: str) -> list[Call]:
    head = re.match(r"<function=([^>\s]+)>(.*)</function>$", block, re.DOTALL)
    if not head:
        raise ValueError("no <function=name> ... </function>")
    body, found = head[2], {}
    for part in re.finditer(r"<parameter=([^>\s]+)>(.*?)</parameter>", body, re.DOTALL):
        found[part[1]] = Text(_one_line_less(part[2]))
    if re.sub(r"<parameter=[^>\s]+>.*?</parameter>", "", body, flags=re.DOTALL).strip():
        raise ValueError("a parameter without <parameter=name> ... </parameter>")
    return [Call(head[1], found)]


def _glm(block: str) -> list[Call]:
    name, *pairs = block.split("<arg_key>")
    found = {}
    for pair in pairs:
        part = re.match(r"(.*?)</arg_key>\s*<arg_value>(.*)</arg_value>\s*$", pair, re.DOTALL)
        if not part:
            raise ValueError("an argument without <arg_key> and <arg_value>")
        found[part[1].strip()] = Text(part[2])
    if not re.fullmatch(r"[\w.-]+", name.strip()):
        raise ValueError("no name of a tool")
    return [Call(name.strip(), found)]


def _one_line_less(text: str) -> str:
    """Without one newline at each end, which the format adds."""
    return text.removeprefix("\n").removesuffix("\n")


def _python(block: str) -> list[Call]:
    """``[f(a=1), g(b='x')]``; JSON's true, false and null are read too."""
    try:
        tree = ast.parse(block, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"not a list of calls: {error}") from None
    calls = []
    for node in tree.elts if isinstance(tree, ast.List) else [tree]:
        if not isinstance(node, ast.Call) or node.args or any(k.arg is None for k in node.keywords):
            raise ValueError("not a list of calls with named arguments")
        arguments = {str(k.arg): ast.literal_eval(_Constants().visit(k.value)) for k in node.keywords}
        calls.append(Call(ast.unparse(node.func), arguments))
    return calls


class _Constants(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.expr:
        known = {"true": True, "false": False, "null": None}
        return ast.Constant(known[node.id]) if node.id in known else node


QUOTE = '<|"|>'


def _gemma(block: str) -> list[Call]:
    """``call:f{a:1,b:<|"|>text<|"|>}``."""
    head = re.match(r"call:([\w.-]+)(?=\{)", block)
    if not head:
        raise ValueError("no call:name{...}")
    value, end = _gemma_value(block, head.end())
    if block[end:].strip():
        raise ValueError("text behind the call")
    return [Call(head[1], value)]


def _gemma_value(text: str, at: int) -> tuple[Any, int]:
    """The value that begins at a position, and where it ends."""
    if text.startswith(QUOTE, at):
        end = text.find(QUOTE, at + len(QUOTE))
        if end < 0:
            raise ValueError("a text without an end")
        return text[at + len(QUOTE) : end], end + len(QUOTE)
    if text[at : at + 1] in ("{", "["):
        is_object = text[at] == "{"
        items: Any = {} if is_object else []
        closing, at = "}" if is_object else "]", at + 1
        while text[at : at + 1] != closing:
            if is_object:
                key = re.compile(r"([^:{}\[\],]+):").match(text, at)
                if not key:
                    raise ValueError("an argument without a name")
                items[key[1].strip().removeprefix(QUOTE).removesuffix(QUOTE)], at = _gemma_value(text, key.end())
            else:
                item, at = _gemma_value(text, at)
                items.append(item)
            if text[at : at + 1] == ",":
                at += 1
            elif text[at : at + 1] != closing:
                raise ValueError(f"{closing} is missing")
        return items, at + 1
    plain = re.compile(r"[^,{}\[\]]*").match(text, at)
    assert plain
    word = {"True": "true", "False": "false", "None": "null"}.get(plain[0].strip(), plain[0].strip())
    try:
        return json.loads(word), plain.end()
    except ValueError:
        raise ValueError(f"{word!r} is no value") from None


def _llama(text: str, is_thinking: bool) -> Reply:
    """One or several JSON objects, and nothing else, are calls; also behind <|python_tag|>."""
    body = text.strip().removeprefix("<|python_tag|>").strip()
    is_call = body.startswith("{") and '"name"' in body
    if not is_call:
        return Reply(text.strip(), "", [])
    try:
        return Reply("", "", [_named(value, "parameters", "arguments") for value in _objects(body)])
    except ValueError as error:
        return Reply("", "", [Call(_some_name(body), error=str(error))])


def _objects(text: str) -> Iterator[dict[str, Any]]:
    decoder, at = json.JSONDecoder(), 0
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON: {error}") from None
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        yield value
        at = len(text) - len(text[at:].lstrip(" ;\n"))


def _harmony(text: str, is_thinking: bool) -> Reply:
    """gpt-oss: messages of a header and a body. The recipient may stand before the channel or behind it."""
    content, reasoning, calls = [], [], []
    for message in re.split(r"<\|start\|>assistant|<\|end\|>|<\|call\|>|<\|return\|>", text):
        header, has_body, body = message.partition("<|message|>")
        to = re.search(r"to=(?:functions\.)?([\w.-]+)", header)
        if not has_body:
            if to:
                calls.append(Call(to[1], error="<|message|> is missing"))
            elif header.strip():
                content.append(header.strip())
        elif to:
            try:
                calls.append(Call(to[1], _json_object(body.strip() or "{}")))
            except ValueError as error:
                calls.append(Call(to[1], error=str(error)))
        else:
            (reasoning if "analysis" in header else content).append(body)
    return Reply("\n".join(content), "\n".join(reasoning), calls)


FAMILIES: dict[str, Parse] = {
    "Qwen and Hermes (JSON)": _tagged("<tool_call>", "</tool_call>", _hermes),
    "Qwen3.5 (XML)": _tagged("<tool_call>", "</tool_call>", _xml),
    "GLM": _tagged("<tool_call>", "</tool_call>", _glm),
    "Llama 3": _llama,
    "gpt-oss": _harmony,
    "Gemma 4": _tagged("<|tool_call>", "<tool_call|>", _gemma),
    "LFM": _tagged("<|tool_call_start|>", "<|tool_call_end|>", _python),
}


def own_template(tokenizer: PreTrainedTokenizerBase, schemas: Sequence[dict[str, Any]]) -> Callable[..., Reply] | None:
    """A parser by the tokenizer's response template: given the ids of a turn and of its prompt. None if it has none."""
    if getattr(tokenizer, "response_template", None) is None:
        return None

    def parse(ids: list[int], prompt_ids: list[int]) -> Reply:
        try:
            read: Any = tokenizer.parse_response(ids, prefix=prompt_ids, tools=list(schemas) or None)
        except (ValueError, TypeError, KeyError) as error:  # what its content parsers raise
            text = str(tokenizer.decode(ids))
            return Reply(text, "", [Call(_some_name(text), error=" ".join(str(error).split()))])
        calls = [call.get("function", call) for call in read.get("tool_calls") or []]
        reasoning = read.get("reasoning_content") or read.get("thinking") or ""
        return Reply(read.get("content") or "", reasoning, [_safely(call) for call in calls])

    return parse


def _safely(value: dict[str, Any]) -> Call:
    try:
        return _named(value, "arguments")
    except ValueError as error:
        return Call(str(value.get("name") or ""), error=str(error))
