"""Checks ``${...}`` in a config before OmegaConf resolves it, because nested references can take exponential time and memory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from pgrpo.config.fields import ConfigError

LONGEST = 2**20
"""Maximum number of characters of all values together after resolution."""
MOST_CHAINED = 8
"""Maximum length of a chain of references."""
OPENING = re.compile(r"(?<!\\)(?:\\\\)*\$\{\s*([^${}:]*)([:}$]|$)")
"""Matches an unescaped ``${``. Groups: the name that follows, and the character that ends it."""
Path = tuple[str, ...]


def check_interpolations(layers: Sequence[Any]) -> None:
    """Raise ConfigError if the resolved config would be too large, or uses an unsupported interpolation. Resolves nothing.

    Args:
        layers: mappings that will be merged. The values of a key in all layers are added up.
    """
    sizes: dict[Path, int] = {}
    chains: dict[Path, int] = {}

    def size(path: Path) -> int:
        """Return the characters of all values at and below ``path``, plus one for each value so that empty ones count."""
        if path not in sizes:
            sizes[path] = chains[path] = 0  # OmegaConf reports circular references
            total = sum(value_size(value, path, where) for layer in layers for value, where in _find(layer, path))
            if path and (total > LONGEST or chains[path] > MOST_CHAINED):
                raise ConfigError(
                    f"{'.'.join(path)}: with every ${{...}} resolved it has more than {LONGEST} characters, or a chain of "
                    f"more than {MOST_CHAINED} references; write the value out"
                )
            sizes[path] = total
        return sizes[path]

    def inner(path: Path, target: Path, step: int) -> int:
        total = size(target)
        chains[path] = max(chains[path], chains[target] + step)
        return total

    def value_size(value: Any, path: Path, where: Path) -> int:
        if isinstance(value, dict | list):
            names = value if isinstance(value, dict) else range(len(value))
            return 1 + sum(inner(path, (*where, str(name)), 0) for name in names)
        if not isinstance(value, str):
            return 1
        total = 1 + len(value)
        for name, end in OPENING.findall(value):
            if end == "}":
                total += inner(path, _target(name, where), 1)
            elif end == ":" and name == "oc.env":
                total += sum(len(os.environ.get(variable, "")) for variable in re.findall(r"oc\.env:\W*(\w+)", value))
            elif end and (end == "$" or name != "now"):
                raise ConfigError(
                    f"{'.'.join(path)}: ${{{name}{end}...}} is not supported, only ${{key}}, ${{oc.env:NAME}} and ${{now:FORMAT}}; "
                    "correct it, or write \\${ for a literal ${"
                )
        return total

    if size(()) > LONGEST:
        raise ConfigError(f"config: more than {LONGEST} characters with every ${{...}} resolved; shorten it")


def _target(name: str, path: Path) -> Path:
    """Return the path that ``${name}`` at ``path`` refers to. Leading dots are relative to its parent."""
    dots = len(name) - len(name.lstrip("."))
    return (*(path[:-dots] if dots else ()), *re.findall(r"[^.\[\]\s]+", name))


def _find(layer: Any, path: Path) -> Iterator[tuple[Any, Path]]:
    """Yield the value at ``path``, or the interpolation found on the way, with its path. Yield nothing if there is none."""
    for i, part in enumerate(path):
        if isinstance(layer, str):
            yield layer, path[:i]
            return
        try:
            layer = layer[int(part) if isinstance(layer, list) else part]
        except (LookupError, TypeError, ValueError):
            return
    yield layer, path
