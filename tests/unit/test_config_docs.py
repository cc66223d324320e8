"""docs/: config.md is what the schema says, and the two guides name keys that exist and agree with the answers to a wrong key."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pgrpo.config import load_config
from pgrpo.config.names import other_trainers, suggest
from pgrpo.config.presets import PRESETS
from pgrpo.config.source import valid_keys

ROOT = Path(__file__).resolve().parents[2]
CONFIG_DOCS = runpy.run_path(str(ROOT / "scripts" / "config_docs.py"))


def test_config_md_is_what_the_generator_gives() -> None:
    written = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert written == CONFIG_DOCS["markdown"](), "run python scripts/config_docs.py"


def test_the_json_schema_is_what_the_generator_gives_and_has_every_key() -> None:
    written = CONFIG_DOCS["SCHEMA"].read_text(encoding="utf-8")
    assert written == CONFIG_DOCS["json_schema"](), "run python scripts/config_docs.py"

    def keys(schema: dict[str, Any], prefix: str) -> Iterator[str]:
        for name, value in schema["properties"].items():
            yield prefix + name
            inner, name = (value["items"], f"{name}[i]") if value.get("type") == "array" else (value, name)
            if "properties" in inner:
                assert inner["additionalProperties"] is False
                yield from keys(inner, f"{prefix}{name}.")

    assert list(keys(json.loads(written), "")) == list(valid_keys())


TYPES = {
    "object": dict, "array": list, "string": str, "integer": int, "number": int | float, "boolean": bool, "null": type(None),
}  # fmt: skip


def accepts(schema: dict[str, Any], value: Any) -> bool:
    """Whether a JSON schema of draft 7 accepts a value, by the keywords that ours uses."""
    known = {"$schema", "title", "description", "type", "enum", "anyOf", "properties", "additionalProperties", "items"}
    known |= {"pattern", "minItems", "maxItems", "minimum", "exclusiveMinimum", "maximum"}
    assert schema.keys() <= known
    if "anyOf" in schema:
        return any(accepts(option, value) for option in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    if kind := schema.get("type"):
        if not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
            return False
        if kind in ("integer", "number"):
            low, above, high = (schema.get(name) for name in ("minimum", "exclusiveMinimum", "maximum"))
            inside = (low is None or value >= low) and (above is None or value > above)
            return inside and (high is None or value <= high)
    if isinstance(value, list):
        fits = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
        return fits and all(accepts(schema["items"], item) for item in value)
    if isinstance(value, dict) and "properties" in schema:
        return value.keys() <= schema["properties"].keys() and all(
            accepts(schema["properties"][name], item) for name, item in value.items()
        )
    return "pattern" not in schema or re.search(schema["pattern"], str(value)) is not None


FILES = [*(ROOT / "configs").glob("*.yaml"), *(ROOT / "recipes").glob("*.yaml")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_json_schema_takes_what_comes_with_pgrpo(path: Path) -> None:
    assert accepts(json.loads(CONFIG_DOCS["json_schema"]()), yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(
    ("values", "is_good"),
    [
        ({"rollout": {"group_size": 8}}, True),
        ({"rollout": {"group_size": 1}}, False),
        ({"rollout": {"group_size": "${train.steps}"}}, True),
        ({"rollout": {"group_size": "8"}}, False),
        ({"rollout": {"temperature": 0}}, False),
        ({"rollout": {"gpu_memory_utilization": None}}, True),
        ({"rollout": {"engine": "vlm"}}, False),
        ({"rollout": {"stop": ["a"]}}, True),
        ({"optim": {"betas": [0.9]}}, False),
        ({"rewards": {"functions": [{"function": "math", "args": {"any": [1]}}]}}, True),
        ({"rewards": {"functions": [{"function": "math", "wieght": 1}]}}, False),
        ({"track": {"wandb": "yes"}}, False),
        ({"num_generations": 8}, False),
    ],
)
def test_the_json_schema_refuses_what_the_loader_refuses(values: dict[str, Any], is_good: bool) -> None:
    assert accepts(json.loads(CONFIG_DOCS["json_schema"]()), values) == is_good


def test_config_md_has_every_key_once_in_order() -> None:
    text = CONFIG_DOCS["markdown"]()
    keys = re.findall(r"^\| `([^`]+)` \| .* \| .* \| .+ \|$", text.replace("\\|", ""), re.MULTILINE)
    sections = {key.rpartition(".")[0] for key in valid_keys() if "." in key and "[i]" not in key}
    listed = [key for key in keys if key.partition(".")[0] in sections or "." not in key]
    leaves = [key for key in valid_keys() if key not in sections]
    assert sorted(set(listed)) == sorted(leaves)
    order = {key: i for i, key in enumerate(dict.fromkeys(listed))}
    for section in sections:
        assert sorted((k for k in leaves if k.startswith(f"{section}.")), key=order.__getitem__) == [
            k for k in leaves if k.startswith(f"{section}.")
        ]
    assert all(f"`{preset}`" in text for preset in PRESETS)


# --- the guides

SECTIONS = {key.partition(".")[0] for key in valid_keys() if "." in key}
GUIDES = {"from_trl.md": "TRL", "from_verl.md": "verl"}


def guide(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def key_rows(name: str) -> list[tuple[list[str], list[str]]]:
    """Their keys and ours, of each row of the table of keys."""
    table = re.search(rf"^\| {GUIDES[name]} \| pgrpo \|.*\n\|[-|]+\n((?:\|.*\n)+)", guide(name), re.MULTILINE)
    assert table
    cells = [line.split("|")[1:3] for line in table[1].splitlines()]
    return [(re.findall(r"`([^`]+)`", theirs), re.findall(r"`([^`]+)`", ours)) for theirs, ours in cells]


@pytest.mark.parametrize("name", GUIDES)
def test_the_table_of_keys_is_what_the_data_file_gives(name: str) -> None:
    assert CONFIG_DOCS["GUIDES"] == GUIDES
    assert guide(name) == CONFIG_DOCS["with_key_table"](guide(name), GUIDES[name]), "run python scripts/config_docs.py"
    row = other_trainers()[GUIDES[name].lower()][0]
    spoilt = guide(name).replace(f"`{row['ours'][0]}`", "`model.spoilt`", 1)
    assert CONFIG_DOCS["with_key_table"](spoilt, GUIDES[name]) == guide(name)
    other = other_trainers()[f"{GUIDES[name].lower()}_absent"][0]
    spoilt = guide(name).replace(other["instead"], "spoilt", 1)
    assert spoilt != guide(name) == CONFIG_DOCS["with_key_table"](spoilt, GUIDES[name])


def test_keys_without_a_counterpart_are_answered_with_what_to_do() -> None:
    names = other_trainers()
    tables = {name.replace("/", ".") for row in (*names["trl"], *names["verl"]) for name in row["theirs"]}
    absent = [*names["trl_absent"], *names["verl_absent"], *names["others_absent"]]
    for row in absent:
        for name in row["theirs"]:
            assert name not in tables and name not in valid_keys()
            key = name.replace("*", "x")
            assert suggest(key, valid_keys()) in {row["instead"] for row in absent}, key
        for word in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)[`:]", row["instead"]):
            assert word in valid_keys() or word.endswith(".jsonl"), word
    for key, word in (
        ("critic.optim.lr", "no critic"),
        ("actor_rollout_ref.rollout.val_kwargs.top_p", "evaluation samples as"),
    ):
        assert word in suggest(key, valid_keys())
    assert suggest("actor_rollout_ref.actor.optim.lr", valid_keys()) == "here it is optim.lr"
    assert suggest("actor_rollout_ref.actor.fsdp_config.fsdp_size", valid_keys()) == "here it is model.fsdp_size"


@pytest.mark.parametrize("name", GUIDES)
def test_their_keys_are_answered_with_ours(name: str) -> None:
    rows = key_rows(name)
    assert len(rows) > 40
    for theirs, ours in rows:
        assert theirs
        assert ours
        for key in theirs:
            answer = suggest(key, valid_keys())
            assert answer.startswith("here it is ")
            for word in ours:
                assert re.search(rf"(?<![\w.-]){re.escape(word)}(?![\w.])", answer), f"{key}: {answer}, not {word}"


@pytest.mark.parametrize("name", GUIDES)
def test_our_keys_in_a_guide_exist(name: str) -> None:
    theirs = {key for left, _ in key_rows(name) for key in left}
    theirs |= {key for row in other_trainers()[f"{GUIDES[name].lower()}_absent"] for key in row["theirs"]}
    keys = set(re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:: [^`]*)?`", guide(name)))
    ours = {key for key in keys if key.partition(".")[0] in SECTIONS} - theirs
    assert len(ours) > 30
    assert ours <= set(valid_keys())


def code_blocks(name: str, language: str) -> dict[str, str]:
    """File name, in the first line, -> text."""
    return dict(re.findall(rf"^```{language}\n# (\S+)\n(.*?)^```", guide(name), re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("name", GUIDES)
def test_the_example_of_a_guide_loads(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = code_blocks(name, "python") | code_blocks(name, "yaml")
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    config = load_config("gsm8k_run.yaml")
    assert config.rollout.group_size == 8
    assert config.rewards.functions[0].function == f"{tmp_path / 'gsm8k_reward.py'}:right"
    right = runpy.run_path("gsm8k_reward.py")["right"]
    if name == "from_trl.md":
        scores = right([r"so \boxed{42}", r"\boxed{420}"], answer=["6 x 7\n#### 42"] * 2)
    else:
        scores = right(["so #### 1,042", "#### 42"], reward_model=[{"ground_truth": "1042"}] * 2)
    assert scores == [1.0, 0.0]


def test_verls_dapo_recipe_in_its_guide_is_what_its_comments_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dapo_run.yaml").write_text(code_blocks("from_verl.md", "yaml")["dapo_run.yaml"])
    config = load_config("dapo_run.yaml")
    loss, rollout = config.loss, config.rollout
    assert (loss.clip_low, loss.clip_high, loss.clip_dual, loss.aggregate) == (0.2, 0.28, 10.0, "token")
    assert (loss.kl_coef, loss.entropy_coef, loss.mask_overlong) == (0.0, 0.0, False)
    assert rollout.prompts_per_step // config.train.updates_per_step == 32
    assert (config.eval.samples, config.eval.greedy) == (1, False)
    assert config.rewards.functions[1].args == {"max_tokens": rollout.max_completion_tokens, "cache_tokens": 4096}


def test_a_verl_override_is_answered() -> None:
    assert suggest("actor_rollout_ref.model.path", valid_keys()) == "here it is model.path"
    assert suggest("actor_rollout_ref.actor.optim.lr", valid_keys()) == "here it is optim.lr"


def test_make_clean_leaves_runs_and_models_alone():
    """Beside caches of tools it removes what the Makefile's own targets make, and of runs/ only the quick start's."""
    makefile = (ROOT / "Makefile").read_text()
    assert "RUN := runs/quickstart\n" in makefile
    (rule,) = re.findall(r"^clean:\n((?:\t.*\n?)+)", makefile, re.MULTILINE)
    assert rule.split() == [
        "rm", "-rf", ".venv", ".venv-vllm", ".venv-vllm-0.*", ".venv-transformers4", ".venv-others", ".cache/tiny_qwen3", "$(RUN)",
        ".pytest_cache", ".ruff_cache", ".hypothesis"
    ]  # fmt: skip
