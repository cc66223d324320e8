"""YAML text to values with the lines that they stand on. Refuses what YAML reads otherwise than its author meant."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from pgrpo.config.fields import ConfigError
from pgrpo.config.secrets import redact

DEEPEST, MOST_VALUES, MOST_CHARACTERS = 50, 10_000, 2**18
"""Limits of one file or override: nesting depth, keys and values, characters."""
Marks = dict[str, tuple[int, str | None]]
"""Dotted key -> its line, and the text of its scalar (None for a mapping or list)."""


class _Loader(yaml.SafeLoader):
    """YAML loader that reads 1e-6 as a number and a date as text. While it reads, it rejects anchors, tags, and nesting or sizes
    that would exhaust time or memory."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self._name, self._depth, self._count = name, 0, 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()
        place = at(self._name, event.start_mark.line + 1)
        if event.anchor:
            raise ConfigError(
                f"{place}: anchor {event.anchor!r} is not supported; write ${{other.key}} to refer to a key"
            )
        if tag := getattr(event, "tag", None):
            raise ConfigError(f"{place}: tag {tag.replace('tag:yaml.org,2002:', '!!')!r} is not supported; remove it")
        self._depth += 1
        self._count += 1
        if self._depth > DEEPEST:
            raise ConfigError(f"{place}: nested too deeply; remove some brackets")
        if self._count > MOST_VALUES:
            raise ConfigError(f"{place}: more than {MOST_VALUES} keys and values; move data into the data set")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":timestamp", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(\d[\d_]*\.[\d_]*(e[-+]?\d+)?|\d[\d_]*e[-+]?\d+|\.\d[\d_]*(e[-+]?\d+)?"
        r"|\d[\d_]*(:[0-5]?\d)+\.[\d_]*|\.inf)$|\.nan$",
        re.IGNORECASE | re.ASCII,
    ),
    list("-+0123456789."),
)


def parse(text: str, name: str, key: str = "") -> tuple[Marks, Any]:
    """Parse YAML text into (marks, value). ConfigError for duplicate keys, tags, anchors and second documents."""
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(f"{name}: longer than {MOST_CHARACTERS} characters; move data into the data set")
    try:
        loader = _Loader(text, name)
        root = loader.get_single_node()
        marks = dict(_marks(root, root.start_mark.line + 1, key, name)) if root else {}
        return marks, loader.construct_document(root) if root else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = at(name, mark.line + 1) if mark else name
        problem = getattr(error, "problem", None) or one_line(error)
        is_open = "<stream end>" in problem or "unexpected end of stream" in problem
        fix = "indent with spaces" if "'\\t'" in problem else "close what is open" if is_open else "quote text"
        raise ConfigError(f"{place}: not YAML: {problem}; {fix}") from error
    except ValueError as error:  # a number of thousands of digits
        raise ConfigError(f"{name}: {one_line(error)}; write a shorter number") from error


def _marks(node: yaml.Node, line: int, key: str, name: str) -> Iterator[tuple[str, tuple[int, str | None]]]:
    yield key, (line, node.value if isinstance(node, yaml.ScalarNode) else None)
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            yield from _marks(item, item.start_mark.line + 1, f"{key}[{i}]", name)
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key_node, item in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{at(name, line)}: a key is {key_node.id}, not text; put the key in quotes")
            inner = f"{key}.{key_node.value}" if key else key_node.value
            if inner in first:
                place = at(name, line)
                raise ConfigError(f"{place}: {inner}: duplicate key, first on line {first[inner]}; remove one of them")
            first[inner] = line
            yield from _marks(item, line, inner, name)


def at(name: str, line: int) -> str:
    """A place for errors: FILE:LINE, or an override's name, which has one line."""
    return name if name.startswith("override") else f"{name}:{line}"


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none. Redact before the split, because a secret may span
    several lines."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return (redact(str(error)).strip().splitlines() or [type(error).__name__])[0]
