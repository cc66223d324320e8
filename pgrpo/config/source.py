"""Reads one YAML file, mapping or ``key=value`` override strictly: known keys, right types.

The checks run before OmegaConf, which converts silently (``010`` in a text field becomes '8').
"""

from __future__ import annotations

import difflib
import math
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pgrpo.config.fields import ConfigError
from pgrpo.config.names import is_foreign, suggest
from pgrpo.config.schema import Config
from pgrpo.config.strict_yaml import Marks, at, one_line, parse

KINDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "a mapping",
    list: "a list",
}


@dataclass
class Source:
    """Raw values and their positions in a file.

    Attributes:
        values: the mapping as written, with unresolved interpolations.
        name: name for errors: a file name, or an override in quotes. Empty for a Python mapping.
        folder: base of the relative paths in ``values``.
        marks: dotted key -> its line, and the text of its scalar (None for a mapping or list).
    """

    values: dict[str, Any]
    name: str
    folder: Path
    marks: Marks = field(default_factory=dict)

    def where(self, key: str) -> str:
        """Return 'FILE:LINE: ' of a key, or the part that is known."""
        if not self.name:
            return ""
        return f"{at(self.name, self.marks[key][0]) if key in self.marks else self.name}: "

    def text(self, key: str, value: Any) -> str:
        """Return the scalar as written."""
        text = self.marks.get(key, (0, None))[1]
        return repr(value) if text is None else text

    def error(self, key: str, message: str) -> ConfigError:
        """Make a ConfigError with the key's position, the key and the message."""
        return ConfigError(f"{self.where(key)}{key}: {message}")


