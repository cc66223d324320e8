"""``${...}`` in a config: what it may be, and how long a text it may give. OmegaConf resolves it, and would in exponential time."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from pgrpo.config.schema import ConfigError

LONGEST = 2**20
"""Characters of all values together, once each ``${...}`` is replaced by what it refers to."""
MOST_CHAINED = 8
OPENING = re.compile(r"(?<!\\)(?:\\\\)*\$\{\s*([^${}:]*)([:}$]|$)")
"""``${`` without a backslash before it, the name behind it, and how that ends."""
Path = tuple[str, ...]


def check_interpolations(layers: Sequence[Any]) -> None:
    """Refuse interpolations that refer to each other until they are larger than any config, without resolving one.

    Args:
        layers: mappings that are going to be merged. A key counts with its values in all of them.
    """
    sizes: dict[Path, int] = {}
    chains: dict[Path, int] = {}

    def size(path: Path) -> int:
        """Characters of what is at ``path`` and below, and one more for each value, so that empty ones count."""
        if path not in sizes:
            sizes[path] = chains[path] = 0  # what meets itself is a circle, which OmegaConf refuses
            total = sum(value_size(value, path, where) for layer in layers for value, where in _find(layer, path))
            if path and (total > LONGEST or chains[path] > MOST_CHAINED):
                raise ConfigError(
                    f"{'.'.join(path)}: once each ${{...}} in it is replaced it has more than {LONGEST} characters, or refers to "
                    f"what refers to others more than {MOST_CHAINED} times; write it out"
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
        raise ConfigError(f"config: more than {LONGEST} characters once each ${{...}} is replaced; shorten it")


def _target(name: str, path: Path) -> Path:
    """Where ``${name}`` at ``path`` points to; leading dots go up from its parent."""
    dots = len(name) - len(name.lstrip("."))
    return (*(path[:-dots] if dots else ()), *re.findall(r"[^.\[\]\s]+", name))


def _find(layer: Any, path: Path) -> Iterator[tuple[Any, Path]]:
    """The value at ``path``, or of the interpolation on the way there, with the path of it; nothing where there is none."""
    for i, part in enumerate(path):
        if isinstance(layer, str):
            yield layer, path[:i]
            return
        try:
            layer = layer[int(part) if isinstance(layer, list) else part]
        except (LookupError, TypeError, ValueError):
            return
    yield layer, path
