"""Loads a Python function by its name in a config: ``path/to/file.py:function`` or ``module:function``."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from pgrpo.config.fields import ConfigError


def is_function(name: str) -> bool:
    """Return whether ``name`` has the form ``file.py:function`` or ``module:function``."""
    module, colon, function = name.rpartition(":")
    return bool(colon and module) and function.isidentifier()


def load_function(name: str, key: str) -> Callable[..., Any]:
    """Import the function ``name``. ``key``: config key of the name, for errors. Raises ConfigError."""
    where, _, attribute = name.rpartition(":")
    is_file, path = where.endswith(".py"), Path(where).expanduser().resolve()
    if is_file and not path.is_file():
        raise ConfigError(f"{key}: no file {where}")
    # The `pgrpo` command does not search the current folder, `python -m pgrpo` does: make both find the same module.
    if not is_file and not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    try:
        module = _execute(path) if is_file else importlib.import_module(where)
    except Exception as error:
        action = f"load {where}" if is_file else f"import module `{where}`"
        raise ConfigError(f"{key}: cannot {action}: {type(error).__name__}: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        own = [k for k, v in vars(module).items() if callable(v) and getattr(v, "__module__", None) == module.__name__]
        near = difflib.get_close_matches(attribute, own, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"it has {', '.join(own) or 'no functions'}"
        raise ConfigError(f"{key}: no function `{attribute}` in {where}; {hint}")
    return function


@cache
def _execute(path: Path) -> ModuleType:
    """Execute the file once. Its functions share its globals, and it may import modules from its own folder."""
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # a .py suffix always has a loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
