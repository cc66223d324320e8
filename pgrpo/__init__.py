"""pgrpo: GRPO that computes each prompt once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pgrpo.config import Config, ConfigError, load_config
from pgrpo.early import check_early, check_start

__all__ = ["Config", "ConfigError", "load_config", "train"]


def train(
    config: Config | str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    rewards: Sequence[Callable[..., Any]] = (),
    dataset: Iterable[Mapping[str, Any]] | None = None,
    resume: str | Path | None = None,
) -> Path:
    """Run a training, the same one as ``pgrpo train``, and return its run folder.

    Args:
        config: a YAML file, the name of one that comes with pgrpo, its contents as a mapping, or a ``Config``.
        overrides: ``key=value`` strings.
        rewards: functions ``f(prompts, completions, **columns) -> list[float | None]``, beside those of the config.
        dataset: rows (a ``datasets.Dataset`` or a list of dicts), instead of ``data.path``.
        resume: a checkpoint folder, ``auto`` (the newest of this run), or ``best``.

    Raises:
        ConfigError: the input is wrong; nothing was trained.
    """
    if not isinstance(config, Config):
        config = load_config(config, overrides, rewards_from_python=bool(rewards), data_from_python=dataset is not None)
    elif overrides:
        raise ConfigError("overrides go with a YAML file or a mapping; change the Config itself instead")
    check_early(config, data_from_python=dataset is not None)
    check_start(config, resume)
    from pgrpo.grpo import train as run  # not before: it takes seconds

    return run(config, rewards=rewards, dataset=dataset, resume=resume)
