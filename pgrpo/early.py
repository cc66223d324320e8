"""Checks before torch, transformers and datasets are imported: rewards, files and folders that a config names must exist."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pgrpo.config import Config, ConfigError, check_world_size
from pgrpo.rewards.call import check_name


def check_early(config: Config, *, data_from_python: bool = False) -> None:
    """Raise ConfigError if a reward, the model folder or a data file does not exist. Opens none of them."""
    for i, reward in enumerate(config.rewards.functions):
        check_name(reward.function, f"rewards.functions[{i}].function")
    model = config.model.path
    if model.startswith((".", "/")) and not Path(model).is_dir():
        raise ConfigError(
            f"model.path={model}: there is no such folder; give a folder that from_pretrained loads, or a hub name"
        )
    for key, path in (("data.path", config.data.path), ("data.eval_path", config.data.eval_path)):
        is_file = re.search(r"\.(jsonl?|[ct]sv|parquet)(\.\w+)?$", path or "", re.IGNORECASE)
        if path and is_file and not (data_from_python and key == "data.path") and not Path(path).expanduser().is_file():
            raise ConfigError(
                f"{key}: no file {path}; correct the path, which is relative to the YAML or the current folder"
            )


def check_start(config: Config, resume: str | Path | None) -> None:
    """Raise ConfigError if the prompts do not divide over the ranks, or the checkpoint to resume from does not exist."""
    check_world_size(config, int(os.environ.get("WORLD_SIZE", "1")))
    if resume not in (None, "auto", "best") and not Path(resume).is_dir():
        folder = Path(resume).parent
        steps = ", ".join(sorted(path.name for path in folder.glob("step_*"))) or "none"
        raise ConfigError(f"no checkpoint at {resume}; steps that exist in {folder}: {steps}")
