"""What is wrong with a user's files and keys, as `pgrpo train` answers it: exit code 2, one line, before any weight is read."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pgrpo import cli
from pgrpo.planning.hub import load_error

pytestmark = pytest.mark.faults
RECIPE = """\
data:
  path: rows.jsonl
  max_prompt_tokens: 8
prompt:
  template: "{q}="
rollout:
  max_completion_tokens: 2
rewards:
  functions:
    - function: exact_match
"""
CONFIG = """\
recipe: recipe.yaml
run_dir: run
model:
  path: tiny
  dtype: float32
rollout:
  prompts_per_step: 4
  group_size: 2
optim:
  lr: 5.0e-4
train:
  steps: 1
track:
  console: false
"""
ROWS = [{"q": f"{i}+1", "answer": str(i + 1)} for i in range(4)]


def write_rows(name, rows):
    Path(name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.fixture(autouse=True)
def folder(tiny_model, tmp_path, monkeypatch):
    """A current folder with all that a run needs, for a test to spoil."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(tiny_model)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "config.yaml").write_text(CONFIG)
    write_rows("rows.jsonl", ROWS)
    return tmp_path


@pytest.fixture
def train(monkeypatch, capsys):
    """``train(*overrides)``: what the command exits with, what it prints on stderr, and whether weights were read."""
    torch.set_num_threads(1)
    read: list[str] = []
    load = AutoModelForCausalLM.from_pretrained
    watched = lambda path, **more: (read.append(path), load(path, **more))[1]  # noqa: E731
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watched)
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}

    def run(*overrides):
        read.clear()
        monkeypatch.setattr(sys, "argv", ["pgrpo", "train", "--config", "config.yaml", *overrides])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capsys.readouterr().err, bool(read)

    yield run
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


@pytest.fixture
def refused(train):
    """``refused(*overrides)``: the one line that such a command prints before any weight is read."""

    def run(*overrides):
        code, printed, was_read = train(*overrides)
        assert (code, was_read) == (2, False), printed
        assert printed.startswith("pgrpo: ") and printed.count("\n") == 1, printed
        return printed.removeprefix("pgrpo: ").rstrip("\n")

    return run


def spoil(name, old, new):
    text = Path(name).read_text()
    assert text.count(old) == 1
    Path(name).write_text(text.replace(old, new))


def changed_tokenizer(change):
    """The model in a folder of its own, with another tokenizer."""
    shutil.copytree("tiny", "changed")
    tokenizer = AutoTokenizer.from_pretrained("changed")
    change(tokenizer)
    tokenizer.save_pretrained("changed")
    return "model.path=changed"


def test_nothing_is_wrong_with_what_is_spoilt_below(train):
    assert train()[::2] == (0, True)


def test_an_overlong_prompt_is_refused_dropped_or_truncated_and_counted(refused, train, caplog):
    write_rows("rows.jsonl", [*ROWS, {"q": "11111+22", "answer": "11133"}, {"q": "11111+2", "answer": "11113"}])
    assert refused() == (
        f"row 4 of data.path={Path.cwd() / 'rows.jsonl'}: the prompt has 9 tokens, data.max_prompt_tokens is 8 (1 of 6 rows "
        "exceed it, the longest has 9); raise it, or set data.overlong to drop or truncate"
    )
    for overlong, count in (("drop", "1 dropped, 0 truncated"), ("truncate", "0 dropped, 1 truncated")):
        caplog.clear()
        code, printed, _ = train(f"data.overlong={overlong}", f"run_dir={overlong}")
        assert code == 0, printed
        assert f"prompts over 8 tokens: {count}" in caplog.text


def test_a_missing_column_is_named_with_the_columns_that_exist(refused):
    assert refused('prompt.template="{question}="') == (
        "prompt.template: the data has no column `{question}`; it has q, answer; write {{ and }} for literal braces"
    )
    functions = "rewards.functions=[{function: exact_match, args: {column: solution}}]"
    assert refused(functions) == (
        "rewards.functions[0]: reward `exact_match` needs the column `solution`; the data has q, answer"
    )
    assert refused("prompt={template: null, messages_column: chat}") == (
        "prompt.messages_column: the data has no column `chat`; it has q, answer"
    )


