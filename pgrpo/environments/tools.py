"""What a model may call: plain functions, and the public methods of an environment. Schemas come from type hints and docstrings."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.utils.chat_template_utils import get_json_schema

from pgrpo.config import ConfigError
from pgrpo.environments.calls import CallFailed, Function
from pgrpo.environments.parsing import Text
from pgrpo.environments.remote import RemoteClass, RemoteTool, ToolPool
from pgrpo.environments.signatures import OWN, abilities, check_callable, function_of, methods_of
from pgrpo.environments.workers import LOOK_S, Nursery, Worker


class BadCall(ValueError):
    """A call of the model that cannot run: an unknown tool or wrong arguments. The message is for the model."""


@dataclass(frozen=True, slots=True)
class Tool:
    """One tool.

    Attributes:
        name: by which the model calls it.
        schema: what the chat template is given.
        function: the callable; None for a method of an environment, which is looked up in the episode's instance.
    """

    name: str
    schema: dict[str, Any]
    function: Function | None = None

    def checked(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments with the types of the schema.

        Raises:
            BadCall: one is unknown, missing or of another type.
        """
        parameters = self.schema["function"]["parameters"]
        known, required = parameters.get("properties", {}), parameters.get("required", [])
        if unknown := [name for name in arguments if name not in known]:
            raise BadCall(f"{self.name} has no argument {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
        if missing := [name for name in required if name not in arguments]:
            raise BadCall(f"{self.name} needs the argument {', '.join(missing)}")
        return {name: _typed(self.name, name, value, known[name]) for name, value in arguments.items()}


def _typed(tool: str, name: str, value: Any, schema: Mapping[str, Any]) -> Any:
    """The value in one of the schema's types. A text that spells another type is read as that."""
    kinds = schema.get("type")
    if kinds is None:  # any type, or a choice between schemas
        return _read(value) if isinstance(value, Text) else value
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    if schema.get("nullable"):
        kinds.append("null")
    if isinstance(value, Text) and "string" in kinds:
        return str(value)
    for candidate in [value, _read(value)] if isinstance(value, str) else [value]:
        for kind in kinds:
            if _is(candidate, kind):
                whole = kind == "integer" and isinstance(candidate, float)
                result = int(candidate) if whole else candidate
                if schema.get("enum") and result not in schema["enum"]:
                    raise BadCall(f"{tool}: {name} must be one of {json.dumps(schema['enum'])}, not {result!r:.80}")
                return result
    raise BadCall(f"{tool}: {name} must be of type {' or '.join(kinds)}, not {value!r:.80}")


def _read(text: str) -> Any:
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text.strip(), text))
    except (ValueError, RecursionError):
        return str(text)


def _is(value: Any, kind: str) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return {
        "string": isinstance(value, str),
        "integer": is_number and value == value // 1,
        "number": is_number,
        "boolean": isinstance(value, bool),
        "array": isinstance(value, list),
        "object": isinstance(value, dict),
        "null": value is None,
    }.get(kind, True)


def tool_of(function: Callable[..., Any], key: str, *, is_method: bool = False) -> Tool:
    """A tool with its schema. ConfigError if the function does not say what the model needs to know."""
    name = getattr(function, "__name__", None)
    if not isinstance(name, str) or not inspect.isroutine(function):
        raise ConfigError(f"{key}: a tool is a function with a name, not {function!r:.80}; wrap it in a `def`")
    try:
        check_callable(function)
    except ValueError as error:
        raise ConfigError(f"{key}: tool `{name}`: {error}") from error
    try:
        schema = get_json_schema(function)
    except Exception as error:  # of classes of its own for hints and docstrings; and NameError of a hint
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{key}: tool `{name}`: {reason}; it needs a type hint for each argument, and a docstring that describes it and has "
            "all of them under `Args:`"
        ) from error
    return Tool(name, schema, None if is_method else function)


def load_tools(
    names: Sequence[str], extra: Sequence[Callable[..., Any]] = (), nursery: Nursery | None = None
) -> list[Tool]:
    """The config's tools, which run in worker processes of ``nursery``, and those given from Python. ConfigError."""
    found: list[Tool] = []
    if names:
        assert nursery is not None
        pool, looking = ToolPool(nursery), _looking(nursery)
        for key, name in ((f"tools[{i}]", name) for i, name in enumerate(names)):
            said = _look(looking, "tool", name=name, key=key)
            tool = tool_of(function_of(said), key)
            found.append(Tool(tool.name, tool.schema, RemoteTool(pool, name)))
        looking.limit(None)
        pool.give_back(looking)
    return found + [tool_of(function, f"tools[{i}]") for i, function in enumerate(extra)]


def _looking(nursery: Nursery) -> Worker:
    try:
        worker = nursery.worker()
    except CallFailed as error:
        raise ConfigError(f"tools, environment: {error}") from error
    worker.limit(LOOK_S)
    return worker


def _look(worker: Worker, operation: str, **arguments: Any) -> dict[str, Any]:
    """What a worker finds under a name. ConfigError."""
    try:
        return worker.ask(operation, **arguments)
    except CallFailed as error:
        raise ConfigError(
            f"{arguments['key']}: {arguments['name']}: {error}, while a worker process loaded it"
        ) from error


