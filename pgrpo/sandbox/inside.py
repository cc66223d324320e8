"""The two ends of the line between tests and program, each in a sandbox of its own. Standard library only; ``calls.py`` sends
it as text, and a call of ``ask`` or ``answer``.

A call's arguments and its result cross as JSON and are made anew on the other side, in exact plain types: the tests never
hold an object of the program.
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
    """An object that is no plain data."""


class NoAnswer(BaseException):
    """The program answered nothing that can be read. No test catches it by ``except Exception``."""


def encode(value: object) -> Any:
    """What JSON holds: a number, text or list, or {kind: ...}. A subclass becomes what it extends. ``NotPlain``."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        number = int.__pos__(value)
        return number if number.bit_length() < 64 else {"int": hex(number)}  # decimal digits have a limit in Python
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
    """The inverse of ``encode``; any ``Exception`` for what ``encode`` does not write."""
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
    """One end of a socket. ``fault`` is the mark of a test that got no answer."""

    def __init__(self, fd: int) -> None:
        self.reader, self.writer, self.fault = os.fdopen(fd, "rb"), os.fdopen(fd, "wb", closefd=False), ""

    def send(self, message: object) -> None:
        self.writer.write(json.dumps(message).encode() + b"\n")
        self.writer.flush()

    def receive(self) -> Any:
        """``NoAnswer``: the other end has closed, or this is no message."""
        try:
            return decode(json.loads(self.reader.readline(LONGEST)))
        except Exception as error:
            raise NoAnswer from error

    def function(self, name: str) -> Callable[..., object]:
        """Calls the program's function ``name``."""

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
                raise error.__new__(error, str(rest[1]))  # without its __init__, which may want more arguments
            self.fault = "o" if kind == "object" else "0"
            raise NoAnswer

        return call


def ask(fd: int) -> None:
    """Run the tests of standard input; print one mark each: 1 passed, 0 failed, o failed because the program returned an
    object of its own, x cannot run because it passes one of the test's own."""
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
    os._exit(0)  # Python's own end takes some milliseconds


def answer(fd: int, source: str) -> None:
    """Run the program ``source`` (not as __main__, so that its own demo does not run), then each call that comes."""
    nothing = os.open("/dev/null", os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    line = Line(fd)
    names: dict[str, Any] = {"__name__": "solution"}
    exec(compile(source, "solution.py", "exec"), names)
    while True:
        try:
            name, args, kwargs = line.receive()
        except NoAnswer:  # the tests are over
            return
        line.send(reply(names[name], args, kwargs))  # a name that is not there ends the program


def reply(function: Callable[..., object], args: tuple, kwargs: dict) -> list[object]:
    try:
        return ["returned", encode(function(*args, **kwargs))]
    except NotPlain as error:
        return ["object", str(error)]
    except Exception as error:
        kind = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")
        return ["raised", kind, str(error)]