def test_no_rows_or_fewer_rows_than_one_step_needs_is_an_error(refused):
    write_rows("rows.jsonl", [])
    assert refused() == f"data.path={Path.cwd() / 'rows.jsonl'} has no rows; give at least one"
    write_rows("rows.jsonl", ROWS[:3])
    assert refused() == (
        "rollout.prompts_per_step=4: the data set has only 3 prompt(s): set rollout.prompts_per_step to at most that, or add rows"
    )


def test_a_bad_jsonl_line_is_named_by_file_and_number(refused):
    with Path("rows.jsonl").open("a") as file:
        file.write('{"q": "1+1", "answer": "2"\n')
    file = Path.cwd() / "rows.jsonl"
    assert refused() == f"{file}, line 5: not JSON: Expecting ',' delimiter (column 27); write one JSON object a line"
    Path("rows.jsonl").write_text("[1]\n")
    assert refused() == f"{file}, line 1: a row must be a JSON object, not list; write one JSON object a line"


def test_a_tokenizer_without_a_chat_template_leads_to_the_raw_prompt_option(refused):
    assert refused('prompt={template: null, messages: [{role: user, content: "{q}"}]}') == (
        f"prompt.messages: the tokenizer of {Path.cwd() / 'tiny'} has no chat template; "
        "give a raw prompt with prompt.template instead"
    )


def test_a_missing_pad_token_is_derived_and_logged(train, caplog):
    """Training is the same as with one: nothing is padded."""
    assert train("run_dir=with")[0] == 0
    path = changed_tokenizer(lambda tokenizer: setattr(tokenizer, "pad_token", None))
    assert AutoTokenizer.from_pretrained("changed").pad_token is None
    assert train(path, "run_dir=without")[0] == 0
    assert (
        f"model.path={Path.cwd() / 'changed'}: the tokenizer has no pad token; using its eos token <eos>" in caplog.text
    )
    one, other = (
        [json.loads(line) for line in (Path(run) / "completions.jsonl").read_text().splitlines()]
        for run in ("with", "without")
    )
    assert one == other and len(one) == 4


CODE = "!!python/object/apply:os.system ['touch HACKED']"


@pytest.mark.parametrize(
    ("old", "new", "override", "message"),
    [
        ("group_size: 2", "group_sise: 2", "rollout.group_sise=2", "no such key; did you mean rollout.group_size?"),
        ("group_size: 2", "num_generations: 2", "num_generations=2", "no such key; here it is rollout.group_size"),
        ("group_size: 2", "group_size: two", "rollout.group_size=two", "rollout.group_size: two is text, not a whole number"),
        ("group_size: 2", "group_size: '2'", "rollout.group_size='2'", "rollout.group_size: 2 is text, not a whole number"),
        ("group_size: 2", "group_size: 2\n  group_size: 3", "rollout={group_size: 2, group_size: 3}", "group_size: duplicate key"),
        ("steps: 1", f"steps: {CODE}", f"train.steps={CODE}", "tag '!!python/object/apply:os.system' is not supported"),
    ],
)  # fmt: skip
def test_typos_wrong_types_duplicate_keys_and_python_tags_exit_with_2(refused, old, new, override, message):
    said = refused(override)
    assert said.startswith(f"override {override!r}: ") and message in said
    spoil("config.yaml", old, new)
    line = next(
        i
        for i, text in enumerate(Path("config.yaml").read_text().splitlines(), 1)
        if text in f"  {new}".splitlines()[-1]
    )
    said = refused()
    assert said.startswith(f"config.yaml:{line}: ") and message in said
    assert not Path("HACKED").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("template:", "templte:", "recipe.yaml:5: prompt.templte: no such key; did you mean prompt.template?"),
        (
            "max_prompt_tokens: 8",
            "max_prompt_tokens: eight",
            "recipe.yaml:3: data.max_prompt_tokens: eight is text, not a whole",
        ),
        ("path: rows.jsonl", "path: a\n  path: b", "recipe.yaml:3: data.path: duplicate key, first on line 2"),
        ("rows.jsonl", CODE, "recipe.yaml:2: tag '!!python/object/apply:os.system' is not supported"),
    ],
)
def test_mistakes_in_a_recipe_exit_with_2(refused, old, new, message):
    spoil("recipe.yaml", old, new)
    assert refused().startswith(message)
    assert not Path("HACKED").exists()


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("data.revision", "010", "8, a whole number"),
        ("data.revision", "0123456", "42798, a whole number"),
        ("data.revision", "1e3", "1000.0, a number"),
        ("data.split", "no", "False, true or false"),
        ("data.split", "1_000", "1000, a whole number"),
        ("data.name", "1.10", "1.1, a number"),
        ("data.name", "0x1F", "31, a whole number"),
        ("data.name", "true", "True, true or false"),
    ],
)
def test_text_that_yaml_reads_as_a_number_or_bool_is_refused_with_its_quoted_form(refused, key, value, kind):
    """In an override, a config and a recipe."""
    said, name = f"{key}: {value} reads as {kind}, not text; quote it: ", key.partition(".")[2]
    override = f"{key}={value}"
    assert refused(override) == f"override {override!r}: {said}'{key}=\"{value}\"'"
    with Path("config.yaml").open("a") as file:
        file.write(f"data:\n  {name}: {value}\n")
    assert refused() == f'config.yaml:16: {said}{name}: "{value}"'
    Path("config.yaml").write_text(CONFIG)
    spoil("recipe.yaml", "path: rows.jsonl", f"path: rows.jsonl\n  {name}: {value}")
    assert refused() == f'{Path.cwd()}/recipe.yaml:3: {said}{name}: "{value}"'.replace(f"{Path.cwd()}/", "", 1)


