"""README.md and docs/ name what exists: tests, files, images, headings, config keys, recipes, scripts and commands."""

from __future__ import annotations

import ast
import asyncio
import importlib
import inspect
import re
import runpy
import shlex
import textwrap
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest
import typer.main
import yaml
from making import flat_layout

from pgrpo.attention.reference import attention_mask
from pgrpo.cli import app
from pgrpo.config import load_config
from pgrpo.config.functions import load_function
from pgrpo.config.names import suggest
from pgrpo.config.source import valid_keys
from pgrpo.data.sources import read_rows
from pgrpo.environments.long_form import Ended
from pgrpo.rewards.call import BUILT_IN

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GUIDES = ("from_trl.md", "from_verl.md")
"""Pages that name keys of other trainers; test_config_docs.py compares them."""
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"")
KEYS = set(valid_keys())
SECTIONS = {key.partition(".")[0] for key in KEYS if "." in key}


def words(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def command_lines(page: Path) -> list[str]:
    """Lines of code blocks and inline code that begin with a command, continuation lines joined."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", words(page))]
    blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    lines = [line.strip() for language, block in blocks if not language for line in block.splitlines()] + inline
    return [line for line in lines if re.match(r"(pgrpo|python|torchrun|make|pytest|scripts/|\.?/?pip) ?", line)]


def anchors(page: Path) -> set[str]:
    """Headings as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", words(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_has_at_most_200_lines() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_and_images_of_a_page_exist(page: Path) -> None:
    for match in LINK.finditer(words(page)):
        target, _, anchor = (match[1] or match[2]).partition("#")
        if target.startswith(("http://", "https://")):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name}: {target}"
        assert ROOT in file.parents, f"{page.name}: {target} lies outside of the repository"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}#{anchor}"


def test_the_table_of_contents_has_every_page() -> None:
    contents = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {page.name for page in PAGES if page.parent.name == "docs"} - {"README.md"}
    assert {name for name in pages if f"({name})" in contents} == pages


def test_every_image_in_docs_is_shown() -> None:
    shown = {Path(match[1] or match[2]).name for page in PAGES for match in LINK.finditer(words(page))}
    assert {file.name for file in (ROOT / "docs").iterdir() if file.suffix in (".png", ".svg")} <= shown


def test_the_figure_is_what_its_script_draws_and_its_mask_is_that_of_the_packed_batch(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "make_figure.py"))
    script["main"](tmp_path)
    # Another version of matplotlib may draw the same figure with other numbers.
    locked = f"matplotlib=={version('matplotlib')}" in (ROOT / "requirements.lock").read_text().split()
    for theme in ("light", "dark"):
        drawn, shown = ((folder / f"method_{theme}.svg").read_bytes() for folder in (tmp_path, ROOT / "docs"))
        assert drawn == shown or not locked, "run python scripts/make_figure.py"
    lengths = [prompt for _, prompt, _ in script["GROUPS"]], [list(completions) for *_, completions in script["GROUPS"]]
    computed = attention_mask(flat_layout(*lengths))
    assert (script["mask"]()[..., 3] > 0).tolist() == computed.tolist()
    assert len(computed) == script["PACKED"]


# --- faults


@cache
def functions_of(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def fault_rows() -> dict[int, list[tuple[str, str]]]:
    """Number of the row -> (test, file) of its last cell."""
    lines = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split(" | ") for line in lines if re.match(r"\| \d+ \|", line)]
    return {int(row[0].strip("| ")): re.findall(r"\[`(\w+)`\]\(([^)]+)\)", row[-1]) for row in rows}


def test_every_fault_has_a_number_and_a_test() -> None:
    rows = fault_rows()
    assert len(rows) >= 65
    assert sorted(rows) == list(range(1, len(rows) + 1))
    assert all(rows.values())


def test_every_test_that_the_faults_name_exists_in_its_file() -> None:
    named = re.findall(r"\[`(test_\w+)`\]\(([^)]+)\)", (ROOT / "docs" / "faults.md").read_text(encoding="utf-8"))
    assert len(named) > 100
    missing = [name for name, file in named if name not in functions_of((ROOT / "docs" / file).resolve())]
    assert not missing


def test_no_test_is_named_after_a_row() -> None:
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    assert not [name for file in files for name in functions_of(file) if re.search(r"row_?\d", name)]


