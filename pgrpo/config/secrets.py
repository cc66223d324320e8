"""Redacts secrets in everything that this process prints and logs. (``to_yaml`` redacts them in a written config.)

Values are redacted before serialisation (``redact``, ``to_json``): JSON and YAML may escape a secret so that a text search misses
it, and a number may contain the digits of a secret. Log lines and tracebacks are text already, so ``redact`` also searches for
each secret as Python, JSON, HTML and URLs escape it.
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
"""Keys whose values are never secret, because messages must show them, even if they come from the environment."""
SHORTEST = 6
"""Minimum length of a secret in characters. Shorter ones would match ordinary words."""
_spellings: list[str] = []
_ESCAPES = (
    lambda text: json.dumps(text)[1:-1],
    lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    lambda text: repr(text)[1:-1],
    lambda text: repr(text + "'\"")[1:-4],  # as part of a text that contains both kinds of quotes
    lambda text: text.encode("unicode_escape").decode(),
    lambda text: repr(text.encode(errors="surrogatepass"))[2:-1],
    html.escape,
    lambda text: quote(text, errors="surrogatepass"),
    lambda text: quote(text, safe="", errors="surrogatepass"),
    lambda text: quote_plus(text, errors="surrogatepass"),
)


def environment(name: str, *default: Any, _node_: Node) -> Any:
    """Resolve ``${oc.env:NAME}`` or ``${oc.env:NAME,DEFAULT}`` as OmegaConf does, and remember the value as a secret. A resolver
    sees every variable, however its name is written, before the value can appear in a type error."""
    if name in os.environ and _node_._get_full_key("") not in PATHS:
        remember(os.environ[name])
    return oc.env(name, *default)


def is_named(key: str) -> bool:
    """Return whether the last part of a dotted key names a secret (``api_key``, ``token``, ...)."""
    name = key.rpartition(".")[2].partition("[")[0]
    return re.search(r"(?i)(^|_)(api_?key|access_?key|secret|token|password|passwd|credentials?)$", name) is not None


def remember(secret: str) -> None:
    """Redact this text from now on, unless it is shorter than ``SHORTEST``."""
    if len(secret) < SHORTEST:
        return
    spellings = {secret}
    for _ in range(2):  # twice, for JSON text inside a repr
        spellings |= {spell(text) for text in spellings for spell in _ESCAPES}
    _spellings[:] = sorted(spellings.union(_spellings), key=len, reverse=True)


def redact(value: T) -> T:
    """Remove the remembered secrets from a text, or from all texts in dicts (keys too), lists, tuples and dataclasses (which
    become dicts). Numbers are unchanged."""
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


def redact_error(error: BaseException) -> None:
    """Remove the remembered secrets from an exception's arguments and notes, and from those of its causes."""
    seen: set[int] = set()
    chain: list[BaseException | None] = [error]
    while chain:
        if (one := chain.pop()) is not None and id(one) not in seen:
            seen.add(id(one))
            one.args = tuple(redact(list(one.args)))
            if hasattr(one, "__notes__"):
                one.__notes__ = redact(one.__notes__)
            chain += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]


def to_json(value: Any, **options: Any) -> str:
    """``json.dumps`` of the redacted value. Types that JSON lacks are converted with ``str``."""
    return json.dumps(redact(value), default=lambda other: redact(str(other)), **options)
