"""pgrpo: GRPO that computes each prompt once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

from pgrpo.config import PYTHON, Config, ConfigError, load_config, redact_error, with_rewards
from pgrpo.early import check_checkpoint, check_early, check_start, early_codes
from pgrpo.process.second import importing_early
from pgrpo.training.caller import Callback, Given, Run, check_callbacks

__all__ = ["Callback", "Config", "ConfigError", "Run", "evaluate", "export", "load_config", "train"]

P = ParamSpec("P")
T = TypeVar("T")
AnyConfig = Config | str | Path | Mapping[str, Any]
Reward = Callable[..., Any] | str | Mapping[str, Any]
Rows = Iterable[Mapping[str, Any]]
Environment = Callable[..., Any] | Mapping[str, Callable[..., Any]] | None


def _briefly(call: Callable[P, T]) -> Callable[P, T]:
    """Redact secrets in errors. A ConfigError is about the caller's input, so its traceback ends at the call; PGRPO_DEBUG=1 shows
    all of it."""

    @wraps(call)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return call(*args, **kwargs)
        except Exception as error:
            redact_error(error)
            if not isinstance(error, ConfigError) or os.environ.get("PGRPO_DEBUG") == "1":
                raise
            raise error.with_traceback(None) from None

    return wrapper


@_briefly
def train(
    config: AnyConfig,
    overrides: Sequence[str] = (),
    *,
    rewards: Sequence[Reward] = (),
    dataset: Rows | None = None,
    eval_dataset: Rows | None = None,
    callbacks: Sequence[Callback] = (),
    tools: Sequence[Callable[..., Any]] = (),
    environment: Environment = None,
    resume: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Run a training, the same one as ``pgrpo train``, and return its run folder.

    Args:
        config: a YAML file, the name of one that comes with pgrpo, its contents as a mapping, or a ``Config``.
        overrides: ``key=value`` strings.
        rewards: beside those of the config: functions ``f(prompts, completions, **columns) -> list[float | None]``, names such as
            ``"math"``, or mappings such as ``{"function": "math", "weight": 2.0}``. A function has weight 1; for another one name
            it in a mapping (``file.py:f``).
        dataset: rows (a ``datasets.Dataset`` or a list of dicts), instead of ``data.path``.
        eval_dataset: held-out rows, instead of ``data.eval_path``. ``eval.every`` says when they are used.
        callbacks: see ``Callback``.
        tools: functions that the model may call, each with type hints and a docstring, beside those of the config.
        environment: a class of environments, or a mapping of names to classes; instead of ``environment.factory``.
        resume: ``auto`` (the newest checkpoint of this run), ``best``, a checkpoint's folder, or a run's (its newest).
        overwrite: remove what an earlier run wrote into the run folder.

    Raises:
        ConfigError: the input is wrong; nothing was trained.
    """
    if resume is not None and overwrite:
        raise ConfigError("resume and overwrite: a run that goes on keeps what it wrote; give one of them")
    check_callbacks(callbacks)
    config, functions = _with_python(config, overrides, rewards, dataset, eval_dataset, tools, environment, trains=True)
    if eval_dataset is not None and not config.eval.every:
        raise ConfigError("eval_dataset: eval.every is 0, so it would not be used; set eval.every")
    check_early(config, data_from_python=dataset is not None)
    check_start(config, resume)
    with importing_early(early_codes(config.cache_dir, int(os.environ.get("WORLD_SIZE", "1")))):
        from pgrpo.grpo import train as run  # not before: it takes seconds

        return run(
            config,
            Given(functions, dataset, eval_dataset, callbacks, tools, environment),
            resume=resume,
            overwrite=overwrite,
        )


@_briefly
def evaluate(
    config: AnyConfig,
    overrides: Sequence[str] = (),
    *,
    checkpoint: str | Path | None = None,
    rewards: Sequence[Reward] = (),
    dataset: Rows | None = None,
    tools: Sequence[Callable[..., Any]] = (),
    environment: Environment = None,
    out: str | Path | None = None,
) -> dict[str, float]:
    """Evaluate a model or checkpoint, as ``pgrpo eval`` does, and return the metrics by name (``eval/pass@1``).

    Args:
        config: as of ``train``; a run's own is its folder's ``config.yaml``.
        checkpoint: as ``resume`` of ``train``. None: the model itself.
        rewards: as of ``train``.
        dataset: held-out rows, instead of ``data.eval_path``.
        tools, environment: as of ``train``.
        out: folder for samples.jsonl and summary.json. None: ``eval/step_N`` in the run folder.

    Raises:
        ConfigError: the input is wrong.
    """
    dataset = dataset if dataset is None else list(dataset)  # it is read twice
    config, functions = _with_python(config, overrides, rewards, dataset, dataset, tools, environment, trains=False)
    check_early(config, data_from_python=dataset is not None)
    check_checkpoint(config, "--checkpoint", checkpoint)
    from pgrpo.commands.evaluate import evaluate as run

    given = Given(functions, dataset, dataset, tools=tools, environment=environment)
    return run(config, None if checkpoint is None else str(checkpoint), None if out is None else Path(out), given)


@_briefly
def export(
    run_dir: str | Path,
    out: str | Path,
    step: int | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Path:
    """Write a checkpoint as a Hugging Face folder, as ``pgrpo export`` does, and return it.

    Args:
        run_dir: the run folder.
        out: the folder to write.
        step: of the checkpoint. None: the newest.
        dtype: of the weights.

    Raises:
        ConfigError: not a run folder, no such checkpoint, or ``out`` is in use.
    """
    from pgrpo.commands.export import export as run

    return run(Path(run_dir), Path(out), step, dtype)


def _with_python(
    config: AnyConfig,
    overrides: Sequence[str],
    rewards: Sequence[Reward],
    dataset: Rows | None,
    eval_dataset: Rows | None,
    tools: Sequence[Callable[..., Any]],
    environment: Environment,
    *,
    trains: bool,
) -> tuple[Config, list[Callable[..., Any]]]:
    """The checked config, with rewards that have names in it, and the functions among the rewards."""
    if callable(tools):
        raise ConfigError("tools: pass a list of functions, such as tools=[f]")
    functions = [reward for reward in rewards if not isinstance(reward, str | Mapping)]
    if not isinstance(config, Config):
        config = load_config(
            config, overrides, rewards_from_python=bool(rewards), data_from_python=dataset is not None,
            eval_data_from_python=eval_dataset is not None, tools_from_python=bool(tools),
            environment_from_python=environment is not None, trains=trains,
        )  # fmt: skip
    elif overrides:
        raise ConfigError("overrides go with a YAML file or a mapping; change the Config itself instead")
    elif tools or environment is not None:
        raise ConfigError("tools and environment go with a YAML file or a mapping; name them in the Config instead")
    elif eval_dataset is not None:
        config = replace(config, data=replace(config.data, eval_path=PYTHON))
    return with_rewards(
        config, [reward for reward in rewards if isinstance(reward, str | Mapping)], trains=trains
    ), functions
