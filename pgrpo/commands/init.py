"""``pgrpo init NAME``: copies a config, its recipe, and the files that the recipe uses to the current folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from pgrpo.config import ConfigError, find_file, load_config
from pgrpo.config.rules import factories


def init(name: str) -> None:
    """Copy the files; print their names and the command that uses them.

    Raises:
        ConfigError: a file of that name exists already.
    """
    source = find_file("configs", name)
    config = load_config(source)
    copies = {Path(source.name): source}
    if config.recipe:
        recipe = find_file("recipes", config.recipe, source.parent)
        copies[Path(recipe.name)] = recipe
        used = [
            config.data.path,
            config.data.eval_path or "",
            *(reward.function for reward in config.rewards.functions),
            *config.tools,
            *factories(config.environment.factory).values(),
        ]
        for value in used:
            file = Path(value.partition(".py:")[0] + ".py" if ".py:" in value else value)
            if file.is_file() and file.resolve().is_relative_to(recipe.parent.resolve()):
                copies[file.resolve().relative_to(recipe.parent.resolve())] = file
    here = [str(target) for target in copies if target.exists()]
    if here:
        raise ConfigError(f"{', '.join(here)}: already in this folder; rename or remove, or run this in another folder")
    for target, file in copies.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
        print(f"wrote {target}")
    print(f"\nEdit them, then: pgrpo train --config {source.name}")
