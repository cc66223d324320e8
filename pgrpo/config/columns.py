"""A column of a row of the data set, or a field inside of one, by the name that a config or a template gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def value_of(row: Mapping[str, Any], name: str) -> Any:
    """The value of a column. ``a.b`` is the field ``b`` of column ``a`` (a mapping, or a list, by position), unless a column has
    that very name. Of null, every field is null.

    Raises:
        KeyError: there is none; the message says what there is.
    """
    if name in row:
        return row[name]
    value: Any = row
    seen = ""
    for field_name in name.split("."):
        if to_list := getattr(value, "tolist", None):  # of numpy
            value = to_list()
        if isinstance(value, Mapping) and field_name in value:
            value = value[field_name]
        elif isinstance(value, list | tuple) and field_name.isdecimal() and int(field_name) < len(value):
            value = value[int(field_name)]
        elif value is not None:
            there = ", ".join(map(str, value)) if isinstance(value, Mapping) else f"a {type(value).__name__}"
            raise KeyError(f"the data has no column `{name}`; {seen or 'it'} has {there}")
        seen = f"{seen}.{field_name}".strip(".")
    return value
