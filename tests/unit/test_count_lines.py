"""scripts/count_lines.py: what counts as a line of code, and which files are the core."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

SCRIPT = runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "count_lines.py"))
CODE = '''"""A docstring,

over three lines."""

import os  # 1

# a comment
class A:  # 2
    """One more."""

    x: int = 1  # 3
    """Below a field."""


def f(a):  # 4
    # before a docstring
    "a docstring"
    text = """one

    two"""  # 5 and 6, not the blank one
    return (  # 7
        # a comment
        "not a docstring"  # 8
    )  # 9
'''


def test_blank_lines_comments_and_docstrings_are_no_code(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(CODE)
    assert SCRIPT["code_lines"](tmp_path / "a.py") == 9


@pytest.mark.parametrize(
    ("file", "area"),
    [
        ("grpo.py", "core: grpo.py"),
        ("attention/hook.py", "core: attention"),
        ("attention/kernels/flash.py", "attention/kernels"),
        ("model/logit_rows.py", "core: model"),
        ("model/kernels/logits.py", "model/kernels"),
        ("model/families/windows.py", "model/families"),
        ("rollout/base.py", "core: rollout"),
        ("rollout/text.py", "rollout"),
        ("rollout/embedded/engine.py", "core: rollout/embedded"),
        ("cli.py", "(top)"),
    ],
)
def test_the_core_is_what_the_design_names(file: str, area: str) -> None:
    assert SCRIPT["area"](Path(file)) == area
