"""Keeps secrets out of what this process prints and logs. ``to_yaml`` keeps them out of a config that is written."""

from __future__ import annotations

import os
import re
from typing import Any

from pgrpo.config.rules import REDACTED, leaves

NAMES = re.compile(r"(^|_)(api_?key|access_?key|secret|token|password|passwd|credentials?)$", re.IGNORECASE)
"""Keys whose value is a secret wherever it came from."""
PATHS = ("run_dir", "model.path", "data.path", "data.eval_path")
"""Messages must be able to name these, and a variable that they are made of."""
SHORTEST = 6
"""Characters of a secret: shorter ones would be found in half of all words."""
_secrets: set[str] = set()


def remember(raw: Any, resolved: Any) -> None:
    """Note the secrets of a config: variables of the environment that it refers to, and what a key's name says is one.

    Args:
        raw: the merged config, not resolved.
        resolved: the same, resolved.
    """
    found: set[str] = set()
    for key, value in leaves(raw):
        if isinstance(value, str) and key not in PATHS:
            found |= {os.environ.get(name.strip(), "") for name in re.findall(r"oc\.env:([^,}]+)", value)}
    found |= {
        v for k, v in leaves(resolved) if isinstance(v, str) and NAMES.search(k.rpartition(".")[2].partition("[")[0])
    }
    _secrets.update(secret for secret in found if len(secret) >= SHORTEST)


def redact(text: str) -> str:
    """The text without any secret that a config of this process had."""
    for secret in sorted(_secrets, key=len, reverse=True):
        text = text.replace(secret, REDACTED)
    return text