# --- commands and keys


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in GUIDES], ids=lambda page: page.name)
def test_config_keys_in_a_page_exist(page: Path) -> None:
    keys = re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:[:=][^`]*)?`", words(page))
    keys += re.findall(r"(?<=\s)([a-z_]+(?:\.[a-z_]+)+)(?==)", "\n".join(command_lines(page)))
    for key in keys:
        if key.partition(".")[0] in SECTIONS and not key.endswith((".py", ".md", ".yaml", ".json")):
            # The README's short table names keys of verl too; each is answered with one of ours.
            theirs = page.parent == ROOT and suggest(key, valid_keys()).startswith("here it is ")
            assert key in KEYS or theirs, f"{page.name}: {key}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_a_page_exist(page: Path) -> None:
    commands = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    options = {name: {o for p in command.params for o in p.opts} for name, command in commands.items()}
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for line in command_lines(page):
        parts = shlex.split(line.replace("\\", " "), comments=True)
        if parts[0] == "make":
            assert parts[1] in targets, f"{page.name}: {line}"
        if "pgrpo" in parts[:-1]:
            name, *rest = parts[parts.index("pgrpo") + 1 :]
            if name == "NAME":
                continue
            assert name in commands, f"{page.name}: {line}"
            own = [part for part in rest if part.startswith("--")]
            assert set(own) <= options[name] | {"--help"}, f"{page.name}: {line}"
        for part in parts:
            if re.match(r"(scripts|configs|recipes|benchmarks|tests|docs)/\w", part):
                assert (ROOT / part.rstrip("/")).exists(), f"{page.name}: {part}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_names_in_a_page_exist(page: Path) -> None:
    for code in re.findall(r"`([^`\s]+)`", words(page)):
        if re.match(r"(pgrpo|scripts|configs|recipes|benchmarks|tests|docs)/[\w/.-]*$", code):
            assert (ROOT / code.rstrip("/")).exists(), f"{page.name}: {code}"
    configs = {file.stem for file in (ROOT / "configs").glob("*.yaml")}
    for line in command_lines(page):
        for name in re.findall(r"(?:--config|pgrpo init) ([\w.]+)", line):
            own = re.search(rf"^# {re.escape(name)}$", page.read_text(encoding="utf-8"), re.MULTILINE)
            assert name in ("FILE", "NAME") or own or name.removesuffix(".yaml") in configs, f"{page.name}: {line}"


@pytest.mark.parametrize("page", ["README.md", "docs/tasks.md"])
def test_the_task_that_a_page_shows_loads_and_scores(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(
        r"^ *```(\w+)\n(.*?)^ *```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    texts = [(language, textwrap.dedent(text)) for language, text in blocks]
    (tmp_path / "my_rows.jsonl").write_text(next(text for language, text in texts if language == "json"))
    for _, text in texts:
        if named := re.match(r"# (my_\w+\.\w+)\n", text):
            (tmp_path / named[1]).write_text(text)
    monkeypatch.chdir(tmp_path)
    config = load_config("smollm2_135m.yaml", ["recipe=my_task.yaml", "eval.every=0"])
    rows, _ = read_rows(config.data, held_out=False)
    messages = [message.content.format(**rows[0]) for message in config.prompt.messages]
    assert messages == ["What is 3 times 4?"]
    right = load_function(config.rewards.functions[0].function, "function")
    assert right(completions=["It is 12.", "11"], answer=["12", "12"]) == [1.0, 0.0]


@pytest.mark.parametrize("page", ["README.md", "docs/tasks.md"])
def test_the_commands_for_the_task_of_a_page_run_with_its_rows(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.search(r"```json\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    lines = [shlex.split(line, comments=True) for line in command_lines(ROOT / page) if "recipe=my_task.yaml" in line]
    assert found
    assert lines
    for parts in lines:
        config = parts[parts.index("--config") + 1]
        given = [part for part in parts if "=" in part and not part.startswith("recipe=")]
        assert load_config(config, given).rollout.prompts_per_step <= found[1].count("\n"), f"{page}: {parts}"


def test_the_environment_of_the_page_about_tools_scores_an_episode_that_a_limit_ends() -> None:
    page = (ROOT / "docs" / "tools.md").read_text(encoding="utf-8")
    (block,) = [text for text in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class Twice" in text]
    space: dict[str, Any] = {}
    exec(block, space)
    conversation = AsyncMock()
    conversation.generate.side_effect = Ended("length")
    twice = space["Twice"]()
    twice.reset(question="What is 3 times 4?", answer="12")
    with pytest.raises(Ended):
        asyncio.run(twice.converse(conversation))
    assert twice.get_reward() == 0


def test_the_python_call_of_the_page_about_tasks_is_a_valid_config() -> None:
    page = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    found = re.search(r"overrides = (\[.*\])\n.*\n?    pgrpo\.train\(\"(\S+)\", overrides", page)
    assert found
    config = load_config(found[2], ast.literal_eval(found[1]), rewards_from_python=True, data_from_python=True)
    assert config.rewards.functions == []
    assert config.eval.every == 0


def test_the_page_about_tasks_has_the_arguments_of_every_built_in_reward() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| .* \| (.*) \|$", (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert [name for name, _ in rows] == list(dict.fromkeys(name for name, _ in rows))
    assert {name for name, _ in rows} == BUILT_IN.keys()
    for reward, cell in rows:
        module, _, name = BUILT_IN[reward].partition(":")
        built_in = getattr(importlib.import_module(module), name)
        call = built_in.__call__ if inspect.isclass(built_in) else built_in
        of_call = [p for p in inspect.signature(call).parameters.values() if p.kind is p.KEYWORD_ONLY]
        shown = re.findall(r"`(\w+)(?:: ([^`]*))?`( \(required\))?", cell)
        assert [name for name, *_ in shown] == [p.name for p in of_call], reward
        for (_, value, required), p in zip(shown, of_call, strict=True):
            assert bool(required) == (p.default is p.empty), f"{reward}: {p.name}"
            assert not value or yaml.safe_load(value) == p.default, f"{reward}: {p.name}"


def test_the_pages_list_every_recipe_config_command_and_reward() -> None:
    tasks, install = (words(ROOT / "docs" / name) for name in ("tasks.md", "install.md"))
    names = [file.stem for folder in ("recipes", "configs") for file in (ROOT / folder).glob("*.yaml")]
    assert all(f"`{name}`" in tasks for name in [*names, *BUILT_IN])
    commands = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    assert all(f"`pgrpo {name} " in install or f"`pgrpo {name}`" in install for name in commands)
