"""The README.md of an exported model: what it was trained from, on what, how, and its curve."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from pgrpo.commands.curves import read_metrics
from pgrpo.commands.plot import draw
from pgrpo.config import ConfigError, redact

SHOWN = ("reward", "eval/reward", "eval/pass@1", "eval/greedy/pass@1")
"""Metrics of the table; the curve has these and pass@k."""


def write_card(run_dir: Path, step: int, out: Path, name: str) -> None:
    """Write README.md and, if steps were logged, curve.png into the folder of an exported model.

    Args:
        run_dir: the run; its config.yaml has no secrets.
        step: of the exported checkpoint.
        out: the folder.
        name: of the model.
    """
    config = _without_folders(yaml.safe_load(redact((run_dir / "config.yaml").read_text(encoding="utf-8"))))
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    base, data = config["model"]["path"], config.get("data", {}).get("path", "?")
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["grpo", "pgrpo"],
    }
    front |= {"base_model": base} if _is_hub_name(base) else {}
    front |= {"datasets": [data]} if _is_hub_name(data) else {}
    rewards = [reward.get("function") for reward in config.get("rewards", {}).get("functions", [])]
    lines = [
        "---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", f"# {name}", "",
        f"`{base}`, trained by GRPO ([arXiv 2402.03300](https://arxiv.org/abs/2402.03300)) with pgrpo {version('pgrpo')}: "
        f"the weights after step {step}.", "", f"- Base model: `{base}`", f"- Data: `{data}`",
        f"- Rewards: {', '.join(f'`{name}`' for name in rewards) or 'functions given from Python'}", "",
        *_curve(run_dir, step, out), "## Config", "", "```yaml", text.strip(), "```", "",
    ]  # fmt: skip
    (out / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _curve(run_dir: Path, step: int, out: Path) -> list[str]:
    try:
        rows = [row for row in read_metrics(run_dir) if row["step"] <= step]
    except ConfigError:  # no step has been logged
        return []
    drawn = [{k: v for k, v in row.items() if k in ("step", *SHOWN) or k.startswith("eval/pass@")} for row in rows]
    measured = {name: [row for row in rows if isinstance(row.get(name), int | float)] for name in SHOWN}
    if not measured["reward"]:
        return []
    draw({f"step 1 to {step}": drawn}).savefig(out / "curve.png", dpi=120)
    table = ["| metric | first | last |", "|---|---|---|"]
    table += [
        f"| {name} | {_cell(some[0], name)} | {_cell(some[-1], name)} |" for name, some in measured.items() if some
    ]
    return ["## Curve", "", "![reward](curve.png)", "", *table, ""]


def _cell(row: Mapping[str, Any], name: str) -> str:
    return f"{row[name]:.4g} (step {row['step']})"


def _without_folders(value: Any) -> Any:
    """The same config with the last part alone of every absolute path: cards are published, folders of a host and its users not."""
    if isinstance(value, dict):
        return {name: _without_folders(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_without_folders(one) for one in value]
    return Path(value).name if isinstance(value, str) and re.fullmatch(r"[/~]\S*/\S+", value) else value


def _is_hub_name(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "~", "/")) and ":" not in path and not Path(path).exists()
