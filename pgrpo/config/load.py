"""``load_config``: merge defaults < preset < recipe < config file < ``key=value`` overrides, resolve and check the result."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pgrpo.config import secrets
from pgrpo.config.fields import PYTHON, ConfigError
from pgrpo.config.interpolation import check_interpolations
from pgrpo.config.presets import PRESETS
from pgrpo.config.rules import check_values, factories, leaves
from pgrpo.config.schema import Config
from pgrpo.config.source import Source, read_file, read_mapping, read_override
from pgrpo.config.strict_yaml import one_line
from pgrpo.config.task import RewardsConfig

RECIPE_SECTIONS = ("data", "prompt", "rollout", "rewards", "tools", "environment")
RECIPE_ROLLOUT = ("max_completion_tokens", "temperature", "top_p", "top_k", "stop")
FILES = re.compile(r"data\.(eval_)?path|(rewards\.functions|loss)\.function|tools|environment\.factory(\..*)?")
"""Keys that may name a file, relative to the YAML."""


def load_config(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    rewards_from_python: bool = False,
    data_from_python: bool = False,
    eval_data_from_python: bool = False,
    tools_from_python: bool = False,
    environment_from_python: bool = False,
    trains: bool = True,
) -> Config:
    """Read, merge, resolve and check a configuration.

    Args:
        source: a path, a name (see ``find_file``), or the contents as a mapping.
        overrides: ``key=value`` with the value in YAML; list items as in ``rewards.functions[0].weight=2``.
        rewards_from_python: the caller passes reward functions; the config may have none.
        data_from_python: the caller passes rows; ``data.path`` may be missing.
        eval_data_from_python: the caller passes held-out rows.
        tools_from_python: the caller passes tools, beside those of the config.
        environment_from_python: the caller passes an environment, instead of ``environment.factory``.
        trains: False for commands that only read a model: ``eval.every`` and ``checkpoint.keep_best`` have no effect there.

    Raises:
        ConfigError: the input is wrong; one line with the key, its value and the fix.
    """
    if not isinstance(source, str | Path | Mapping):
        raise ConfigError(
            f"config: {source!r:.80} is no config; give a YAML file, the name of one, or a mapping of keys"
        )
    main = read_mapping(source) if isinstance(source, Mapping) else read_file(find_file("configs", source))
    changes = [read_override(override) for override in overrides]
    recipe = dict(changes).get("recipe", main.values.get("recipe"))
    sources = [main] if recipe is None else [_read_recipe(recipe, main.folder), main]
    OmegaConf.register_resolver("now", lambda pattern: datetime.now().strftime(pattern), use_cache=True, replace=True)
    OmegaConf.register_resolver("oc.env", secrets.environment, replace=True)
    try:
        layers = [_anchored(item.values, item.folder) for item in sources]
        check_interpolations([*layers, *(_nested(key, value) for key, value in changes)])
        merged = _merge(layers, changes)
        if preset := merged.loss.preset:
            _refuse_idle_preset(preset, main, changes)
            merged = _merge([{"loss": PRESETS[preset]}, *layers], changes)
        if data_from_python and OmegaConf.is_missing(merged.data, "path"):
            merged.data.path = PYTHON
        if eval_data_from_python:
            merged.data.eval_path = PYTHON
        if tools_from_python and PYTHON not in merged.tools:
            merged.tools.append(PYTHON)
        if environment_from_python:
            merged.environment.factory = PYTHON
        _refuse_missing(merged, main)
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, OverflowError, RecursionError) as error:
        key = f"{full_key}: " if (full_key := getattr(error, "full_key", None)) else ""
        raise ConfigError(f"{key}{one_line(error)}; correct it, or write \\${{ for a literal ${{") from None
    assert isinstance(config, Config)
    config.secret_keys = _secret_keys(merged, config)
    for key, value in leaves(config):
        if secrets.is_named(key) and isinstance(value, str):
            secrets.remember(value)
    _finish_paths(config)
    check_values(config, rewards_from_python=rewards_from_python, trains=trains)
    return config


def with_rewards(config: Config, named: Sequence[str | Mapping[str, Any]], *, trains: bool = True) -> Config:
    """The config with more rewards: names, or mappings such as ``{"function": "math", "weight": 2.0}``."""
    if not named:
        return config
    given = [{"function": reward} if isinstance(reward, str) else dict(reward) for reward in named]
    for mapping in given:
        if callable(function := mapping.get("function")):
            name = getattr(function, "__name__", type(function).__name__)
            raise ConfigError(
                f"rewards: a mapping names its function, such as `file.py:{name}` or `module:{name}`, and runs it in a worker "
                f"process; {name} itself goes into the list without a mapping, and has weight 1"
            )
    source = read_mapping({"rewards": {"functions": given}})
    more: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RewardsConfig), source.values["rewards"]))
    functions = [*config.rewards.functions, *more.functions]
    config = replace(config, rewards=replace(config.rewards, functions=functions))
    _finish_paths(config)
    check_values(config, rewards_from_python=True, trains=trains)
    return config


def _merge(layers: Sequence[Mapping[str, Any]], changes: Sequence[tuple[str, Any]]) -> DictConfig:
    merged = OmegaConf.merge(_schema(), *layers)
    for key, value in changes:
        OmegaConf.update(merged, key, value, merge=True)
    assert isinstance(merged, DictConfig)
    return merged


@cache
def _schema() -> DictConfig:
    """All keys with their types and defaults, made once: it takes half of the time of loading a config. ``merge`` copies it."""
    return OmegaConf.structured(Config)


def _nested(key: str, value: Any) -> Any:
    """``a.b[0]`` and a value -> {a: {b: {0: value}}}."""
    for part in reversed(re.findall(r"\w+", key)):
        value = {part: value}
    return value


def to_yaml(config: Config) -> str:
    """Return the resolved config as YAML that ``load_config`` can read, with secrets replaced by '(redacted)'.

    The recipe is merged in. Its name becomes a comment, so that loading does not need the recipe.
    """
    values = asdict(config)
    del values["secret_keys"]
    values["recipe"] = None

    def clean(value: Any, key: str, name: str) -> Any:
        if key in config.secret_keys or (secrets.is_named(name) and isinstance(value, str)):
            return secrets.REDACTED
        if isinstance(value, dict):
            return {k: clean(v, f"{key}.{k}" if key else k, k) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [clean(v, f"{key}[{i}]", name) for i, v in enumerate(value)]
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value

    header = f"# Resolved; the recipe {config.recipe} is merged in.\n" if config.recipe else "# Resolved.\n"
    return header + OmegaConf.to_yaml(OmegaConf.create(clean(values, "", "")))


def packaged(kind: Literal["configs", "recipes"]) -> Path:
    """Return the folder of pgrpo's own configs or recipes: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return package / kind if (package / kind).is_dir() else package.parent / kind


