"""docs/: config.md is what the schema says, and the two guides name keys that exist and agree with the answers to a wrong key."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

from pgrpo.config.presets import PRESETS
from pgrpo.config.source import valid_keys

ROOT = Path(__file__).resolve().parents[2]
CONFIG_DOCS = runpy.run_path(str(ROOT / "scripts" / "config_docs.py"))


def test_config_md_is_what_the_generator_gives() -> None:
    written = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert written == CONFIG_DOCS["markdown"](), "run python scripts/config_docs.py"


def test_config_md_has_every_key_once_in_order() -> None:
    text = CONFIG_DOCS["markdown"]()
    keys = re.findall(r"^\| `([^`]+)` \| .* \| .* \| .+ \|$", text.replace("\\|", ""), re.MULTILINE)
    sections = {key.partition(".")[0] for key in valid_keys() if "." in key}
    listed = [key for key in keys if key.partition(".")[0] in sections or "." not in key]
    leaves = [key for key in valid_keys() if key not in sections]
    assert sorted(set(listed)) == sorted(leaves)
    order = {key: i for i, key in enumerate(dict.fromkeys(listed))}
    for section in sections:
        assert sorted((k for k in leaves if k.startswith(f"{section}.")), key=order.__getitem__) == [
            k for k in leaves if k.startswith(f"{section}.")
        ]
    assert all(f"`{preset}`" in text for preset in PRESETS)
