"""Write docs/config.md (every key of the schema with its type, range, default and description, and the presets),
pgrpo/config/schema.json (the same for editors), and the tables of keys in docs/from_trl.md and docs/from_verl.md, from
pgrpo/config/other_trainers.yaml.

python scripts/config_docs.py           # writes docs/config.md, schema.json and the tables
python scripts/config_docs.py --print   # prints docs/config.md
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from pgrpo.config import schema
from pgrpo.config.load import RECIPE_ROLLOUT
from pgrpo.config.names import other_trainers
from pgrpo.config.presets import PRESETS
from pgrpo.config.source import hints

GUIDES = {"from_trl.md": "TRL", "from_verl.md": "verl"}
LIMITS = ("least", "above", "most")
FILE = Path(__file__).resolve().parents[1] / "docs" / "config.md"
SCHEMA = FILE.parents[1] / "pgrpo" / "config" / "schema.json"
INTRO = """\
# Configuration

Every key of a pgrpo YAML (`pgrpo/config/schema.py`, `task.py`). This file is generated: `python scripts/config_docs.py`.

Values come from the defaults below, then `loss.preset`, then the recipe (which may set `data`, `prompt`, `rewards`, and of
`rollout` {recipe_rollout}), then the config file, then `key=value` on the command line;
the later ones win. Unknown keys, wrong types and keys that contradict each other are errors. `pgrpo train --config FILE --dry-run`
prints what came out. `None` in a text is `null` in a YAML.
"""


def texts(section: type) -> dict[str, str]:
    """Field -> its description (the string literal below it), on one line."""
    body = ast.parse(inspect.getsource(section)).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node, following in zip(body.body, body.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(following, ast.Expr):
            assert isinstance(node.target, ast.Name) and isinstance(following.value, ast.Constant)
            found[node.target.id] = " ".join(str(following.value.value).split())
    return found


def kind(hint: Any) -> str:
    """Name of a type for a reader of YAML."""
    options = get_args(hint)
    if type(None) in options:
        return f"{' or '.join(kind(option) for option in options if option is not type(None))}, or `null`"
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in options)
    if get_origin(hint) is list:
        return f"list of {'mappings' if is_dataclass(options[0]) else 'texts'}"
    if get_origin(hint) is tuple:
        return "two numbers"
    return {Any: "text or mapping", str: "text", int: "whole number", float: "number", bool: "`true` or `false`"}.get(
        hint, "mapping"
    )


def limits(field: Field[Any]) -> str:
    """`, 1 to 65536` or `, above 0, at most 1`; nothing for what has no range."""
    if "most" not in field.metadata:
        return ""
    least, above, most = (
        re.sub(r"(?<=1)0{6,}$", lambda m: f"e{len(m[0])}", f"{field.metadata[n] or 0:.0f}") for n in LIMITS
    )
    return f", above {above}, at most {most}" if field.metadata["least"] is None else f", {least} to {most}"


def default(field: Field[Any]) -> str:
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    return "required" if value == "???" else f"`{literal(value)}`"


def literal(value: Any) -> str:
    """A value on one line of YAML."""
    value = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")


def rows(section: type, prefix: str) -> Iterator[str]:
    """A table row for each key. The keys of a list of mappings follow the key of the list."""
    text = texts(section)
    for field in fields(section):
        hint = hints(section).get(field.name)
        if hint is None or is_dataclass(hint):
            if hint is not None and prefix:  # a section of a section; those at the top have tables of their own
                yield from rows(hint, f"{prefix}{field.name}.")  # pyright: ignore[reportArgumentType]
            continue
        words = re.sub(r"`+", "`", text[field.name]).replace("|", r"\|")
        yield f"| `{prefix}{field.name}` | {kind(hint)}{limits(field)} | {default(field)} | {words} |"
        if get_origin(hint) is list and is_dataclass(item := get_args(hint)[0]):
            yield from rows(item, f"{prefix}{field.name}[i].")  # pyright: ignore[reportArgumentType]


def table(section: type, prefix: str) -> str:
    return "\n".join(["| key | type | default | what |", "|---|---|---|---|", *rows(section, prefix)])


def presets() -> str:
    """Table of the values that each preset sets, with the defaults. All presets set the same keys."""
    keys = list(next(iter(PRESETS.values())))
    columns = [{field.name: field.default for field in fields(schema.LossConfig)}, *PRESETS.values()]
    assert all(list(preset) == keys for preset in PRESETS.values())
    lines = [f"| key | default | {' | '.join(f'`{name}`' for name in PRESETS)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| `loss.{key}` | {' | '.join(f'`{literal(column[key])}`' for column in columns)} |" for key in keys]
    return "\n".join(lines)


def markdown() -> str:
    parts = [INTRO.format(recipe_rollout=", ".join(f"`{key}`" for key in RECIPE_ROLLOUT))]
    parts += [f"## At the top\n\n{table(schema.Config, '')}\n"]
    for name, hint in hints(schema.Config).items():
        if is_dataclass(hint):
            assert isinstance(hint, type)
            parts.append(f"## {name}\n\n{table(hint, f'{name}.')}\n")
            if name == "loss":
                parts.append(f"### Presets\n\nWhat `loss.preset` sets; a key that you set wins.\n\n{presets()}\n")
    return "\n".join(parts)


def json_schema() -> str:
    """The JSON schema of a config, and of a recipe, which has a part of its keys."""
    about = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "A config or recipe of pgrpo"}
    return json.dumps(about | mapping(schema.Config), indent=1) + "\n"


def mapping(section: type) -> dict[str, Any]:
    text, keys = texts(section), hints(section)
    properties = {
        field.name: value_schema(keys[field.name], field)
        | ({"description": text[field.name]} if field.name in text else {})
        for field in fields(section)
        if field.name in keys
    }
    return {"type": "object", "additionalProperties": False, "properties": properties}


def value_schema(hint: Any, field: Field[Any]) -> dict[str, Any]:
    """Schema of a value of this type. Any scalar may also be a reference such as `${oc.env:HOME}`."""
    options = get_args(hint)
    if get_origin(hint) in (UnionType, Union):
        schemas = [{"type": "null"} if option is type(None) else value_schema(option, field) for option in options]
        return {"anyOf": [one for inner in schemas for one in inner.get("anyOf", [inner])]}
    if is_dataclass(hint):
        return mapping(hint)  # pyright: ignore[reportArgumentType]
    if get_origin(hint) in (list, tuple):
        size = {"minItems": len(options), "maxItems": len(options)} if get_origin(hint) is tuple else {}
        return {"type": "array", "items": value_schema(options[0], field), **size}
    if get_origin(hint) is Literal:
        plain: dict[str, Any] = {"enum": list(options)}
    elif kind := {str: "string", int: "integer", float: "number", bool: "boolean"}.get(hint):
        names = {"least": "minimum", "above": "exclusiveMinimum", "most": "maximum"}
        limits = {names[n]: limit for n in LIMITS if (limit := field.metadata.get(n)) is not None}
        plain = {"type": kind, **limits}
    else:
        return {} if hint is Any else {"type": "object"}
    return plain if hint is str else {"anyOf": [plain, {"type": "string", "pattern": r"\$\{"}]}


def with_key_table(guide: str, trainer: str) -> str:
    """The text of a guide with its tables of keys, those that have a counterpart and the others, as ``other_trainers.yaml`` has
    them."""

    def cell(names: list[str]) -> str:
        return ", ".join(f"`{name.replace('/', '.')}`" for name in names)

    rows, others = (other_trainers()[f"{trainer.lower()}{end}"] for end in ("", "_absent"))
    tables = {
        f"| {trainer} | pgrpo | what differs |\n|---|---|---|\n": [
            f"| {cell(row['theirs'])} | {cell(row['ours'])} | {row.get('differs', '')} |\n" for row in rows
        ],
        f"| {trainer} | what to do |\n|---|---|\n": [
            f"| {cell(row['theirs'])} | {row['instead']} |\n" for row in others
        ],
    }
    for head, lines in tables.items():
        table = re.sub(" +", " ", "".join(lines))
        guide, count = re.subn(rf"(?<={re.escape(head)})(\|.*\n)+", lambda _, table=table: table, guide)
        assert count == 1, f"the guide has no table of {trainer}'s keys that begins with {head!r}"
    return guide


if __name__ == "__main__":
    if "--print" in sys.argv[1:]:
        print(markdown(), end="")
    else:
        FILE.write_text(markdown(), encoding="utf-8")
        SCHEMA.write_text(json_schema(), encoding="utf-8")
        print(f"wrote {FILE} and {SCHEMA}")
        for guide, trainer in GUIDES.items():
            path = FILE.with_name(guide)
            path.write_text(with_key_table(path.read_text(encoding="utf-8"), trainer), encoding="utf-8")
            print(f"wrote the table of keys in {path}")