def find_file(kind: Literal["configs", "recipes"], name: str | Path, beside: Path | None = None) -> Path:
    """Find a YAML file by path, else by name (with or without '.yaml') in ./KIND, ``beside`` and the packaged folder."""
    folders = [Path.cwd() / kind, *([beside] if beside else []), packaged(kind)]
    given = Path(name).expanduser()
    names = [given] if given.suffix in (".yaml", ".yml") else [given, given.with_name(f"{given.name}.yaml")]
    for path in [*names, *(folder / one for folder in folders for one in names)]:
        if path.is_file():
            return path
    if given.is_dir():
        inside = sorted(path.name for path in given.glob("*.y*ml"))
        raise ConfigError(
            f"{kind[:-1]} '{name}': is a folder; give a file{f', such as {given / inside[0]}' if inside else ''}"
        )
    known = sorted({path.stem for folder in folders if folder.is_dir() for path in folder.glob("*.y*ml")})
    near = difflib.get_close_matches(given.stem, known, n=1)
    fix = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(
        f"{kind[:-1]} '{name}': no such file; {fix}give a path, or one of: {', '.join(known) or 'none here'}"
    )


def _read_recipe(name: Any, beside: Path) -> Source:
    if not isinstance(name, str):
        raise ConfigError(f"recipe: {name!r} is not text; give a path or a name")
    recipe = read_file(find_file("recipes", name, beside))
    for section, values in recipe.values.items():
        if section not in RECIPE_SECTIONS:
            raise recipe.error(section, f"a recipe may set only {', '.join(RECIPE_SECTIONS)}; move this to the config")
        for key in values if section == "rollout" else ():
            if key not in RECIPE_ROLLOUT:
                only = f"a recipe may set only {', '.join(RECIPE_ROLLOUT)} of rollout; move this to the config"
                raise recipe.error(f"rollout.{key}", only)
    return recipe


