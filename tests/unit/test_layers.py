"""A file imports only from lower layers, or from its own folder. Walks every import, also those inside functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = {
    0: {"types", "config"},
    1: {
        "attention",
        "advantages",
        "batch",
        "flops",
        "functions",
        "intervals",
        "leaving",
        "logprobs",
        "logprobs_triton",
        "loss",
        "record",
        "rng",
        "shards",
        "stopping",
        "deadline",
    },
    2: {"data", "distributed", "exactness", "layers", "lora", "metrics", "offload", "rewards", "trackers"},
    3: {"checkpoint", "evaluate", "optim", "policy", "rollout", "weights"},
    4: {"training"},
    5: {"commands", ""},  # "" is pgrpo/__init__.py, the Python face
    6: {"cli"},
    7: {"__main__"},
}
LAYER = {name: layer for layer, names in LAYERS.items() for name in names}
# The exceptions: a batch carries the layout that attention reads; a file's GPU kernels lie beside it.
SAME_LAYER = {("batch", "attention"), ("logprobs", "logprobs_triton")}
ONLY_IN = {
    "vllm": {"rollout/vllm_start.py"},
    "wandb": {"trackers/services.py"},
    "matplotlib": {"commands/plot.py"},
    "datasets": {"data/*"},
    "peft": {"lora.py"},
}
FILES = sorted((ROOT / "pgrpo").rglob("*.py"))


def unit(path: Path) -> str:
    """The part of the layer table that a file belongs to: 'loss' for loss.py, 'rollout' for rollout/base.py."""
    first = path.relative_to(ROOT / "pgrpo").parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imports(source: str) -> Iterator[tuple[str, str]]:
    """(module, name) of every import; the name is '' for ``import module``. Relative imports are not used here."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write absolute imports"
            yield from ((node.module or "", alias.name) for alias in node.names)


def violations(path: Path, source: str) -> list[str]:
    here, relative = unit(path), path.relative_to(ROOT / "pgrpo")
    if here not in LAYER:
        return [f"{relative}: give pgrpo.{here} a layer in {Path(__file__).name}"]
    layer, found = LAYER[here], []
    for module, name in imports(source):
        package, *rest = module.split(".")
        if package == "pgrpo":
            other = rest[0] if rest else name
            if other != here and (here, other) not in SAME_LAYER and LAYER.get(other, LAYER[""]) >= layer:
                found.append(f"{relative} (layer {layer}) imports pgrpo.{other} (layer {LAYER.get(other)})")
            if layer == 1 and other == "config" and name != "ConfigError":
                found.append(f"{relative}: layer 1 never sees a config object, only ConfigError")
        elif layer <= 1 and package in {"transformers", "datasets", "wandb", "vllm"}:
            found.append(f"{relative}: layer {layer} imports {package}")
        elif layer == 0 and package == "torch":
            found.append(f"{relative}: layer 0 imports torch")
        if package in ONLY_IN and not any(relative.match(pattern) for pattern in ONLY_IN[package]):
            found.append(f"{relative}: only {', '.join(ONLY_IN[package])} may import {package}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "pgrpo")))
def test_imports_only_lower_layers(path: Path) -> None:
    assert violations(path, path.read_text()) == []


@pytest.mark.parametrize(
    ("file", "source", "count"),
    [
        ("loss.py", "from pgrpo.types import Group", 0),
        ("loss.py", "from pgrpo.batch import build_batch", 1),
        ("loss.py", "from pgrpo.config import LossConfig", 1),
        ("functions.py", "from pgrpo.config import ConfigError", 0),
        ("loss.py", "def f():\n    import transformers", 1),
        ("config/load.py", "from pgrpo.config.rules import leaves", 0),
        ("config/load.py", "import torch.nn", 1),
        ("policy.py", "from pgrpo import rollout", 1),
        ("policy.py", "import pgrpo", 1),
        ("trackers/services.py", "import wandb", 0),
        ("train/loop.py", "import wandb", 1),
        ("train/loop.py", "from pgrpo.cli import app", 1),
        ("cli.py", "from pgrpo.commands.plot import plot", 0),
        ("novel.py", "", 1),
    ],
)
def test_the_rule_itself(file: str, source: str, count: int) -> None:
    assert len(violations(ROOT / "pgrpo" / file, source)) == count