@pytest.mark.parametrize(
    ("key", "old", "value", "message"),
    [
        ("optim.lr", "lr: 5.0e-4", ".nan", "optim.lr: .nan is not a finite number; give a finite one"),
        ("optim.lr", "lr: 5.0e-4", ".inf", "optim.lr: .inf is not a finite number; give a finite one"),
        (
            "rollout.group_size",
            "group_size: 2",
            "010",
            "rollout.group_size: 010 reads as the number 8; write rollout.group_size: 8",
        ),
        (
            "rollout.group_size",
            "group_size: 2",
            "1:30",
            "rollout.group_size: 1:30 reads as the number 90; write rollout.group_size",
        ),
    ],
)
def test_numbers_that_yaml_reads_differently_or_that_are_not_finite_are_refused(refused, key, old, value, message):
    assert message in refused(f"{key}={value}")
    spoil("config.yaml", old, f"{key.partition('.')[2]}: {value}")
    assert message in refused()


def test_sizes_that_do_not_divide_list_valid_values_in_prompts(refused, monkeypatch):
    assert refused("rollout.prompts_per_step=12", "train.updates_per_step=5") == (
        "train.updates_per_step: 5 does not divide rollout.prompts_per_step, 12 prompts; "
        "it may be 1, 2, 3, 4, 6, 12, or set rollout.prompts_per_step to 5, 10, 15, 20"
    )
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert refused("--dry-run") == (
        "rollout.prompts_per_step: 4 prompts do not divide over 3 ranks; valid numbers of prompts: 3, 6, 9, 12"
    )


def test_remote_code_of_a_model_runs_only_when_asked(refused, train):
    shutil.copytree("tiny", "own")
    config = json.loads(Path("own/config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.OwnConfig"}}
    Path("own/config.json").write_text(json.dumps(config))
    code = f"open({str(Path.cwd() / 'RAN')!r}, 'w')\nfrom transformers import Qwen3Config\nclass OwnConfig(Qwen3Config): pass\n"
    Path("own/code.py").write_text(code)
    said = refused("model.path=own")
    assert said.startswith(f"model.path={Path.cwd() / 'own'}: cannot load")
    assert said.endswith(
        ": it comes with Python code of its own; read that, and set model.trust_remote_code=true to run it"
    )
    assert not Path("RAN").exists()
    train("model.path=own", "model.trust_remote_code=true")
    assert Path("RAN").exists()


def test_a_pinned_revision_is_loaded(refused, train, monkeypatch, folder):
    """A hub's cache in which the newest revision has a tokenizer that does not fit."""
    changed_tokenizer(lambda tokenizer: tokenizer.add_tokens(["a", "b"]))
    cache = folder / "hub" / "models--own--model"
    for name, revision, source in (("v1", "1" * 40, "tiny"), ("main", "2" * 40, "changed")):
        shutil.copytree(source, cache / "snapshots" / revision)
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / name).write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    assert "its tokenizer has 16 tokens, the model only 14" in refused("model.path=own/model")
    code, printed, _ = train("model.path=own/model", "model.revision=v1")
    assert code == 0, printed


