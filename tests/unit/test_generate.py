"""``pgrpo generate``: from a config, a run and an export; prompts of a file with rewards, and a chat; ``pgrpo eval --run``."""

from __future__ import annotations

import io
import json

import pytest
from transformers.utils.logging import enable_progress_bar

import pgrpo
from pgrpo.cli import app
from pgrpo.commands import generate as module
from pgrpo.commands.generate import generate
from pgrpo.config import ConfigError, load_config

ROWS = [{"a": 10 + i, "b": 5, "answer": str(15 + i)} for i in range(3)]
TEMPLATE = "{% for m in messages %}{{ '1' if m.role == 'user' else '2' }}{{ m.content }}{% endfor %}="


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "rows.jsonl"


def keys(tiny_model, tmp_path):
    small = [
        "train.steps=1",
        "rollout.prompts_per_step=4",
        "rollout.group_size=2",
        "eval.every=0",
        "track.console=false",
    ]
    return [f"model.path={tiny_model}", f"run_dir={tmp_path / 'run'}", *small]


def command(*arguments):
    app([str(argument) for argument in arguments], standalone_mode=False)


def written(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prompts_of_a_file_with_rewards_beside_the_texts(tiny_model, tmp_path, rows, capsys):
    config = load_config("quickstart", keys(tiny_model, tmp_path))
    generate(config, None, rows, samples=2, out=tmp_path / "out.jsonl")
    found = written(tmp_path / "out.jsonl")
    assert [(row["index"], row["sample"], row["prompt"]) for row in found] == [
        (i, j, f"{10 + i}+5=") for i in range(3) for j in range(2)
    ]
    assert all(row["parts"] == {"exact_match": row["reward"]} for row in found)
    assert [row["reward"] for row in found] == [float(row["completion"] == row["columns"]["answer"]) for row in found]
    shown = capsys.readouterr().out
    assert (
        shown.count("--- row ") == 6 and "reward 0 (exact_match 0)" in shown and f"wrote {tmp_path}/out.jsonl" in shown
    )
    (tmp_path / "rows.jsonl").write_text('{"a": 10, "b": 5}\n')  # no answers
    with pytest.raises(ConfigError, match=r"reward `exact_match` needs the column `answer`"):
        generate(config, None, rows)
    generate(config, None, rows, rewards=False, out=tmp_path / "out.jsonl")
    assert [row["reward"] for row in written(tmp_path / "out.jsonl")] == [None]
    assert f"replaced {tmp_path}/out.jsonl" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_run_its_export_and_its_evaluation_have_one_and_the_same_model(tiny_model, tmp_path, rows, capsys):
    """Trained weights, which differ from the model that the config names."""
    run = pgrpo.train(
        "quickstart", [*keys(tiny_model, tmp_path), "optim.lr=0.01"], rewards=[lambda completions: [0.0, 1.0] * 4]
    )
    pgrpo.export(run, tmp_path / "export")
    (tmp_path / "prompts.txt").write_text("10+5=\n\n11+5=\n")
    greedy = ["eval.temperature=0", "rollout.max_completion_tokens=4", "data.max_prompt_tokens=16"]
    moved = run.rename(tmp_path / "moved")  # a run folder may be moved
    command("generate", "--run", moved, "--prompts", rows, "--out", tmp_path / "run.jsonl", *greedy)
    command("generate", "-c", moved / "config.yaml", "--prompts", rows, "--out", tmp_path / "initial.jsonl", *greedy)
    export = ["--model", tmp_path / "export", "model.dtype=float32", "prompt.messages=[]", 'prompt.template="{prompt}"']
    command("generate", *export, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "export.jsonl", *greedy)
    texts = {
        name: [row["completion"] for row in written(tmp_path / f"{name}.jsonl")]
        for name in ("run", "initial", "export")
    }
    assert texts["export"] == texts["run"][:2]
    assert texts["initial"] != texts["run"]
    command("eval", "--run", moved, "eval.rows=3", "eval.samples=1", *greedy)
    assert written(moved / "eval" / "step_1" / "samples.jsonl")[0]["completion"]
    assert f"wrote {moved}/eval/step_1/samples.jsonl and summary.json" in capsys.readouterr().out


def test_a_config_of_many_gpus_on_one_device(tiny_model, tmp_path, rows):
    many = [*keys(tiny_model, tmp_path), "model.dtype=bfloat16", "model.fsdp_size=8", "model.sequence_parallel_size=2"]
    generate(load_config("quickstart", many), None, rows, out=tmp_path / "out.jsonl")
    assert len(written(tmp_path / "out.jsonl")) == 3


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_chat_reads_what_was_said(tiny_model, tmp_path, monkeypatch, capsys, template):
    """The prompt of each turn has all turns before it, by the chat template; without one each line is continued by itself."""
    chat = [f"prompt.chat_template_kwargs={json.dumps({'chat_template': template})}", "prompt.template=null"]
    more = [*chat, 'prompt.messages=[{role: user, content: "{a}"}]'] if template else []
    config = load_config("quickstart", [*keys(tiny_model, tmp_path), "data.max_prompt_tokens=25", *more])
    asked = []
    real = module._complete

    def complete(parts, prompts, *rest):
        asked.append(prompts[0].text)
        return [{**real(parts, prompts, *rest)[0], "completion": str(len(asked))}]

    monkeypatch.setattr(module, "_complete", complete)
    monkeypatch.setattr("sys.stdin", io.StringIO("1+1\n\n2+2\n" + "+" * 30 + "\n/new\n3+3\n"))
    generate(config)
    assert asked == (["11+1=", "11+12112+2=", "13+3="] if template else ["1+1", "2+2", "3+3"])
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if line in "123"] == ["1", "2", "3"]
    assert any("data.max_prompt_tokens is 25" in line and line.endswith("/new begins a new chat") for line in shown)