def read_file(path: Path) -> Source:
    """Read and check a YAML file. ConfigError unless it is a mapping of known keys with values of the right types."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read as UTF-8 text ({error}); save it again or name another file"
        ) from error
    marks, values = parse(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: the file holds {_kind(values)}, not a mapping; write lines of `key: value`")
    source = Source(values, str(path), path.resolve().parent, marks)
    _refuse_unknown_keys(source)
    check_types(values, Config, "", source)
    return source


def read_mapping(mapping: Mapping[str, Any]) -> Source:
    """Check a Python mapping, as ``read_file`` does."""
    try:
        values = OmegaConf.to_container(OmegaConf.create(dict(mapping)))
    except (OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(f"config: {one_line(error)}; use plain values, and \\${{ for a literal ${{") from error
    assert isinstance(values, dict)
    source = Source({str(name): value for name, value in values.items()}, "", Path.cwd())
    _refuse_unknown_keys(source)
    check_types(source.values, Config, "", source)
    return source


def read_override(override: str) -> tuple[str, Any]:
    """Parse ``key=value``; return the key and the checked value."""
    key, equals, text = override.partition("=")
    if not equals or not text or not re.fullmatch(r"\w+((\.\w+)|(\[\d+\]))*", key):
        hydra = ", without Hydra's + or ~" if override.startswith(("+", "~")) else ""
        raise ConfigError(
            f"override {override!r}: write key=value (key=null for none){hydra}, such as rollout.group_size=8"
        )
    name = f"override {override!r}"
    marks, value = parse(text, name, key)
    hint: Any = Config
    for part in re.findall(r"\w+", key):
        hint = _without_none(hint)
        if is_dataclass(hint) and part in hints(hint):
            hint = hints(hint)[part]
        elif get_origin(hint) is list and part.isdigit():
            hint = get_args(hint)[0]
        elif get_origin(hint) is dict or hint is Any:
            hint = Any
        else:
            raise ConfigError(f"{name}: no such key; {suggest(key, valid_keys())}")
    check_types(value, hint, key, Source({}, name, Path.cwd(), marks))
    return key, value


def _refuse_unknown_keys(source: Source) -> None:
    """Raise one ConfigError for all keys that the schema does not have: a file of another trainer has many."""
    unknown = list(_unknown_keys(source.values, Config, ""))
    if len(unknown) == 1:
        raise source.error(unknown[0], f"no such key; {suggest(unknown[0], valid_keys())}")
    if unknown:
        lines = [f"  {source.where(key)}{key}: {suggest(key, valid_keys(), brief=True)}" for key in unknown]
        raise ConfigError(f"{len(unknown)} keys are not pgrpo's:", *lines)


def _unknown_keys(values: Any, hint: Any, key: str) -> Iterator[str]:
    """Dotted keys that the schema does not have. Of an unknown section, the keys in it if another trainer has one of them."""
    hint = _without_none(hint)
    if get_origin(hint) is list and isinstance(values, list):
        for i, item in enumerate(values):
            yield from _unknown_keys(item, get_args(hint)[0], f"{key}[{i}]")
    if not is_dataclass(hint) or not isinstance(values, dict):
        return
    for name, item in values.items():
        inner = f"{key}.{name}" if key else str(name)
        if name in hints(hint):
            yield from _unknown_keys(item, hints(hint)[name], inner)
        else:
            ends = list(_ends(item, inner))
            is_listed = any(map(is_foreign, ends)) and not _is_misspelt(str(name), item, hints(hint))
            yield from ends if is_listed else [inner]


def _is_misspelt(name: str, value: Any, known: dict[str, Any]) -> bool:
    """Whether an unknown section is a known one with a typo in its name. verl's ``trainer`` is no ``train``, which has none of
    its keys."""
    if not isinstance(value, dict):
        return False
    for near in difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.75):
        section = _without_none(known[near])
        keys = hints(section) if is_dataclass(section) else value if get_origin(section) is dict else ()
        return 2 * sum(key in keys for key in value) >= len(value)
    return False


def _ends(value: Any, key: str) -> Iterator[str]:
    """The keys in a section of another trainer. The section itself where it has an answer that is theirs too, or if they have
    none."""
    items = value.items() if isinstance(value, dict) else ()
    inner = [end for name, item in items for end in _ends(item, f"{key}.{name}")]
    if is_foreign(key):
        answers = {end: suggest(end, valid_keys(), brief=True) for end in inner}
        known = all(is_foreign(end) or answer.startswith("here it is ") for end, answer in answers.items())
        inner = inner if known and {*answers.values()} - {suggest(key, valid_keys(), brief=True)} else []
    yield from inner or [key]


def check_types(value: Any, hint: Any, key: str, source: Source) -> None:
    """Raise ConfigError unless ``value`` has the type ``hint`` of the schema. Only an int is accepted for another type, a float."""
    if value is None and hint is not _without_none(hint):
        return
    hint = _without_none(hint)
    origin = get_origin(hint)
    if (is_dataclass(hint) or origin is dict) and not isinstance(value, dict):
        raise source.error(key, _wrong(value, dict, key, source))
    if origin in (list, tuple) and not isinstance(value, list | tuple):
        raise source.error(key, _wrong(value, list, key, source))
    if hint is Any or origin is dict:
        _check_keys(value, key, source)
    elif is_dataclass(hint) and isinstance(value, dict):
        for name, item in value.items():
            inner = f"{key}.{name}" if key else str(name)
            if name not in hints(hint):
                raise source.error(inner, f"no such key; {suggest(inner, valid_keys())}")
            check_types(item, hints(hint)[name], inner, source)
    elif isinstance(value, list | tuple) and origin in (list, tuple):
        items = get_args(hint) if origin is tuple else get_args(hint) * len(value)
        if len(items) != len(value):
            raise source.error(key, f"{list(value)} has {len(value)} items; give {len(items)}")
        for i, item in enumerate(value):
            check_types(item, items[i], f"{key}[{i}]", source)
    elif isinstance(value, str) and ("${" in value or value == MISSING):
        return  # checked after the merge
    elif origin is Literal:
        if value not in get_args(hint) or isinstance(value, bool):
            options = ", ".join(get_args(hint))
            raise source.error(key, f"{source.text(key, value)} is not a choice; it may be {options}")
    elif type(value) is not hint and not (hint is float and _fits_float(value)):
        raise source.error(key, _wrong(value, hint, key, source))
    elif hint is float:
        _check_finite(value, key, source)
    elif hint is int and (text := source.text(key, value)).lstrip("+").replace("_", "") != str(value):
        raise source.error(key, f"{text} reads as the number {value}; write {key}: {value} if that is meant")


def _check_finite(value: Any, key: str, source: Source) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise source.error(key, f"{source.text(key, value)} is not a finite number; give a finite one")


def _check_keys(value: Any, key: str, source: Source) -> None:
    _check_finite(value, key, source)
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        if isinstance(value, dict) and not isinstance(name, str):
            raise source.error(key, f"its key {name!r} is {_kind(name)}, not text; put the key in quotes")
        _check_keys(item, f"{key}.{name}" if isinstance(value, dict) else f"{key}[{name}]", source)


def _wrong(value: Any, expected: Any, key: str, source: Source) -> str:
    """Describe a value of another type than ``expected``, and the fix."""
    text = source.text(key, value)
    if value is None:
        return f"null is not a value here; give {KINDS[expected]}, or leave the key out"
    if expected is str and isinstance(value, int | float):
        quoted = f"'{key}=\"{text}\"'" if source.name.startswith("override") else f'{key.rpartition(".")[2]}: "{text}"'
        return f"{text} reads as {value!r}, {_kind(value)}, not text; quote it: {quoted}"
    fix = f"write {KINDS[expected]}" if expected is not str else "put the text in quotes"
    if isinstance(value, str) and (expected is list or (expected is dict and key.startswith("rewards.functions["))):
        item = f"{{function: {text}}}" if key.startswith("rewards.functions") else text
        fix = f"write [{item}]" if expected is list else f"write {item}"
    if expected in (int, float) and isinstance(value, str) and re.fullmatch(r"[-+\d.eE]+", value):
        fix = f"write it without quotes: {value}"
    return f"{text} is {_kind(value)}, not {KINDS[expected]}; {fix}"


def _kind(value: Any) -> str:
    return "nothing" if value is None else KINDS.get(type(value), f"a {type(value).__name__}")


def _fits_float(value: Any) -> bool:
    return type(value) is int and abs(value) < 1 << 1000


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (types.UnionType, Union):
        return next(option for option in get_args(hint) if option is not type(None))
    return hint


@cache
def hints(schema: Any) -> dict[str, Any]:
    """Return the types of a section's keys."""
    return {name: hint for name, hint in get_type_hints(schema).items() if name != "secret_keys"}


@cache
def valid_keys() -> tuple[str, ...]:
    """Return every dotted key of the schema (``rewards.functions[i].weight``)."""

    def walk(schema: Any, prefix: str) -> Iterator[str]:
        for name, hint in hints(schema).items():
            yield prefix + name
            inner = _without_none(hint)
            if get_origin(inner) is list:
                inner, name = get_args(inner)[0], f"{name}[i]"
            if is_dataclass(inner):
                yield from walk(inner, f"{prefix}{name}.")

    return tuple(walk(Config, ""))
