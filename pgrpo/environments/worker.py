"""The processes in which tools and environments of a config run, away from the trainer's memory and environment variables.

The trainer starts a *nursery* (``workers.Nursery``) with the environment variables that workers may see. The
nursery imports what every worker needs, never the user's code, and forks a *worker* for each socket that it is sent: a worker costs
milliseconds, and shares the nursery's memory. Workers end with the nursery, and the nursery with the trainer.

A worker serves one caller, one operation at a time. The trainer's messages are pickles, because the rows of a data set hold any
type. A worker's messages are JSON, because unpickling runs code.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import pickle
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from pgrpo.config.fields import ConfigError
from pgrpo.config.functions import load_function
from pgrpo.config.task import ImageConfig
from pgrpo.environments.calls import CallFailed, Loop, describe
from pgrpo.environments.content import content_of, said_at_reset
from pgrpo.environments.long_form import Conversation, Ended, lead
from pgrpo.environments.signatures import abilities, methods_of, said_of
from pgrpo.environments.written import each_text
from pgrpo.types import Messages
from pgrpo.vision.parts import Content

MOST_CHARACTERS = 1 << 24
"""Of one result. More than any episode reads, so the limit of an episode's tokens decides first."""
SIZE = 8  # bytes in front of a message


def send(connection: socket.socket, message: bytes) -> None:
    connection.sendall(len(message).to_bytes(SIZE, "big") + message)


def receive(connection: socket.socket) -> bytes:
    """The next message. EOFError if the other side has ended."""
    return _exactly(connection, int.from_bytes(_exactly(connection, SIZE), "big"))


def _exactly(connection: socket.socket, count: int) -> bytes:
    parts = []
    while count:
        try:
            part = connection.recv(min(count, 1 << 20))
        except ConnectionError:
            part = b""
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


