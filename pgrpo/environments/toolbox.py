"""The tools and environments of a run, from its config and from Python, checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from pgrpo.config import Config, ConfigError
from pgrpo.config.fields import PYTHON
from pgrpo.distributed.world import World
from pgrpo.environments.chat import Chat
from pgrpo.environments.episodes import Episodes, SingleTurn, ToolLoop
from pgrpo.environments.remote import RemoteClass
from pgrpo.environments.tools import Kind, Tool, check_names, kind_name, load_kinds, load_tools
from pgrpo.environments.transitions import History, Transition, check_transitions
from pgrpo.environments.workers import Nursery
from pgrpo.rollout.base import RolloutEngine
from pgrpo.vision.reader import ImageReader


@dataclass(frozen=True)
class Toolbox:
    """What a model may call in this run; empty for single turns.

    Attributes:
        tools: of every episode.
        kinds: name -> class of environments; the name is "" where there is one for all rows.
        transitions: what the chat template can do between turns, for ``pgrpo check``.
        nursery: of the processes in which runs what the config names; None where it names nothing.
    """

    tools: list[Tool]
    kinds: dict[str, Kind]
    transitions: list[Transition] = field(default_factory=list)
    nursery: Nursery | None = None

    def __bool__(self) -> bool:
        return bool(self.tools or self.kinds)

    def schemas_of(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """JSON schemas of the tools of a row of the data set."""
        return self._schemas(kind_name(self.kinds, row))

    def chats(
        self,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: Collection[int],
        kwargs: dict[str, Any],
        history: History = None,
        reader: ImageReader | None = None,
        max_images: int = 0,
    ) -> dict[str, Chat]:
        """Name of a class of environments -> the chat template with its tools, tried out (``ConfigError``).

        Args:
            reader: of the run's images.
            max_images: ``environment.max_images``.
        """
        found = {}
        for name in (self.kinds or {"": None}) if self else ():
            found[name] = Chat(tokenizer, end_ids, self._schemas(name), kwargs, reader)
            is_led = name in self.kinds and self.kinds[name].is_long
            key = "tools" if self.tools else "environment.factory"
            self.transitions[:] = check_transitions(
                found[name], key, history, is_led=is_led, with_images=bool(max_images)
            )
        return found

    def check_rewards(self, rewards: Sequence[Any]) -> None:
        """Refuse a function from Python that wants environments which live in worker processes (``ConfigError``)."""
        if not any(isinstance(kind.make, RemoteClass) for kind in self.kinds.values()):
            return
        for reward in rewards:
            if callable(reward) and "environments" in getattr(getattr(reward, "__code__", None), "co_varnames", ()):
                name = getattr(reward, "__name__", type(reward).__name__)
                raise ConfigError(
                    f"environment.factory: the reward `{name}` wants `environments`, but a class that a config names lives in "
                    "worker processes; pass environment=Class from Python, or give it a `get_reward`"
                )

    def own_rewards(self) -> list[Callable[..., list[Any]]]:
        """A reward function for each class that has ``get_reward``, of the class's name."""
        names = dict.fromkeys(kind.name for kind in self.kinds.values() if kind.has_reward)
        return [_own_reward(name) for name in names]

    def episodes(self, config: Config, engine: RolloutEngine, chats: dict[str, Chat], world: World) -> Episodes:
        """Makes episodes with these tools on an engine."""
        if not self:
            return SingleTurn(engine)
        limits = config.max_sampled_tokens, config.data.max_prompt_tokens
        return ToolLoop(
            engine, self.tools, self.kinds, chats, config.environment, *limits, lambda: bool(world.stop.signum),
            self.nursery,
        )  # fmt: skip

    def _schemas(self, name: str) -> list[dict[str, Any]]:
        kind = self.kinds.get(name)
        return [tool.schema for tool in (*self.tools, *(kind.tools if kind else ()))]


def load_toolbox(config: Config, tools: Sequence[Callable[..., Any]] = (), environment: Any = None) -> Toolbox:
    """What the config names and what is given from Python.

    Raises:
        ConfigError: one of them cannot be loaded, says too little for a schema, or is not given.
    """
    named = [tool for tool in config.tools if tool != PYTHON]
    if len(named) < len(config.tools) and not tools:
        raise ConfigError(f"tools: {PYTHON} were given from Python; name them by file.py:name, or pass tools=[...]")
    if config.environment.factory == PYTHON and environment is None:
        raise ConfigError(
            f"environment.factory: {PYTHON} was given from Python; name it by file.py:Class, or pass environment=Class"
        )
    factory, args = config.environment.factory, config.environment.args
    has_workers = bool(named) or bool(factory and environment is None)
    nursery = Nursery(config.environment.secrets, config.data.image) if has_workers else None
    if nursery is None and config.environment.secrets:
        raise ConfigError(
            f"environment.secrets: {config.environment.secrets} has no effect on tools and classes from Python, which run in this "
            "process and see all; leave it out"
        )
    kinds = load_kinds(factory, args, environment, nursery)
    toolbox = Toolbox(load_tools(named, tools, nursery), kinds, nursery=nursery)
    for name, kind in toolbox.kinds.items():
        key = f"environment.factory{f'.{name}' if name else ''}"
        check_names([*toolbox.tools, *kind.tools], key)
        if kind.abilities["is_mute"] and not toolbox.tools and not kind.is_long:
            raise ConfigError(
                f"{key}: {kind.name} has no tools, as none of its public methods has a docstring. Describe a tool and, under "
                "`Args:`, all of its arguments; begin the names of other methods with _"
            )
    check_names(toolbox.tools, "tools")
    return toolbox


def _own_reward(name: str) -> Callable[..., list[Any]]:
    def reward(own_rewards: list[dict[str, Any]]) -> list[Any]:
        return [own.get(name) for own in own_rewards]

    reward.__name__ = name
    return reward