@pytest.mark.faults
def test_a_line_is_the_only_column_of_the_prompt_whatever_its_name(tiny_model, tmp_path):
    (tmp_path / "x.txt").write_text("10+5=\n\n11+5=\n")
    base = [*keys(tiny_model, tmp_path), "rollout.max_completion_tokens=4"]
    config = load_config("quickstart", [*base, 'prompt.template="{question}"'])
    generate(config, None, tmp_path / "x.txt", rewards=False, out=tmp_path / "out.jsonl")
    assert [row["prompt"] for row in written(tmp_path / "out.jsonl")] == ["10+5=", "11+5="]
    with pytest.raises(
        ConfigError, match=r"one column, and the prompt uses `a` and `b`; give rows with `a` and `b` \(\.jsonl\)$"
    ):
        generate(load_config("quickstart", base), None, tmp_path / "x.txt")
    with pytest.raises(ConfigError, match=r"the prompt uses none; write a column into it, such as \{prompt\}$"):
        generate(load_config("quickstart", [*base, "prompt.template=1+1"]), None, tmp_path / "x.txt")


@pytest.mark.parametrize(
    ("given", "lengths"),
    [([], (32, 32)), (["rollout.max_completion_tokens=4"], (60, 4)), (["data.max_prompt_tokens=24"], (24, 40))],
)
def test_a_small_model_alone_has_limits_that_fit_its_positions(
    tiny_model, tmp_path, monkeypatch, caplog, given, lengths
):
    """The tiny model has 64 positions; the limits' own values are 1024 and 256."""
    (tmp_path / "x.txt").write_text("10+5=\n")
    seen = []

    def complete(parts, *rest):
        seen.append((parts.config.data.max_prompt_tokens, parts.config.rollout.max_completion_tokens))
        return []

    monkeypatch.setattr(module, "_complete", complete)
    raw = ["model.dtype=float32", "prompt.messages=[]", 'prompt.template="{prompt}"']
    command("generate", "--model", tiny_model, "--prompts", tmp_path / "x.txt", *raw, *given)
    assert seen == [lengths]
    prompt, completion = lengths
    told = f"the model has 64 positions: data.max_prompt_tokens={prompt}, rollout.max_completion_tokens={completion}"
    assert told in caplog.text
    both = ["data.max_prompt_tokens=40", "rollout.max_completion_tokens=40"]
    with pytest.raises(ConfigError, match="it has 64 positions, the longest sample 80 tokens"):
        command("generate", "--model", tiny_model, "--prompts", tmp_path / "x.txt", *raw, *both)


def test_no_progress_bar_of_loading_is_written_to_a_pipe(tiny_model, tmp_path, rows, capfd):
    enable_progress_bar()
    generate(load_config("quickstart", keys(tiny_model, tmp_path)), None, rows)
    shown = capfd.readouterr()
    assert "--- row 0" in shown.out and "Loading weights" not in shown.err