def _anchored(value: Any, folder: Path, key: str = "") -> Any:
    """Return the values with data files and Python files in the source's folder as absolute paths."""
    if isinstance(value, dict):
        return {name: _anchored(item, folder, f"{key}.{name}".lstrip(".")) for name, item in value.items()}
    if isinstance(value, list):
        return [_anchored(item, folder, key) for item in value]
    return _anchor(value, folder) if FILES.fullmatch(key) else value


def _anchor_all(value: Any, folder: Path) -> Any:
    """Anchor a name, or the values of a mapping."""
    return {k: _anchor(v, folder) for k, v in value.items()} if isinstance(value, dict) else _anchor(value, folder)


def _anchor(value: Any, folder: Path) -> Any:
    """Make a path to an existing file, or ``file.py:function`` with an existing file, absolute. Return other values unchanged."""
    if not isinstance(value, str):
        return value
    stem, python, function = value.partition(".py:")
    path = folder / Path(f"{stem}.py" if python else value).expanduser()
    return f"{path.resolve()}{':' + function if python else ''}" if path.is_file() else value


def _finish_paths(config: Config) -> None:
    """Make existing files and the model folder absolute. ConfigError if a Python file is missing."""
    config.run_dir = str(Path(config.run_dir).expanduser())
    if config.model.path.startswith("~"):
        config.model.path = str(Path(config.model.path).expanduser())
    for owner, name in ((config.model, "path"), (config.loss, "teacher")):
        if (path := getattr(owner, name)) and Path(path).is_dir():
            setattr(owner, name, str(Path(path).absolute()))
    config.tools = [_anchor(tool, Path.cwd()) for tool in config.tools]
    config.environment.factory = _anchor_all(config.environment.factory, Path.cwd())
    code = {f"tools[{i}]": tool for i, tool in enumerate(config.tools)} | factories(config.environment.factory)
    for key, value in code.items():
        _refuse_missing_python(key, value)
    targets = [(config.data, "path", "data.path"), (config.data, "eval_path", "data.eval_path")]
    targets += [(config.loss, "function", "loss.function")]
    targets += [(f, "function", f"rewards.functions[{i}].function") for i, f in enumerate(config.rewards.functions)]
    for owner, name, key in targets:
        value = _anchor(getattr(owner, name), Path.cwd())
        setattr(owner, name, value)
        _refuse_missing_python(key, value)


def _refuse_missing_python(key: str, value: Any) -> None:
    file, python, _ = value.partition(".py:") if isinstance(value, str) else ("", "", "")
    if python and not Path(f"{file}.py").is_file():
        raise ConfigError(
            f"{key}: {value}: no {file}.py beside the YAML that names it or in the current folder; correct the path"
        )


def _refuse_missing(merged: DictConfig, main: Source) -> None:
    if missing := sorted(OmegaConf.missing_keys(merged)):
        place = f"in {main.name} or as" if main.name else "in the mapping or as"
        raise ConfigError(f"{', '.join(missing)}: no value; set it {place} an override, such as {missing[0]}=VALUE")


def _refuse_idle_preset(preset: str, main: Source, changes: Sequence[tuple[str, Any]]) -> None:
    """Raise ConfigError for a preset override of a file that sets all of the preset's keys, such as a run's own config.yaml."""
    explicit = main.values.get("loss") or {}
    overridden = [key for key, value in changes if key == "loss.preset" and value != explicit.get("preset")]
    if overridden and PRESETS[preset].keys() <= explicit.keys():
        raise ConfigError(
            f"loss.preset: {preset} changes nothing, {main.name or 'the mapping'} sets all of its keys; "
            f"remove {', '.join(PRESETS[preset])} from its section loss"
        )


def _secret_keys(merged: DictConfig, config: Config) -> frozenset[str]:
    """Return the keys whose value came from the environment, directly or through another key."""
    raw, resolved = OmegaConf.to_container(merged, resolve=False), dict(leaves(config))
    interpolations = {key: text for key, text in leaves(raw) if isinstance(text, str) and "${" in text}
    secret = {key for key, text in interpolations.items() if "oc.env" in text}
    values = [str(resolved[key]) for key in secret if resolved.get(key)]
    return frozenset(
        secret | {key for key in interpolations if any(value in str(resolved.get(key)) for value in values)}
    )
