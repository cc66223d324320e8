"""What a function says of itself, as plain data: a worker process sends it, and the trainer makes the schema of a tool from it
without the user's code."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from enum import Enum
from functools import reduce
from operator import or_
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

OWN = ("reset", "get_reward", "get_turn_rewards", "converse", "tool_schemas", "close")
"""Methods of an environment that pgrpo calls, and the model does not."""
PLAIN = {
    "int": int, "float": float, "str": str, "bool": bool, "list": list, "dict": dict, "tuple": tuple, "set": set, "Any": Any,
    "None": type(None), "...": ...,
}  # fmt: skip


def methods_of(instance: Any) -> list[Callable[..., Any]]:
    """The tools of an environment: its public methods with a docstring, in alphabetical order, bound to the instance. None where it
    names its tools itself (``tool_schemas``)."""
    if hasattr(type(instance), "tool_schemas"):
        return []
    return [
        getattr(instance, name)
        for name, function in inspect.getmembers(type(instance), inspect.isfunction)
        if not name.startswith("_") and name not in OWN and inspect.getdoc(function)
    ]


def abilities(instance: Any) -> dict[str, bool]:
    """Which of the methods that pgrpo calls an environment has.

    ``is_long``: it leads the conversation itself. ``takes_row``: its ``reset`` can be given a row, with the prompt. ``is_mute``: it
    has public methods, but none with a docstring, so no tools.
    """
    has = {name: callable(getattr(type(instance), name, None)) for name in OWN}
    public = [n for n, _ in inspect.getmembers(type(instance), inspect.isfunction) if n[0] != "_" and n not in OWN]
    return {
        "takes_row": not has["reset"] or _takes(instance.reset, "prompt"),
        "is_mute": bool(public) and not methods_of(instance) and not has["tool_schemas"],
        "can_reset": has["reset"],
        "has_reward": has["get_reward"],
        "has_turn_rewards": has["get_turn_rewards"],
        "is_long": has["converse"],
        "is_async": inspect.iscoroutinefunction(getattr(instance, "converse", None)),
    }


def _takes(function: Callable[..., Any], name: str) -> bool:
    """Whether an argument can be given by this name."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # one that is not written in Python does not say
        return True
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return any(p.kind is p.VAR_KEYWORD or (p.name == name and p.kind in by_name) for p in parameters.values())


def check_callable(function: Callable[..., Any]) -> None:
    """Refuse a function that no call of a model can use (``ValueError``)."""
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            raise ValueError(
                f"a model gives all arguments by name, so it cannot fill `{parameter.name}`; give the tool arguments with names "
                "and no `*` or `/`, such as a list"
            )
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ValueError("it yields; return one value")


def said_of(function: Any) -> dict[str, Any] | None:
    """Name, docstring and hints of a function; None if it is none."""
    name = getattr(function, "__name__", None)
    if not isinstance(name, str) or not inspect.isroutine(function):
        return None
    check_callable(function)
    hints = get_type_hints(function)
    parameters = [
        [p.name, int(p.kind), p.default is not p.empty, p.annotation is not p.empty]
        for p in inspect.signature(function).parameters.values()
    ]
    written = {name: _written(hint) for name, hint in hints.items()}
    return {"name": name, "doc": inspect.getdoc(function), "parameters": parameters, "hints": written}


def function_of(said: dict[str, Any]) -> Callable[..., Any]:
    """A function that says the same of itself and does nothing."""

    def function() -> None: ...

    hints = {name: _read(hint) for name, hint in said["hints"].items()}
    function.__name__ = function.__qualname__ = said["name"]
    function.__doc__ = said["doc"]
    function.__annotations__ = hints
    empty = inspect.Parameter.empty
    function.__dict__["__signature__"] = inspect.Signature(
        [
            inspect.Parameter(
                name,
                inspect._ParameterKind(kind),
                default=None if has_default else empty,
                annotation=hints.get(name, empty) if has_hint else empty,
            )
            for name, kind, has_default, has_hint in said["parameters"]
        ]
    )
    return function


def _written(hint: Any) -> list[Any]:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ["Literal", *args]
    if origin in (Union, UnionType):
        return ["Union", *map(_written, args)]
    if origin in (list, dict, tuple, set):
        return [origin.__name__, *map(_written, args)]
    if isinstance(hint, type) and issubclass(hint, Enum):
        return ["Enum", hint.__name__, *(member.value for member in hint)]
    known = next((name for name, kind in PLAIN.items() if hint is kind), None)
    return [known] if known else ["other", getattr(hint, "__name__", repr(hint))]


def _read(written: list[Any]) -> Any:
    kind, *rest = written
    if kind == "Literal":
        return Literal[tuple(rest)]
    if kind == "Union":
        return reduce(or_, map(_read, rest))
    if kind == "Enum":
        return Enum(rest[0], [(f"value_{i}", value) for i, value in enumerate(rest[1:])])
    if kind == "other":
        return type(rest[0], (), {})  # whose message of refusal names it
    return PLAIN[kind][tuple(map(_read, rest))] if rest else PLAIN[kind]
