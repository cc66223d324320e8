"""What shared decoding touches of vLLM is there, in the installed release's source. No GPU, and nothing of vLLM is imported."""

from __future__ import annotations

import ast
import importlib.util
import os
from pathlib import Path

import pytest

from pgrpo.rollout.vllm.shared_decode import TOUCHED

pytestmark = pytest.mark.vllm


def source() -> Path:
    """The folder of the vLLM that is installed here, or that PGRPO_VLLM_SOURCE names: an unpacked wheel of another release."""
    if given := os.environ.get("PGRPO_VLLM_SOURCE"):
        return Path(given)
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def found(tree: ast.Module, name: str) -> list[str] | None:
    """Parameters of a function, in order, or names that a class binds; None if there is no such name."""
    body: list[ast.stmt] = tree.body
    for part in name.split("."):
        named = [node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == part]
        if not named:
            return None
        node = named[0]
        body = node.body
    if isinstance(node, ast.FunctionDef):
        return [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    bound = [target for each in body if isinstance(each, ast.Assign) for target in each.targets]
    bound += [each.target for each in body if isinstance(each, ast.AnnAssign)]
    return [target.id for target in bound if isinstance(target, ast.Name)]


@pytest.mark.parametrize(("file", "name"), [(file, name) for file, names in TOUCHED.items() for name in names])
def test_names_and_signatures_are_those_that_are_listed(file: str, name: str) -> None:
    tree, listed = ast.parse((source() / file).read_text()), TOUCHED[file][name]
    there = found(tree, name)
    assert there is not None, f"{file} has no {name}"
    if listed is None:
        return
    if name.rpartition(".")[2][0].isupper():  # a class: members that are read
        assert set(listed) <= set(there)
    else:
        assert listed == there
