"""Reads JSON of a checkpoint and checks its form. An error names the damaged field."""

from __future__ import annotations

import json
from typing import Any

COUNT = range(2**63)
"""Form of a count: a whole number from 0."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or is damaged. The message names the file."""


def parse(text: str, form: Any, where: object) -> Any:
    """Parse JSON text and check its form (see ``check``). CheckpointError: it is not JSON, or has another form."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not JSON ({type(error).__name__}: {error})") from error
    check(value, form, where)
    return value


def check(value: Any, form: Any, where: object) -> None:
    """Raise CheckpointError, with the name of the first wrong field, if a JSON value does not have the form.

    Args:
        form: a type (``float`` takes whole numbers too); a range of whole numbers; ``[form]``: a list of these; ``(form,)``: this,
            or null; ``{key: form}``: an object with at least these keys; ``{str: form}``: an object with any keys.
    """
    if isinstance(form, tuple):
        if value is not None:
            check(value, form[0], where)
    elif isinstance(form, range):
        if type(value) is not int or value not in form:
            raise CheckpointError(f"{where}: must be a whole number from 0, not {value!r:.60}")
    elif isinstance(form, list):
        check(value, list, where)
        for i, item in enumerate(value):
            check(item, form[0], f"{where}[{i}]")
    elif isinstance(form, dict):
        check(value, dict, where)
        inner = dict.fromkeys(value, form[str]) if str in form else form
        for key, own in inner.items():
            if key not in value:
                raise CheckpointError(f"{where}: lacks {key}")
            check(value[key], own, f"{where}: {key}")
    elif type(value) not in ((int, float) if form is float else (form,)):
        raise CheckpointError(f"{where}: must be {form.__name__}, not {value!r:.60}")
