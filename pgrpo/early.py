"""Checks before torch, transformers and datasets are imported: rewards, files and folders that a config names must exist."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import yaml

from pgrpo.config import Config, ConfigError, check_world_size
from pgrpo.process.second import ahead_codes
from pgrpo.rewards.call import check_name

GPU = Path("/dev/nvidiactl")
"""Is there where NVIDIA's driver is."""


def check_early(config: Config, *, data_from_python: bool = False) -> None:
    """Raise ConfigError if a reward, the model folder or a data file does not exist. Opens none of them."""
    for i, reward in enumerate(config.rewards.functions):
        check_name(reward.function, f"rewards.functions[{i}].function")
    check_model_folder(config)
    for key, path in (("data.path", config.data.path), ("data.eval_path", config.data.eval_path)):
        is_file = re.search(r"\.(jsonl?|[ct]sv|parquet)(\.\w+)?$", path or "", re.IGNORECASE)
        if path and is_file and not (data_from_python and key == "data.path") and not Path(path).expanduser().is_file():
            raise ConfigError(
                f"{key}: no file {path}; correct the path, which is relative to the YAML or the current folder"
            )


def check_model_folder(config: Config) -> None:
    """Raise ConfigError if ``model.path`` is the path of a folder that does not exist."""
    model = config.model.path
    if model.startswith((".", "/")) and not Path(model).is_dir():
        raise ConfigError(
            f"model.path={model}: there is no such folder; give a folder that from_pretrained loads, or a hub name"
        )


def config_of_run(run_dir: Path, option: str = "") -> Path:
    """The config.yaml of a run's folder. ConfigError: there is none; ``option`` is what the user typed in front of the folder."""
    file = run_dir / "config.yaml"
    if file.is_file():
        return file
    what = "it has no config.yaml" if run_dir.is_dir() else "there is no such folder"
    around = [folder for folder in run_dir.absolute().parents[:2] if (folder / "config.yaml").is_file()]
    fix = f"the run that it belongs to is {around[0]}" if around else "give what was run_dir of a training"
    raise ConfigError(f"{option}{run_dir}: not a run folder, {what}; {fix}")


def check_folder_to_write(folder: Path, option: str = "") -> None:
    """Raise ConfigError if a folder cannot be made, or cannot be written. ``option``: as of ``config_of_run``."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(f"{option}{folder}: {there} is a file; give a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{option}{folder}: {there} cannot be written; give another folder")


def check_start(config: Config, resume: str | Path | None) -> None:
    """Raise ConfigError if the prompts do not divide over the ranks, or there is no checkpoint to resume from."""
    check_world_size(config, int(os.environ.get("WORLD_SIZE", "1")))
    check_checkpoint(config, "--resume", resume)


def check_checkpoint(config: Config, option: str, name: str | Path | None) -> None:
    """Raise ConfigError if ``option`` (--resume or --checkpoint) names no checkpoint, or one of other adapters. A name is ``auto``,
    for which there need be none, ``best``, a checkpoint's folder, or the folder of a run or of its checkpoints. Damaged files are
    not noticed."""
    if name is None:
        return
    own = Path(config.run_dir).expanduser() / "checkpoints"
    if name == "best":
        _check_best(own, option)
    is_own = name in ("auto", "best")
    given = own if is_own else Path(name).expanduser()
    newest = _newest(given) if str(name) else None
    if newest is not None:
        _check_adapters(config, f"{option} {name}", newest)
    if newest is not None or is_own:
        return
    folders = dict.fromkeys((own, given.parent))
    others = {f: [name for name in _steps(f) if (f / name).resolve() != given.resolve()] for f in folders}
    steps = "; ".join(f"{folder} has {', '.join(names)}" for folder, names in others.items() if names)
    what = "there is no such folder"
    if not str(name):
        what = "an empty name"
    elif given.is_file():
        what = "a file, and a checkpoint is a folder"
    elif (given / "config.json").is_file():
        what = f"a model, which model.path={name} loads, and no checkpoint of a run"
    elif given.name in _steps(given.parent):
        what = "that checkpoint is not whole, it has no manifest.json"
    elif given.is_dir():
        what = "no checkpoint in that folder"
    if not steps and config.run_dir != "none":  # which ``generate --model`` sets
        steps = f"there is none in {own} either"
    raise ConfigError(
        f"{option} {name}: {what}; {f'{steps}; ' if steps else ''}give the folder of a step_N or of a run, auto or best"
    )


def early_codes(cache_dir: str | None, world_size: int) -> tuple[str, ...]:
    """Codes of the processes that compile ahead of a run, if they are likely to be needed: there is a GPU, for this process alone,
    and the folder for compiled code tells of none that was done before. If not, the run starts them when it knows more."""
    root = Path(cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "pgrpo").expanduser()
    is_likely = world_size == 1 and GPU.exists() and not any(root.glob("*/compiled_ahead"))
    return ahead_codes(cache_dir) if is_likely else ()


def _steps(folder: Path) -> list[str]:
    """Names of the checkpoints in ``folder``, oldest first."""
    names = (path.name for path in folder.glob("step_*") if path.is_dir() and not path.is_symlink())
    return sorted((name for name in names if re.fullmatch(r"step_\d+", name)), key=lambda name: int(name[5:]))


def _newest(given: Path) -> Path | None:
    """The checkpoint that is ``given``, or the newest of the run or in the folder."""
    if (given / "manifest.json").is_file():
        return given
    found = [folder / steps[-1] for folder in (given / "checkpoints", given) if (steps := _steps(folder))]
    return found[0] if found else None


def _check_adapters(config: Config, asked: str, checkpoint: Path) -> None:
    """Refuse a checkpoint of adapters of another rank. What cannot be read is left to whoever opens it."""
    try:
        scalars = json.loads((checkpoint / "scalars.json").read_text(encoding="utf-8"))
        rank = yaml.safe_load(scalars["config"])["model"]["lora_rank"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return
    if rank != config.model.lora_rank:
        raise ConfigError(
            f"{asked}: {checkpoint} was saved with model.lora_rank={rank}, and here it is {config.model.lora_rank}; set "
            f"model.lora_rank={rank}, or start a run from the model"
        )


def _check_best(folder: Path, option: str) -> None:
    """Refuse ``best`` where the newest checkpoint names no best one. A damaged one is left to whoever opens it."""
    if not (steps := _steps(folder)):
        raise ConfigError(f"{option} best: {folder} has no checkpoint; correct run_dir, or leave {option} out")
    try:
        best = json.loads((folder / steps[-1] / "scalars.json").read_text(encoding="utf-8"))["best"]
        name = None if best is None else f"step_{best['step']}"
    except (OSError, ValueError, KeyError, TypeError):
        return
    if name is None:
        raise ConfigError(
            f"{option} best: {folder / steps[-1]} has no best checkpoint; train with checkpoint.keep_best=eval/reward, or "
            f"give {option} auto"
        )
    if name not in steps:
        raise ConfigError(f"{option} best: {folder / name} is not there; {folder} has {', '.join(steps)}")