@dataclass(frozen=True)
class Kind:
    """A class of environments.

    Attributes:
        name: of the class, and of its reward.
        make: makes an instance.
        tools: its public methods with a docstring, in alphabetical order.
        has_reward: whether it has ``get_reward`` or ``get_turn_rewards``.
        abilities: see ``signatures.abilities``.
    """

    name: str
    make: Function
    tools: list[Tool]
    has_reward: bool
    abilities: Mapping[str, bool] = field(default_factory=dict)

    @property
    def is_long(self) -> bool:
        """Whether it leads the conversation itself (``converse``)."""
        return self.abilities["is_long"]


def kind_of(factory: Callable[..., Any], args: Mapping[str, Any], key: str) -> Kind:
    """Make an instance, and look at its class. ConfigError if it is no environment."""
    if not callable(factory):
        raise ConfigError(f"{key}: an environment is a class or a function that makes one, not {factory!r:.80}")
    try:
        probe = factory(**args)
    except Exception as error:
        raise ConfigError(f"{key}: cannot be made with environment.args={dict(args)}: {error!r:.400}") from error
    tools = [tool_of(method, f"{key}, method {method.__name__}", is_method=True) for method in methods_of(probe)]
    if hasattr(type(probe), "tool_schemas"):
        tools += _named_by_itself(probe.tool_schemas(), key)
    kind = _kind(type(probe).__name__, lambda: factory(**args), tools, abilities(probe), key)
    if callable(close := getattr(probe, "close", None)):
        close()
    return kind


def remote_kind(nursery: Nursery, name: str, args: Mapping[str, Any], key: str) -> Kind:
    """The same of a class that the config names, in a worker process."""
    worker = _looking(nursery)
    found = _look(worker, "environment", name=name, args=dict(args), key=key)
    worker.kill()
    tools = [tool_of(function_of(said), f"{key}, method {said['name']}", is_method=True) for said in found.pop("tools")]
    tools += _named_by_itself(found.pop("schemas"), key)
    own, name_of_class = RemoteClass(nursery, name, args, [tool.name for tool in tools]), found.pop("name")
    return _kind(name_of_class, own, tools, found, key)


def _named_by_itself(schemas: Sequence[dict[str, Any]], key: str) -> list[Tool]:
    """Tools of an environment that gives their JSON schemas."""
    found = []
    for schema in schemas:
        name = schema.get("function", {}).get("name") if isinstance(schema, Mapping) else None
        if not isinstance(name, str) or not isinstance(schema["function"].get("parameters"), Mapping):
            raise ConfigError(
                f'{key}: tool_schemas gave {schema!r:.80}; a schema is {{"type": "function", "function": {{"name", "description", '
                '"parameters"}}'
            )
        if name in OWN or name.startswith("_"):
            raise ConfigError(
                f"{key}: tool_schemas names a tool `{name}`, which pgrpo calls itself; give it another name"
            )
        found.append(Tool(name, schema))
    return found


def _kind(name: str, make: Any, tools: list[Tool], has: Mapping[str, bool], key: str) -> Kind:
    if not (has["can_reset"] or has["is_long"]):
        raise ConfigError(f"{key}: {name} has no method `reset(**row)`, which begins an episode")
    if not has["takes_row"]:
        raise ConfigError(
            f"{key}: {name}.reset is given the row of the data set, `prompt` and its columns: write `def reset(self, **row)`"
        )
    if has["is_long"] and not has["is_async"]:
        raise ConfigError(f"{key}: {name}.converse is not async; write `async def converse(self, conversation)`")
    return Kind(name, make, tools, has["has_reward"] or has["has_turn_rewards"], has)


def load_kinds(
    factory: Any, args: Mapping[str, Any], given: Any = None, nursery: Nursery | None = None
) -> dict[str, Kind]:
    """Name -> class of environments; the name is empty where there is one for all rows.

    Args:
        factory: ``environment.factory``.
        given: from Python, instead of it: a callable, or a mapping of names to callables.
        nursery: of the processes in which classes run that the config names.
    """
    made = given if given is not None else factory
    if made is None:
        return {}
    named = made if isinstance(made, Mapping) else {"": made}
    kinds = {}
    for name, value in named.items():
        key = f"environment.factory.{name}" if name else "environment.factory"
        if isinstance(value, str):
            if nursery is None:
                raise ConfigError(
                    f"{key}: environment={value!r} from Python is a name; set environment.factory={value}, or pass the class"
                )
            kinds[name] = remote_kind(nursery, value, args, key)
        else:
            kinds[name] = kind_of(value, args, key)
    return kinds


def check_names(tools: Sequence[Tool], key: str) -> None:
    """Refuse two tools of one name, which a model could not tell apart (``ConfigError``)."""
    names = [tool.name for tool in tools]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"{key}: two tools are called `{twice}`; rename one of them")


def kind_name(kinds: Mapping[str, Kind], row: Mapping[str, Any]) -> str:
    """The name of a row's class of environments. ConfigError if there is none of that name."""
    if not kinds or "" in kinds:
        return ""
    if (name := row.get("environment")) not in kinds:
        raise ConfigError(
            f"environment.factory: a row has {name!r:.80} in its column `environment`; there are {', '.join(kinds)}"
        )
    return str(name)
