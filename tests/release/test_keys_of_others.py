"""Every key of TRL's GRPO config and of verl's trainer has an answer (`make release-checks`)."""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from pgrpo.config.names import absent, suggest
from pgrpo.config.source import valid_keys

pytestmark = pytest.mark.release


def answered(key: str) -> bool:
    return absent(key) is not None or suggest(key, valid_keys()).startswith("here it is ")


def unanswered(keys: list[str]) -> list[str]:
    left = [key for key in keys if key not in valid_keys() and not answered(key)]
    print(f"{len(keys) - len(left)} of {len(keys)} keys have an answer")
    return left


def test_trl() -> None:
    """With what it inherits from transformers' ``TrainingArguments``."""
    from trl import GRPOConfig

    keys = [field.name for field in fields(GRPOConfig) if not field.name.startswith("_")]
    assert len(keys) > 150 and unanswered(keys) == []


def leaves(section: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in section.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        elif name != "_target_":
            yield prefix + name


def test_verl() -> None:
    spec = find_spec("verl")
    assert spec is not None and spec.submodule_search_locations
    file = Path(spec.submodule_search_locations[0]) / "trainer" / "config" / "_generated_ppo_trainer.yaml"
    keys = list(leaves(yaml.safe_load(file.read_text())))
    assert len(keys) > 600 and unanswered(keys) == []
