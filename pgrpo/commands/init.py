"""``pgrpo init NAME``: copies a config, its recipe, and the files that the recipe uses to the current folder; or a recipe alone."""

from __future__ import annotations

import difflib
import json
import shutil
from pathlib import Path

from pgrpo.config import ConfigError, load_config, packaged
from pgrpo.config.rules import factories
from pgrpo.config.source import read_file

SCHEMA = Path(__file__).resolve().parents[1] / "config" / "schema.json"


def init(name: str, overwrite: bool = False) -> None:
    """Copy the files; print their names and the command that uses them. In YAMLs the first line names the schema for editors.

    Raises:
        ConfigError: there is no such config or recipe, or a file of that name exists already.
    """
    recipes, configs = (
        {path.stem: path for path in sorted(packaged(kind).glob("*.yaml"))} for kind in ("recipes", "configs")
    )
    known = recipes | configs
    name = name.removesuffix(".yaml")
    if (source := known.get(name)) is None:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"init {name}: no such config or recipe; {hint}configs: {', '.join(configs)}; recipes: {', '.join(recipes)}"
        )
    is_recipe = source.parent == packaged("recipes")
    stand_in = {"recipe": str(source), "run_dir": "x", "model": {"path": "x"}, "train": {"steps": 1}}
    copies = {Path(source.name): source}
    if named := source.name if is_recipe else read_file(source).values.get("recipe"):
        recipe = known[Path(named).stem]  # not one of this name in the current folder
        config = load_config(stand_in if is_recipe else source, [f"recipe={json.dumps(str(recipe))}"])
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
    if here and not overwrite:
        raise ConfigError(
            f"{', '.join(here)}: already in this folder; --overwrite replaces, or run this in another folder"
        )
    for target, file in copies.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".yaml":
            target.write_text(
                f"# yaml-language-server: $schema={SCHEMA}\n{file.read_text(encoding='utf-8')}", encoding="utf-8"
            )
        else:
            shutil.copyfile(file, target)
        print(f"{'replaced' if str(target) in here else 'wrote'} {target}")
    command = f"--config CONFIG recipe={source.name}" if is_recipe else f"--config {source.name}"
    print(f"\nEdit them, then: pgrpo train {command}")
