"""Sessions of OpenEnv (``openenv.core.harness``) as environments:

    environment:
      factory: pgrpo.environments.openenv:OpenEnv
      args: {factory: my_sessions.py:make, options: {base_url: "http://localhost:8000"}}

``make(**options)`` returns a ``ResourceSessionFactory``; a row's column ``task`` goes to its ``create``. OpenEnv itself is imported
by your module alone, so any object with the same methods will do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from pgrpo.config.functions import load_function
from pgrpo.environments.long_form import Conversation
from pgrpo.types import Messages


class OpenEnv:
    """One session at a time.

    Args:
        factory: name of a function that makes a ``ResourceSessionFactory``.
        options: its keyword arguments, such as the address of a server.
        probe: the task of a session that is made once, to list the tools.
    """

    def __init__(self, factory: str, options: Mapping[str, Any] | None = None, probe: Any = None) -> None:
        self._factory = load_function(factory, "environment.args.factory")(**(options or {}))
        self._session: Any = None
        self._probe, self._done, self._transcript = probe, False, []

    def tool_schemas(self) -> list[dict[str, Any]]:
        """The session's tools as JSON schemas."""
        session = self._factory.create(self._probe)
        try:
            return [
                {
                    "type": "function",
                    "function": {
                        "name": tool.name,
                        "description": tool.description or "",
                        "parameters": dict(tool.input_schema),
                    },
                }
                for tool in session.list_tools()
            ]
        finally:
            session.close()

    def reset(self, task: Any = None, seed: int | None = None, **row: Any) -> Messages:
        """A new session; what it says at the beginning."""
        self.close()
        self._session, self._done, self._transcript = self._factory.create(task, seed=seed), False, []
        return [dict(message) for message in self._session.initial_messages()]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """A tool of the session."""
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda **arguments: self._call(name, arguments)

    def _call(self, name: str, arguments: dict[str, Any]) -> str:
        if self._done:
            return "the episode is over"
        result = self._session.call_tool(name, arguments)
        self._done = bool(result.done)
        if result.error:
            raise RuntimeError(result.error)
        return str(result.data)

    async def converse(self, conversation: Conversation) -> None:
        """Leave the turns to the model, and keep what was said for ``verify``."""
        try:
            await conversation.generate()
        finally:
            self._transcript = conversation.messages

    async def get_reward(self) -> float | None:
        """What the session gives; None leaves the episode without a reward."""
        return (await asyncio.to_thread(self._session.verify, self._transcript, None)).env_reward

    def close(self) -> None:
        """End the session."""
        session, self._session = self._session, None
        if session is not None:
            with suppress(Exception):  # a server that is gone has nothing to close
                session.close()
