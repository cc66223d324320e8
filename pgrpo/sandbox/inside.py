"""Both ends of the connection between tests and program, which run in two sandboxes. Standard library only: ``calls.py`` sends
this file as text, followed by a call of ``ask`` or ``answer``.

Arguments and results are sent as JSON and rebuilt from exact plain types on the other side, so the tests never hold an object of
the program.
"""

from __future__ import annotations

import builtins
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator

TYPE_CHECKING = False  # importing `typing` would take a tenth of a program's start
if TYPE_CHECKING:
    from typing import Any

LONGEST = 1 << 24  # bytes of one message
MOST_ITEMS = 10_000  # of an iterator


class NotPlain(Exception):
    """The object is not plain data."""


class NoAnswer(BaseException):
    """The program sent no valid reply. A BaseException, so that ``except Exception`` in a test does not catch it."""


def encode(value: object) -> Any:
    """Convert to JSON types: a number, text or list, or {kind: ...}. A subclass becomes its base type. Raises ``NotPlain``."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        number = int.__pos__(value)
        return (
            number if number.bit_length() < 64 else {"int": hex(number)}
        )  # Python limits the digits of decimal conversion
    if isinstance(value, float):
        return float.__pos__(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": value.hex()}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(item) for item in value]}
    if isinstance(value, Iterator):
        items = list(itertools.islice(value, MOST_ITEMS + 1))
        if len(items) <= MOST_ITEMS:
            return {"iter": [encode(item) for item in items]}
    raise NotPlain(type(value).__name__)


def decode(data: Any) -> Any:
    """Invert ``encode``. Raises some ``Exception`` for other input."""
    if isinstance(data, list):
        return [decode(item) for item in data]
    if not isinstance(data, dict):
        return data
    [(kind, inner)] = data.items()
    if kind == "int":
        return int(inner, 16)
    if kind == "bytes":
        return bytes.fromhex(inner)
    make = {"complex": lambda pair: complex(*pair), "dict": dict, "tuple": tuple, "set": set, "frozenset": frozenset}
    return (make | {"iter": iter})[kind](decode(inner))


class Line:
    """One end of a socket. ``fault``: mark of the current test if a call got no valid reply, else empty."""

    def __init__(self, fd: int) -> None:
        self.reader, self.writer, self.fault = os.fdopen(fd, "rb"), os.fdopen(fd, "wb", closefd=False), ""

    def send(self, message: object) -> None:
        self.writer.write(json.dumps(message).encode() + b"\n")
        self.writer.flush()

    def receive(self) -> Any:
        """Read a message. ``NoAnswer``: the other end closed, or the message is invalid."""
        try:
            return decode(json.loads(self.reader.readline(LONGEST)))
        except Exception as error:
            raise NoAnswer from error

    def function(self, name: str) -> Callable[..., object]:
        """Return a function that calls the program's function ``name``."""

        def call(*args: object, **kwargs: object) -> object:
            try:
                request = encode([name, args, kwargs])
            except NotPlain:
                self.fault = "x"
                raise
            self.fault = "0"
            try:
                self.send(request)
                kind, *rest = self.receive()
            except Exception as error:
                raise NoAnswer from error
            if kind == "returned" and len(rest) == 1:
                self.fault = ""
                return rest[0]
            if kind == "raised" and len(rest) == 2:
                self.fault = ""
                known = getattr(builtins, str(rest[0]), None)
                error = known if isinstance(known, type) and issubclass(known, Exception) else RuntimeError
                raise error.__new__(error, str(rest[1]))  # skip its __init__, which may need more arguments
            self.fault = "o" if kind == "object" else "0"
            raise NoAnswer

        return call


def ask(fd: int) -> None:
    """Run the tests from standard input and print one mark per test: 1 passed; 0 failed; o failed, because the program returned
    an object that is not plain; x cannot run, because the test passes such an object."""
    work, line, marks = json.load(sys.stdin), Line(fd), ""
    names: dict[str, Any] = {"__name__": "tests"}
    names |= {name: line.function(name) for name in work["functions"]}
    for test in work["tests"]:
        line.fault, mark = "", "0"
        try:
            exec(compile(test, "test.py", "exec"), names)
            mark = "1"
        except (Exception, NoAnswer):
            pass
        marks += line.fault or mark
    sys.stdout.flush()
    os.write(1, f"\n{marks}\n".encode())
    os._exit(0)  # skips Python's shutdown, which takes milliseconds


def answer(fd: int, source: str) -> None:
    """Run the program ``source`` (not as __main__, so that its demo does not run), then serve calls until the tests end."""
    nothing = os.open("/dev/null", os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    line = Line(fd)
    names: dict[str, Any] = {"__name__": "solution"}
    exec(compile(source, "solution.py", "exec"), names)
    while True:
        try:
            name, args, kwargs = line.receive()
        except NoAnswer:  # the tests ended
            return
        line.send(reply(names[name], args, kwargs))  # KeyError ends the program if the name does not exist


def reply(function: Callable[..., object], args: tuple, kwargs: dict) -> list[object]:
    """Call the function; return the reply message."""
    try:
        return ["returned", encode(function(*args, **kwargs))]
    except NotPlain as error:
        return ["object", str(error)]
    except Exception as error:
        kind = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")
        return ["raised", kind, str(error)]