class Server:
    """The worker's side: runs the operations that the trainer names. It holds at most one instance of an environment."""

    def __init__(self, connection: socket.socket, limits: ImageConfig) -> None:
        self._connection, self._limits = connection, limits
        self._async = Loop("pgrpo-tools")  # runs between calls too: clients keep connections alive
        self._environment: Any = None
        self._pid = os.getpid()

    def serve(self) -> None:
        """Until the trainer closes the connection."""
        while True:
            try:
                operation, arguments = pickle.loads(receive(self._connection))
            except EOFError:
                return
            except Exception as error:  # a row of a type that this process cannot import
                answer = {"error": describe(error)}
            else:
                answer = self._answer(operation, arguments)
            if (
                os.getpid() != self._pid
            ):  # the user's function forked, and this is the child, which has nothing to answer
                os._exit(0)
            try:
                message = _json(answer)
            except (TypeError, ValueError, RecursionError) as error:  # keys that are no texts, a circle
                message = _json({"error": f"its result is not JSON: {describe(error)}"})
            send(self._connection, message)

    def _answer(self, operation: str, arguments: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"value": getattr(self, operation)(**arguments)}
        except ConfigError as error:
            return {"refused": str(error)}
        except CallFailed as error:
            return {"error": str(error)}
        except BaseException as error:  # SystemExit and CancelledError too
            return {"error": describe(error)}

    def tool(self, name: str, key: str) -> dict[str, Any]:
        """What a function says of itself."""
        return _said(load_function(name, key), key)

    def environment(self, name: str, args: Mapping[str, Any], key: str) -> dict[str, Any]:
        """What the class of an environment has, by an instance."""
        factory = load_function(name, key)
        try:
            instance = factory(**args)
        except Exception as error:
            raise ConfigError(f"{key}: cannot be made with environment.args={dict(args)}: {error!r:.400}") from error
        tools = [_said(method, f"{key}, method {method.__name__}") for method in methods_of(instance)]
        found = {"name": type(instance).__name__, "tools": tools, **abilities(instance)}
        found["schemas"] = instance.tool_schemas() if hasattr(type(instance), "tool_schemas") else []
        self._environment = instance
        self.close()
        return found

    def load(self, name: str, key: str) -> None:
        """Import what is called next, so that the deadline of a call is for the call."""
        load_function(name, key)

    def call(self, name: str, arguments: Mapping[str, Any]) -> Content:
        """Call a function of a module or file."""
        return self._content(self._run(load_function(name, "tools"), arguments))

    def make(self, name: str, args: Mapping[str, Any]) -> None:
        self._environment = load_function(name, "environment.factory")(**args)

    def reset(self, row: Mapping[str, Any]) -> Any:
        """What ``reset`` says, as of ``said_at_reset``."""
        said = said_at_reset(self._run(self._environment.reset, row), self._limits)
        if isinstance(said, list) and "role" in said[0]:
            return [message | {"content": _bounded(message["content"])} for message in said]
        return None if said is None else _bounded(said)

    def method(self, name: str, arguments: Mapping[str, Any]) -> Content:
        return self._content(self._run(getattr(self._environment, name), arguments))

    def reward(self, name: str) -> Any:
        """What ``get_reward`` or ``get_turn_rewards`` gives, with numbers of arrays as Python's."""
        value = self._run(getattr(self._environment, name), {})
        return value.tolist() if hasattr(value, "tolist") else value

    def converse(self, messages: Messages) -> str:
        """Let the environment lead the conversation; what it asks of the model goes to the trainer and comes back. Returns why the
        episode ended."""
        one_at_a_time, is_over = asyncio.Lock(), False  # branches may ask at the same time

        def exchange(question: dict[str, Any]) -> Any:
            send(self._connection, _json({"ask": question}))
            while isinstance(
                message := pickle.loads(receive(self._connection)), tuple
            ):  # the model calls a tool meanwhile
                send(self._connection, _json(self._answer(*message)))
            return message

        async def put(question: dict[str, Any]) -> Any:
            async with one_at_a_time:
                if is_over:
                    raise Ended("stop")
                return await asyncio.to_thread(exchange, question)

        async def ask(question: dict[str, Any]) -> Any:
            return await asyncio.shield(put(question))  # what was sent is answered, even if nobody waits any more

        async def whole() -> str:
            nonlocal is_over
            try:
                return await lead(self._environment.converse, Conversation(ask, messages, limits=self._limits))
            finally:
                is_over = True
                async with one_at_a_time:  # the last word is the reason: no branch is still asking
                    pass

        return self._async.finish(whole())

    def close(self) -> None:
        if callable(close := getattr(self._environment, "close", None)):
            self._run(close, {})
        self._environment = None

    def _run(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        """Sync functions on this thread, async ones on the event loop."""
        result = function(**arguments)
        return self._async.finish(result) if hasattr(result, "__await__") else result

    def _content(self, result: Any) -> Content:
        return _bounded(content_of(result, self._limits))


def _bounded(content: Content) -> Content:
    return each_text(content, lambda text: text[:MOST_CHARACTERS])


def _json(value: Any) -> bytes:
    return json.dumps(value, default=str).encode()


def _said(function: Any, key: str) -> dict[str, Any]:
    try:
        said = said_of(function)
    except Exception as error:  # a hint that does not evaluate
        raise ConfigError(f"{key}: tool `{function.__name__}`: {error}") from error
    if said is None:
        raise ConfigError(f"{key}: a tool is a function with a name, not {function!r:.80}; wrap it in a `def`")
    return said


def _is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def nursery(control: socket.socket, most_pixels: int) -> None:
    """Fork a worker for each socket that arrives. Returns when the trainer has ended.

    Args:
        most_pixels: of an image that a tool gives, ``data.image.max_file_pixels``.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps them
    groups: list[int] = []
    while True:
        data, sockets, _, _ = socket.recv_fds(control, 1, 1)
        if not data:
            for group in filter(_is_there, groups):  # with what they started
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(group, signal.SIGKILL)
            return
        try:
            pid = os.fork()
        except OSError as error:  # no more processes are allowed: those that there are go on
            print(f"pgrpo: a worker process cannot be forked: {error}", file=sys.stderr)
        else:
            if pid == 0:
                control.close()
                _live(socket.socket(fileno=sockets[0]), ImageConfig(max_file_pixels=most_pixels))
            groups = [*filter(_is_there, groups), pid]  # the number of a group that is gone may be another's
        for fd in sockets:
            os.close(fd)


def _live(connection: socket.socket, limits: ImageConfig) -> None:
    """The life of a worker, with its process group for what it starts. Never returns."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a call that hangs ends with the nursery
        send(connection, str(os.getpid()).encode())
        Server(connection, limits).serve()
    finally:
        os._exit(0)
