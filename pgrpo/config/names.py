"""Suggests the right key for one that does not exist."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import yaml


@cache
def other_trainers() -> dict[str, Any]:
    """Load ``other_trainers.yaml``; its header describes its parts."""
    return yaml.safe_load(Path(__file__).with_name("other_trainers.yaml").read_text(encoding="utf-8"))


@cache
def foreign() -> dict[str, str]:
    """Map the end of a dotted name of TRL, verl or OpenRLHF to our key, with a note if the meaning differs."""
    names = other_trainers()
    found = {end: answer for answer, ends in names["others"].items() for end in ends}
    for row in (*names["trl"], *names["verl"]):
        *first, last = row["ours"]
        answer = row.get("answer", f"{', '.join(first)} and {last}" if first else last)
        for name in row["theirs"]:
            _, slash, end = name.rpartition("/")
            if slash or end.rpartition(".")[2] != last.rpartition(".")[2]:
                found[end] = row.get("answers", {}).get(end, answer)
    return found


def absent(key: str) -> str | None:
    """What to do instead of a key of another trainer that has no counterpart here; None if there is no such answer."""
    names = other_trainers()
    if any(key == name.replace("/", ".") for row in (*names["trl"], *names["verl"]) for name in row["theirs"]):
        return None
    for row in (*names["trl_absent"], *names["verl_absent"], *names["others_absent"]):
        for name in row["theirs"]:
            if fnmatchcase(key, name) or fnmatchcase(key, f"*.{name}"):
                return row["instead"]
    return None


def is_foreign(key: str) -> bool:
    """Whether a dotted key, or its end, is another trainer's name."""
    return ".".join(key.split(".")[-2:]) in foreign() or key.rpartition(".")[2] in foreign() or bool(absent(key))


def suggest(key: str, valid: Iterable[str], *, brief: bool = False) -> str:
    """Suggest a fix for ``key``, given all valid dotted keys: it may be another trainer's name, in a wrong section, or a typo.
    ``brief``: without a list of valid keys where nothing is near."""
    valid = sorted(valid)
    parts = re.sub(r"\[\d+\]", "", key).split(".")
    last = parts[-1]
    if ours := foreign().get(".".join(parts[-2:])):
        return f"here it is {ours}"
    if instead := absent(key):
        return instead
    if (ours := ".".join(parts[-2:])) in valid and ours != key:
        return f"here it is {ours}"
    if same := [name for name in valid if name.rpartition(".")[2] == last]:
        return f"here it is {' or '.join(same)}"
    if last in foreign():
        return f"here it is {foreign()[last]}"
    if near := difflib.get_close_matches(key, [n for n in valid if n.count(".") == key.count(".")], n=1, cutoff=0.75):
        return f"did you mean {near[0]}?"
    tails = {name.rpartition(".")[2]: name for name in valid}
    if near := difflib.get_close_matches(last, tails, n=1, cutoff=0.6):
        return f"did you mean {tails[near[0]]}?"
    if brief:
        return "there is no such key, and none that is near"
    section = key.partition(".")[0]
    siblings = [name for name in valid if name.startswith(f"{section}.")] or [n for n in valid if "." not in n]
    return f"valid keys: {', '.join(siblings)}"