def test_a_model_folder_without_tokenizer_files_is_refused(refused):
    """transformers makes an empty tokenizer for it, whose prompts have no tokens."""
    shutil.copytree("tiny", "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    assert refused("model.path=bare") == (
        f"model.path={Path.cwd() / 'bare'}: there are no tokenizer files; copy those of the model that it comes from "
        "(tokenizer.json, tokenizer_config.json, chat_template.jinja)"
    )


def without_a_tensor(weights):
    return {name: x for name, x in weights.items() if name != "model.layers.1.mlp.up_proj.weight"}


def with_a_prefix(weights):
    return {f"_orig_mod.{name}": x for name, x in weights.items()}


def narrower(weights):
    return weights | {"model.norm.weight": torch.ones(8)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_tensor, "has no weights for 1 of the model's tensors, such as model.layers.1.mlp.up_proj.weight; "),
        (with_a_prefix, ", but others, such as _orig_mod."),
        (narrower, "its weights have other shapes than its config.json says; "),
        (bytes, "cannot load its weights: Error while deserializing header: "),
        (None, "cannot load its weights: Error no file named model.safetensors"),
    ],
)
def test_a_model_folder_whose_weights_are_not_the_models_is_refused(train, change, message):
    """transformers loads the first two with random numbers in the tensors' places."""
    shutil.copytree("tiny", "spoilt")
    file = Path("spoilt/model.safetensors")
    if change is bytes:
        file.write_bytes(file.read_bytes()[:-100])
    elif change is None:
        file.unlink()
    else:
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
    code, printed, _ = train("model.path=spoilt")
    (said,) = [line for line in printed.splitlines() if line.startswith("pgrpo: ")]
    assert code == 2
    assert said.startswith(f"pgrpo: model.path={Path.cwd() / 'spoilt'}: ")
    assert message in said
    assert said.endswith("; give the folder of a complete model, as `save_pretrained` or `pgrpo export` writes it")
    assert not Path("run/metrics.jsonl").exists()


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(refused):
    assert refused(changed_tokenizer(lambda tokenizer: tokenizer.add_tokens(["a", "b"]))) == (
        f"model.path={Path.cwd() / 'changed'}: its tokenizer has 16 tokens, the model only 14: "
        "resize the model's embeddings, or use the "
        "tokenizer that it was trained with"
    )


OWN = """\
def reward(completions, key, **_):
    return [ValueError(f"401 for https://{key}@host/v1"), *[float(len(c)) for c in completions[1:]]]
"""


@pytest.mark.parametrize("on_error", ["raise", "mask"])
def test_a_secret_is_in_no_file_log_or_message(train, folder, monkeypatch, caplog, capsys, on_error):
    """Not even when the reward that was given it puts it into its error."""
    monkeypatch.setenv("OWN_KEY", "sk-5ecret-5ecret")
    Path("own.py").write_text(OWN)
    functions = 'rewards.functions=[{function: own.py:reward, args: {key: "${oc.env:OWN_KEY}"}}]'
    more = ["track.tensorboard=true", "track.console=true", "track.completions=8", 'prompt.template="{q}="']
    monkeypatch.setenv("PGRPO_DEBUG", "1")
    code, printed, _ = train(functions, f"rewards.on_error={on_error}", *more)
    assert code == (1 if on_error == "raise" else 0), printed
    assert "401 for https://(redacted)@host/v1" in (printed if on_error == "raise" else Path("run/log.txt").read_text())
    assert "sk-5ecret" not in printed + capsys.readouterr().out
    files = [path for path in Path("run").rglob("*") if path.is_file()]
    assert len(files) > (4 if on_error == "raise" else 8)
    for path in files:
        assert b"5ecret" not in path.read_bytes(), path


def test_an_error_of_loading_is_its_first_line_or_its_name():
    """Errors of networks have no text at times, and some begin with an empty line."""
    assert load_error(OSError("\nno such file.\nmore")).startswith("no such file; give a folder")
    assert load_error(TimeoutError()).startswith("TimeoutError; give a folder")
