"""Keeps secrets out of what this process prints and logs. ``to_yaml`` keeps them out of a config that is written.

Values are redacted before they are serialised (``redact``, ``to_json``): a secret that JSON or YAML escapes would not be found in
their text, and digits of a secret may be digits of a number. Log lines and tracebacks are text already: ``redact`` finds a
secret in them as Python, JSON, HTML and URLs spell it.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar
from urllib.parse import quote, quote_plus

from omegaconf import Node
from omegaconf.resolvers import oc

T = TypeVar("T")
REDACTED = "(redacted)"
PATHS = ("run_dir", "model.path", "data.path", "data.eval_path")
"""Messages must be able to name these, and a variable that they are made of."""
SHORTEST = 6
"""Characters of a secret: shorter ones would be found in half of all words."""
_spellings: list[str] = []
_ESCAPES = (
    lambda text: json.dumps(text)[1:-1],
    lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    lambda text: repr(text)[1:-1],
    lambda text: repr(text + "'\"")[1:-4],  # inside a longer text that has both kinds of quotes
    lambda text: text.encode("unicode_escape").decode(),
    html.escape,
    lambda text: quote(text, errors="surrogatepass"),
    lambda text: quote(text, safe="", errors="surrogatepass"),
    lambda text: quote_plus(text, errors="surrogatepass"),
)


def environment(name: str, *default: Any, _node_: Node) -> Any:
    """OmegaConf's ``${oc.env:NAME}`` or ``${oc.env:NAME,DEFAULT}``, which remembers what it reads. As a resolver it sees each
    variable however the name is written, and before the value can appear in an error about its type."""
    if name in os.environ and _node_._get_full_key("") not in PATHS:
        remember(os.environ[name])
    return oc.env(name, *default)


def is_named(key: str) -> bool:
    """Whether the last name of a dotted key says that its value is a secret, wherever it came from."""
    name = key.rpartition(".")[2].partition("[")[0]
    return re.search(r"(?i)(^|_)(api_?key|access_?key|secret|token|password|passwd|credentials?)$", name) is not None


def remember(secret: str) -> None:
    """Redact this text from now on, unless it is shorter than ``SHORTEST``."""
    if len(secret) < SHORTEST:
        return
    spellings = {secret}
    for _ in range(2):  # twice: a JSON text inside a repr
        spellings |= {spell(text) for text in spellings for spell in _ESCAPES}
    _spellings[:] = sorted(spellings.union(_spellings), key=len, reverse=True)


def redact(value: T) -> T:
    """A text, or every text in dicts (keys too), lists, tuples and dataclasses (which become dicts), without the secrets of this
    process's configs. Numbers stay as they are."""
    if isinstance(value, str):
        text: Any = value
        for spelling in _spellings:
            text = text.replace(spelling, REDACTED)
        return text
    if is_dataclass(value):
        return redact({field.name: getattr(value, field.name) for field in fields(value)})  # pyright: ignore[reportReturnType]
    if isinstance(value, Mapping):
        items: Any = {redact(key) if isinstance(key, str) else key: redact(item) for key, item in value.items()}
        return items
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]  # pyright: ignore[reportReturnType]
    return value


def to_json(value: Any, **options: Any) -> str:
    """``json.dumps``, redacted; what JSON has no type for becomes its text."""
    return json.dumps(redact(value), default=lambda other: redact(str(other)), **options)
