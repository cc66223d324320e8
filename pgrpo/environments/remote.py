"""What a config names, called in a worker process as if it were here: functions, classes of environments and their methods."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from pgrpo.config.task import ImageConfig
from pgrpo.environments.calls import CallFailed, Function, Remote
from pgrpo.environments.long_form import Led
from pgrpo.environments.workers import CLOSE_S, Nursery, Worker
from pgrpo.types import Messages
from pgrpo.vision.parts import Content


class ToolPool:
    """Workers that call plain functions. Any of them may serve any call, so what a tool keeps in its module is not shared."""

    def __init__(self, nursery: Nursery) -> None:
        self.nursery = nursery
        self._free: list[Worker] = []

    def take(self) -> Worker:
        with suppress(IndexError):
            return self._free.pop()
        return self.nursery.worker()

    def give_back(self, worker: Worker) -> None:
        if worker.is_alive:
            self._free.append(worker)


class RemoteTool(Remote):
    """A function that the config names."""

    def __init__(self, pool: ToolPool, name: str) -> None:
        self._pool, self._name = pool, name

    def begin(self) -> Worker:
        worker = self._pool.take()
        worker.load(self._name, "tools")
        return worker

    def run(self, worker: Worker, arguments: Mapping[str, Any]) -> Content:
        return worker.ask("call", name=self._name, arguments=dict(arguments))

    def end(self, worker: Worker) -> None:
        self._pool.give_back(worker)


class RemoteClass(Remote):
    """Makes environments of a class that the config names, each in a process of its own."""

    def __init__(self, nursery: Nursery, name: str, args: Mapping[str, Any], tools: Sequence[str]) -> None:
        self._nursery, self._name, self._args, self._tools = nursery, name, dict(args), frozenset(tools)

    def begin(self) -> Worker:
        worker = self._nursery.worker()
        worker.load(self._name, "environment.factory")
        return worker

    def run(self, worker: Worker, arguments: Mapping[str, Any]) -> RemoteEnvironment:
        try:
            worker.ask("make", name=self._name, args=self._args)
        except BaseException:
            worker.kill()
            raise
        return RemoteEnvironment(worker, self._tools)


class RemoteEnvironment:
    """An environment in a worker process. Its attributes are the methods that pgrpo and the model call."""

    def __init__(self, worker: Worker, tools: frozenset[str]) -> None:
        self._worker, self._tools = worker, tools

    def __getattr__(self, name: str) -> RemoteMethod:
        if name == "reset":
            return RemoteMethod(self._worker, "reset", "row")
        if name in ("get_reward", "get_turn_rewards"):
            return RemoteMethod(self._worker, "reward", None, name=name)
        if name not in self._tools:
            raise AttributeError(
                f"{name}: this environment lives in a worker process, where only its tools can be called; pass its class "
                "from Python (environment=Class) to have the object itself"
            )
        return RemoteMethod(self._worker, "method", "arguments", name=name)


class RemoteMethod(Remote):
    """A method of an environment. The process stays with the environment."""

    is_there = True

    def __init__(self, worker: Worker, operation: str, argument: str | None, **more: Any) -> None:
        self._worker, self._operation, self._argument, self._more = worker, operation, argument, more

    def begin(self) -> Worker:
        return self._worker

    def run(self, worker: Worker, arguments: Mapping[str, Any]) -> Any:
        own = {self._argument: dict(arguments)} if self._argument else {}
        return worker.ask(self._operation, **own, **self._more)


class RemoteDialogue(Remote):
    """A conversation that the environment leads, in steps as of ``long_form.Led``."""

    is_there = True

    def __init__(self, worker: Worker, messages: Messages) -> None:
        self._worker, self._messages = worker, messages

    def begin(self) -> Worker:
        return self._worker

    def run(self, worker: Worker, arguments: Mapping[str, Any]) -> Any:
        answer = arguments["answer"]
        return worker.exchange(answer) if answer is not None else worker.ask("converse", messages=self._messages)


def step_of(instance: Any, messages: Messages, limits: ImageConfig | None) -> Function:
    """``long_form.Led.step`` of an environment that leads the conversation, in this process or its own."""
    if isinstance(instance, RemoteEnvironment):
        return RemoteDialogue(instance._worker, messages)
    return Led(instance.converse, messages, limits).step


def is_usable(instance: Any) -> bool:
    """Whether an environment may begin another episode."""
    return instance is not None and not (isinstance(instance, RemoteEnvironment) and not instance._worker.is_alive)


def abandon(instance: Any) -> None:
    """An environment that begins no other episode: its process ends, whatever it is in the middle of."""
    if isinstance(instance, RemoteEnvironment):
        instance._worker.kill()


def close_all(instances: Sequence[Any]) -> None:
    """Close the environments that have ``close``."""
    deadline = time.monotonic() + CLOSE_S
    for instance in instances:
        if isinstance(instance, RemoteEnvironment):
            if instance._worker.is_alive:
                instance._worker.limit(max(0.01, deadline - time.monotonic()))
                with suppress(CallFailed):
                    instance._worker.ask("close")
        elif callable(close := getattr(instance, "close", None)):
            close()
