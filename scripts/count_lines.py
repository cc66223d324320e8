"""Print code lines by area: lines with code on them, without blank lines, comments and docstrings.

python scripts/count_lines.py           # the package, its core first
python scripts/count_lines.py --files   # a line a file below each area
"""

from __future__ import annotations

import sys
import tokenize
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "pgrpo"
CORE = (
    "grpo.py",
    "types.py",
    "algorithm",
    "packing",
    "attention",
    "model",
    "rollout/base.py",
    "rollout/embedded",
    "distributed",
)
NOT_CORE = ("attention/kernels", "model/kernels", "model/families")
MOST_CORE_LINES = 2500
NO_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER,
}  # fmt: skip


def code_lines(path: Path) -> int:
    """Lines of a Python file with code on them. A statement that is nothing but a string is a docstring, also below a field."""
    with path.open("rb") as file:
        tokens = [
            token for token in tokenize.tokenize(file.readline) if token.type not in (tokenize.COMMENT, tokenize.NL)
        ]
    lines: set[int] = set()
    for before, token, after in zip(tokens, tokens[1:], tokens[2:], strict=False):
        is_docstring = token.type == tokenize.STRING and before.type in NO_CODE and after.type == tokenize.NEWLINE
        if token.type not in NO_CODE and not is_docstring:
            lines.update(range(token.start[0], token.end[0] + 1))
    return sum(bool(text.strip()) for i, text in enumerate(path.read_text("utf-8").split("\n"), 1) if i in lines)


def area(path: Path) -> str:
    """``core: attention``, ``rewards``, ...: the area of a file, given relative to the package."""

    def within(folders: tuple[str, ...]) -> bool:
        return any(path.is_relative_to(folder) for folder in folders)

    if within(CORE) and not within(NOT_CORE):
        return f"core: {path.parent if len(path.parts) > 1 else path}"
    return str(path.parent) if len(path.parts) > 1 else "(top)"


def main() -> None:
    files: dict[str, dict[str, int]] = defaultdict(dict)
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT)
        files[area(name)][str(name)] = code_lines(path)
    core = sum(sum(counts.values()) for name, counts in files.items() if name.startswith("core"))
    for name, counts in sorted(files.items(), key=lambda item: (not item[0].startswith("core"), item[0])):
        print(f"{sum(counts.values()):6,}  {name}")
        for file, count in counts.items() if "--files" in sys.argv[1:] else ():
            print(f"        {count:6,}  {file}")
    print(f"{core:6,}  the core, of at most {MOST_CORE_LINES:,}")
    print(f"{sum(sum(counts.values()) for counts in files.values()):6,}  the package")


if __name__ == "__main__":
    main()
