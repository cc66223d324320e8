"""What fields of the schema are made with, and the error of a wrong value."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from pgrpo.config.secrets import redact


class ConfigError(Exception):
    """The user's input is wrong. The message is one line that names the key, the value and the fix (exit code 2). Several arguments
    are as many lines: ``ConfigError("4 keys are not pgrpo's:", "c.yaml:3: ...", ...)``."""

    def __str__(self) -> str:
        return "\n".join(self._line(str(line)) for line in self.args)

    @staticmethod
    def _line(text: str) -> str:
        said = redact(text)  # before escaping and cutting, which would leave parts of a secret
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in said)
        # Cut out the middle: a very long value would hide the key before it and the fix after it.
        return text if len(text) <= 1000 else f"{text[:600]} [...] {text[-300:]}"


MOST_TOKENS, MOST_STEPS, MOST_SECONDS = 2**20, 10**9, 1e7
PYTHON = "(python)"
"""Stands for rows, tools and environments that the caller passes: in `data.path`, `tools` and `environment.factory`."""


def number(default: Any, *, least: float | None = None, above: float | None = None, most: float) -> Any:
    """Make a field for a number in [``least``, ``most``], or (``above``, ``most``]. ``most`` is above every sensible value, but low
    enough not to exhaust memory or time."""
    return field(default=default, metadata={"least": least, "above": above, "most": most})
