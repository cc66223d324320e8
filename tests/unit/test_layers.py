"""A file imports only from lower layers, and no file imports itself by way of others.

Walks every import, those inside functions and under TYPE_CHECKING too."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "pgrpo"
LAYERS = [  # bottom first; a file imports from its own folder and from those before it
    "types", "config", "process", "algorithm", "attention", "vision", "packing", "sandbox", "tracking", "planning", "distributed",
    "model", "admission",
    "rewards", "data", "rollout", "environments", "checkpoint", "placement", "training", "grpo", "early", "commands",
    "", "cli", "__main__",
]  # fmt: skip
"""A folder or a file at the top; "" is pgrpo/__init__.py, the Python face."""
PURE = {"types", "algorithm", "attention", "packing"}
"""Tensors in, tensors out: these import no package that models, data or engines come from."""
ONLY_IN = {
    "vllm": {"rollout/vllm/start.py", "rollout/vllm/shared_backend.py"},
    "wandb": {"tracking/services.py"},
    "matplotlib": {"commands/plot.py"},
    "datasets": {"data/*"},
    "peft": {"model/lora.py"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def unit(module: str) -> str:
    """The entry of LAYERS that a module of pgrpo belongs to: 'rollout' for pgrpo.rollout.base."""
    path = module.removeprefix("pgrpo").strip(".").replace(".", "/")
    return path if path in LAYERS else path.split("/")[0]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str) -> Iterator[tuple[str, str]]:
    """(module, name) of every import; the name is '' for ``import module``. Relative imports are not used here."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write absolute imports"
            yield from ((node.module or "", alias.name) for alias in node.names)


def own_imports(source: str) -> set[str]:
    """Modules of pgrpo that a file imports: ``from pgrpo.rollout import base`` gives pgrpo.rollout.base."""
    known = {module_of(path) for path in FILES}
    found = set()
    for module, name in imports(source):
        if module.split(".")[0] == "pgrpo":
            found.add(f"{module}.{name}" if f"{module}.{name}" in known else module)
    return found


def violations(path: Path, source: str) -> list[str]:
    relative, here = str(path.relative_to(PACKAGE)), unit(module_of(path))
    if here not in LAYERS:
        return [f"{relative}: give {here} a place in LAYERS of {Path(__file__).name}"]
    above = LAYERS[LAYERS.index(here) + 1 :]
    found = [
        f"{relative} imports {other}, which lies above it" for other in own_imports(source) if unit(other) in above
    ]
    for module, _ in imports(source):
        package = module.split(".")[0]
        if here in PURE and package in {"transformers", "datasets", "wandb", "vllm"}:
            found.append(f"{relative} imports {package}")
        if here in {"types", "config"} and package == "torch":
            found.append(f"{relative} imports torch")
        if package in ONLY_IN and not any(path.relative_to(PACKAGE).match(pattern) for pattern in ONLY_IN[package]):
            found.append(f"{relative}: only {', '.join(ONLY_IN[package])} may import {package}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_from_lower_layers_only(path: Path) -> None:
    assert violations(path, path.read_text()) == []


def test_no_file_imports_itself_by_way_of_others() -> None:
    graph = {module_of(path): own_imports(path.read_text()) for path in FILES}
    assert cycle(graph) is None


def cycle(graph: dict[str, set[str]]) -> list[str] | None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


@pytest.mark.parametrize(
    ("file", "source", "count"),
    [
        ("algorithm/loss.py", "from pgrpo.types import Group", 0),
        ("algorithm/loss.py", "from pgrpo.packing.batch import build_batch", 1),
        ("algorithm/loss.py", "from pgrpo.config import LossConfig", 0),
        ("algorithm/loss.py", "def f():\n    import transformers", 1),
        ("config/load.py", "from pgrpo.config.rules import leaves", 0),
        ("config/load.py", "import torch.nn", 1),
        ("model/policy.py", "from pgrpo import rollout", 1),
        ("model/policy.py", "import pgrpo", 1),
        ("planning/memory.py", "from pgrpo.placement import sizes", 1),
        ("tracking/services.py", "import wandb", 0),
        ("training/update.py", "import wandb", 1),
        ("training/update.py", "from pgrpo.cli import app", 1),
        ("cli.py", "from pgrpo.commands.plot import plot", 0),
        ("novel.py", "", 1),
    ],
)
def test_the_rule_itself(file: str, source: str, count: int) -> None:
    assert len(violations(PACKAGE / file, source)) == count


def test_a_circle_is_found() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": set()}) is None
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) is not None


DISTRIBUTIONS = {
    **packages_distributions(),
    "torch.utils.tensorboard": ["tensorboard"],
    "flash_attn": ["flash-attn-4"],
    "fla": ["fla-core"],
}
BROUGHT = ("pgrpo", "triton", "prefix_grouper")
"""Not declared: torch's GPU builds bring their own triton, and ``pgrpo bench`` compares with prefix_grouper where it is found."""

LOADED_BY_VLLM = {"shared_backend.py"}
"""Its classes are vLLM's, which loads it by its path."""


def third_party(source: str, *, everywhere: bool) -> set[str]:
    """Packages, as pyproject.toml names them, that a file imports: at its top level, or ``everywhere`` in it, and by
    ``import_module``."""
    tree = ast.parse(source)
    nodes = list(ast.walk(tree)) if everywhere else tree.body
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    modules |= {
        call.args[0].value
        for call in nodes
        if isinstance(call, ast.Call) and ast.unparse(call.func).rpartition(".")[2] == "import_module"
        if call.args and isinstance(call.args[0], ast.Constant) and isinstance(call.args[0].value, str)
    }
    found = set()
    for module in modules:
        module = module if module in DISTRIBUTIONS else module.split(".")[0]
        if module not in sys.stdlib_module_names and module not in BROUGHT:
            found.add(normal(DISTRIBUTIONS.get(module, [module])[0]))
    return found


def normal(requirement: str) -> str:
    """'flash-attn-4' of 'flash_attn_4[cu13]==4.0'."""
    return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")


def test_imports_and_declared_dependencies_agree():
    """A package that pgrpo imports is declared; one of an extra is imported only where it is needed, inside a function; and
    nothing is declared that is not imported, but for what a user's own module imports."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    core = {normal(requirement) for requirement in project["dependencies"]}
    extras = {name: {normal(r) for r in given} for name, given in project["optional-dependencies"].items()}
    optional = set().union(*(given for name, given in extras.items() if name != "dev"))
    everywhere = set().union(*(third_party(path.read_text(), everywhere=True) for path in FILES))
    at_once = set().union(
        *(third_party(path.read_text(), everywhere=False) for path in FILES if path.name not in LOADED_BY_VLLM)
    )
    assert everywhere - optional == core
    assert at_once & optional == set()
    assert {name for name, given in extras.items() if name != "dev" and not given & everywhere} == {"openenv"}


def test_an_undeclared_import_is_noticed():
    assert third_party("def f():\n    import yaml, json\n    import_module('flash_attn.cute')", everywhere=True) == {
        "pyyaml", "flash-attn-4"
    }  # fmt: skip
    assert third_party("import regex\ndef f():\n    import yaml", everywhere=False) == {"regex"}
