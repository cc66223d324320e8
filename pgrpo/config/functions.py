"""Find a Python function by its name in a config: ``path/to/file.py:function`` or ``module:function``."""

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

from pgrpo.config import ConfigError


def is_function(name: str) -> bool:
    """Whether ``name`` has the form of a Python function (``file.py:function``, ``module:function``)."""
    module, colon, function = name.rpartition(":")
    return bool(colon and module) and function.isidentifier()


def load_function(name: str, key: str) -> Callable[..., Any]:
    """The function called ``name``. ``key`` is the config key that holds the name, for errors (``ConfigError``)."""
    where, _, attribute = name.rpartition(":")
    module = _load_file(where, key) if where.endswith(".py") else _load_module(where, key)
    function = getattr(module, attribute, None)
    if not callable(function):
        own = [k for k, v in vars(module).items() if callable(v) and getattr(v, "__module__", None) == module.__name__]
        near = difflib.get_close_matches(attribute, own, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"it has {', '.join(own) or 'no functions'}"
        raise ConfigError(f"{key}: no function `{attribute}` in {where}; {hint}")
    return function


def _load_module(name: str, key: str) -> ModuleType:
    # The `pgrpo` command does not search the current folder, `python -m pgrpo` does: make both find the same module.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ConfigError(f"{key}: cannot import module `{name}`: {type(error).__name__}: {error}") from error


def _load_file(name: str, key: str) -> ModuleType:
    path = Path(name).expanduser().resolve()
    if not path.is_file():
        raise ConfigError(f"{key}: no file {name}")
    try:
        return _execute(path)
    except Exception as error:
        raise ConfigError(f"{key}: cannot load {name}: {type(error).__name__}: {error}") from error


@cache
def _execute(path: Path) -> ModuleType:
    """Run the file once; functions of one file share its globals, and it may import what lies beside it."""
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # a .py suffix always has a loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
