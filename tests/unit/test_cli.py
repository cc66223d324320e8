"""The command line as a user meets it: what it imports, what it exits with, what it says."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from warm import Started

from pgrpo import cli
from pgrpo.config import ConfigError, load_config
from pgrpo.early import check_checkpoint, check_start

CONFIG = """\
run_dir: runs/x
model: {path: m}
data: {path: d}
prompt: {template: "{q}"}
rewards: {functions: [{function: exact_match}]}
train: {steps: 10}
"""
# Runs the real main() with `pgrpo.grpo` replaced, so that exit codes can be told apart from training.
FAKE_TRAIN = """\
import os, signal, sys, time, types
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
module = types.ModuleType("pgrpo.grpo")
def train(config, given, resume=None, **_):
    {body}
module.train = train
sys.modules["pgrpo.grpo"] = module
from pgrpo.cli import main
main()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "c.yaml").write_text(CONFIG)
    return tmp_path


def fresh(folder: Path, code: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """In a process that has imported nothing yet."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, env={**os.environ, **env})


@pytest.fixture
def run(warm, folder: Path) -> Callable[..., Started]:
    """``run(*arguments)``: ``pgrpo ARGUMENTS`` in the folder; or Python with ``code``."""

    def run(*arguments: str, code: str | None = None, **env: str) -> Started:
        return warm.run([*(["-c", code] if code else ["-m", "pgrpo"]), *arguments], env, cwd=folder)

    return run


@pytest.fixture
def train(run: Callable[..., Started]) -> Callable[..., Started]:
    """``train(body, *arguments)``: ``pgrpo train`` with the body in the place of a training."""

    def train(body: str, *arguments: str, **env: str) -> Started:
        return run("train", "--config", "c.yaml", *arguments, code=FAKE_TRAIN.format(body=body), **env)

    return train


def test_help_imports_nothing_heavy(folder: Path) -> None:
    imported = fresh(folder, "import sys, pgrpo.cli; print(*sys.modules)").stdout.split()
    assert "pgrpo.config" in imported
    assert not {"torch", "transformers", "datasets", "matplotlib", "numpy"} & {*imported}


@pytest.mark.faults
@pytest.mark.parametrize("more", [["eval.every=400"], ["eval.every=400", "checkpoint.keep_best=eval/reward"], []])
def test_eval_without_held_out_rows_has_one_answer_whatever_training_would_evaluate(run, more) -> None:
    result = run("eval", "--config", "c.yaml", *more)
    assert result.returncode == 2
    assert result.stderr == (
        "pgrpo: evaluation needs held-out rows: set data.eval_path to a file of them, or data.eval_split to a split of data.path\n"
    )


def test_help_names_every_command(run) -> None:
    result = run("--help")
    assert result.returncode == 0
    for command in ("train", "check", "eval", "bench", "plot", "export", "init", "doctor", "generate"):
        assert f"\n  {command} " in result.stdout
        assert run(command, "--help").returncode == 0


def test_arguments_reach_training(folder: Path) -> None:
    body = "print(config.train.steps, config.rollout.stop, resume, 'torch' in sys.modules)"
    arguments = ["train.steps=3", "rollout.stop=[a, b]", "--resume", "auto"]
    result = fresh(folder, FAKE_TRAIN.format(body=body), "train", "--config", "c.yaml", *arguments)
    assert (result.returncode, result.stdout) == (0, "3 ['a', 'b'] auto False\n"), result.stderr


def test_wrong_input_is_2(run, folder: Path) -> None:
    result = run("train", "--config", "c.yaml", "rollout.group_sise=8")
    message = "pgrpo: override 'rollout.group_sise=8': no such key; did you mean rollout.group_size?\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", message)
    assert run("train").returncode == 2
    assert run("train", "--config", "c.yaml", "--no-such-option").returncode == 2
    assert run("no-such-command").returncode == 2
    assert run("plot").returncode == 2
    assert run("train", "--config", "nope").stderr.startswith("pgrpo: config 'nope': no such file;")


WRONG = {
    "a typo": ("rollout.group_sise=8", "no such key; did you mean rollout.group_size?"),
    "another trainer's key": ("num_generations=8", "no such key; here it is rollout.group_size"),
    "a wrong type": ("rollout.group_size=eight", "eight is text, not a whole number"),
    "a wrong choice": ("loss.aggregate=tokens", "tokens is not a choice; it may be token, sample, constant"),
    "out of range": ("rollout.group_size=1", "rollout.group_size: 1 is too small; it must be at least 2"),
    "an absurd size": ("rollout.group_size=99999999999999999999", "is too large; it must be at most"),
    "sizes that do not divide": ("train.updates_per_step=3", "3 does not divide rollout.prompts_per_step"),
    "ranks that do not divide": ("rollout.prompts_per_step=31", "31 prompts do not divide over 2 ranks"),
    "a budget too small": ("train.token_budget=10", "10 is less than the longest sample"),
    "no such reward": (
        "rewards.functions=[{function: exact_mach}]",
        "no built-in reward `exact_mach`; did you mean `exact_match`?",
    ),
    "no such rewards file": ("rewards.functions=[{function: own.py:f}]", "no own.py beside the YAML"),
    "no such data file": ("data.path=rows.jsonl", "data.path: no file rows.jsonl"),
    "no such held-out file": ("data.eval_path=held.parquet", "data.eval_path: no file held.parquet"),
    "no such model folder": ("model.path=./model", "model.path=./model: there is no such folder"),
    "no such recipe": ("recipe=nope", "recipe 'nope': no such file"),
    "no such checkpoint": (
        "--resume=runs/nope",
        "--resume runs/nope: there is no such folder; runs/x/checkpoints has step_9, step_44, step_130; give the folder of a st",
    ),
    "a run without a checkpoint": (
        "--resume=runs/new",
        "--resume runs/new: no checkpoint in that folder; runs/x/checkpoints ",
    ),
    "a model instead of a checkpoint": (
        "--resume=exported",
        "--resume exported: a model, which model.path=exported loads, and no",
    ),
    "no best checkpoint": (
        "--resume=best",
        "--resume best: runs/x/checkpoints/step_130 has no best checkpoint; train with checkpoint.keep_best=eval/reward",
    ),
    "too deep": ("rollout.stop=" + "[" * 20_000, "nested too deeply"),
}
ALL_WRONG = """\
import contextlib, io, json, resource, sys
from pgrpo import cli
answers = {}
for name, (override, _) in json.loads(sys.argv[1]).items():
    sys.argv = ["pgrpo", "train", "--config", "c.yaml", override]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            cli.main()
    except SystemExit as end:
        answers[name] = (end.code, said.getvalue())
heavy = sorted({"torch", "transformers", "datasets", "numpy"} & sys.modules.keys())
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([answers, heavy, used.ru_utime + used.ru_stime]))
"""


def test_wrong_input_is_refused_in_little_time_without_importing_torch(folder: Path) -> None:
    for step in (44, 9, 130):
        (saved := folder / "runs" / "x" / "checkpoints" / f"step_{step}").mkdir(parents=True)
        (saved / "scalars.json").write_text('{"best": null}')
    (folder / "runs" / "new" / "checkpoints").mkdir(parents=True)
    (folder / "exported").mkdir()
    (folder / "exported" / "config.json").write_text("{}")
    result = fresh(folder, ALL_WRONG, json.dumps(WRONG), WORLD_SIZE="2")
    answers, heavy, seconds = json.loads(result.stdout)
    assert answers.keys() == WRONG.keys(), result.stderr
    for name, (_, expected) in WRONG.items():
        code, said = answers[name]
        assert code == 2, name
        assert said.startswith("pgrpo: ") and said.count("\n") == 1, said
        assert expected in said
    assert heavy == []
    assert seconds < 2 + 0.1 * len(WRONG)  # CPU time: the first takes 2 s at most, and the others share its imports


def test_resume_best_needs_a_best_checkpoint_that_is_there(tmp_path: Path, monkeypatch) -> None:
    config = load_config({**yaml.safe_load(CONFIG), "run_dir": str(tmp_path / "run")})
    saved = tmp_path / "run" / "checkpoints"

    def refused(resume: str) -> str:
        with pytest.raises(ConfigError) as caught:
            check_start(config, resume)
        return str(caught.value)

    assert refused("best") == f"--resume best: {saved} has no checkpoint; correct run_dir, or leave --resume out"
    assert refused("nosuch").startswith(
        f"--resume nosuch: there is no such folder; there is none in {saved} either; give "
    )
    for step in (9, 10):
        (saved / f"step_{step}").mkdir(parents=True)
        (saved / f"step_{step}" / "scalars.json").write_text('{"best": {"step": 8, "value": 0.5}}')
    assert refused("best") == f"--resume best: {saved / 'step_8'} is not there; {saved} has step_9, step_10"
    elsewhere = refused(str(saved / "step_7")).removeprefix(f"--resume {saved / 'step_7'}: there is no such folder; ")
    assert elsewhere.startswith(f"{saved} has step_9, step_10; give ")  # once
    (saved / "step_8").mkdir()
    (saved / "step_9" / "manifest.json").write_text("{}")
    assert ": a file, and a checkpoint is a folder; " in refused(str(saved / "step_9" / "manifest.json"))
    others = f"that checkpoint is not whole, it has no manifest.json; {saved} has step_8, step_9; give "
    assert refused(str(saved / "step_10")).startswith(f"--resume {saved / 'step_10'}: {others}")
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "run")  # whose checkpoint an empty variable does not mean
        assert refused("").startswith(f"--resume : an empty name; {saved} has step_8, step_9, step_10; give ")
    for resume in ("best", "auto", str(saved / "step_9"), str(tmp_path / "run"), saved, None):
        check_start(config, resume)
    (saved / "step_10" / "scalars.json").write_text("damaged")
    check_start(config, "best")  # the one before may be whole


def test_adapters_of_another_rank_are_refused_by_the_checkpoint_that_is_meant(tmp_path: Path) -> None:
    config = load_config({**yaml.safe_load(CONFIG), "run_dir": str(tmp_path / "run")})
    for folder, rank in (("run/checkpoints/step_2", 8), ("run/checkpoints/step_10", 4), ("copy", 0)):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "manifest.json").touch()
        scalars = {"best": {"step": 2, "value": 0.5}, "config": f"model: {{lora_rank: {rank}}}"}
        (tmp_path / folder / "scalars.json").write_text(json.dumps(scalars))
    newest = tmp_path / "run" / "checkpoints" / "step_10"
    for name in ("auto", "best", str(tmp_path / "run"), newest):
        with pytest.raises(ConfigError) as caught:
            check_checkpoint(config, "--checkpoint", name)
        assert str(caught.value) == (
            f"--checkpoint {name}: {newest} was saved with model.lora_rank=4, and here it is 0; set model.lora_rank=4, or start a "
            "run from the model"
        )
    check_checkpoint(config, "--checkpoint", tmp_path / "copy")
    (newest / "scalars.json").write_text("{}")
    check_checkpoint(config, "--checkpoint", "auto")  # is looked at later


def test_a_failed_run_is_1_with_one_line_unless_debugging(train) -> None:
    result = train("raise RuntimeError('out of memory; lower train.token_budget')")
    message = "pgrpo: out of memory; lower train.token_budget (PGRPO_DEBUG=1 shows where)\n"
    assert (result.returncode, result.stderr) == (1, message)
    assert train("raise OSError('disk')").stderr == "pgrpo: OSError: disk (PGRPO_DEBUG=1 shows where)\n"
    result = train("raise OSError('disk')", PGRPO_DEBUG="1")
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback (most recent call last):")


def test_a_signal_exits_with_130_or_143_after_cleaning_up(train) -> None:
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        body = f"""
    try:
        os.kill(os.getpid(), {int(number)}); time.sleep(30)
    finally:
        print("closed")
"""
        result = train(body)
        assert (result.returncode, result.stdout) == (code, "closed\n")
        assert result.stderr.rstrip("\n") == f"pgrpo: {number.name}: stopping"
        assert train(f"sys.exit({code})").returncode == code  # what training does after its save


# The real main() with an import of `pgrpo.grpo` that goes on whatever is raised inside of it, and a process that compiles ahead.
STUBBORN_IMPORT = """\
import importlib.abc, importlib.machinery, os, signal, sys, time
import pgrpo
class Stubborn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == "pgrpo.grpo" else None
    def exec_module(self, module):
        print(pgrpo.process.second._early["import time; time.sleep(60)"].process.pid, flush=True)
        try:
            os.kill(os.getpid(), int(os.environ["NUMBER"]))
        except BaseException:
            time.sleep(30)
sys.modules.pop("pgrpo.grpo", None)
sys.meta_path.insert(0, Stubborn())
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
pgrpo.early_codes = lambda *_: ["import time; time.sleep(60)"]
from pgrpo.cli import main
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_imports_ends_them_at_once(run, number) -> None:
    """transformers takes an exception inside of its imports for a package that is missing."""
    result = run("train", "--config", "c.yaml", code=STUBBORN_IMPORT, NUMBER=str(int(number)))
    assert result.returncode == 128 + number
    assert result.stderr == f"pgrpo: {number.name}: stopped, nothing was begun yet\n"
    ahead = Path(f"/proc/{int(result.stdout)}/cmdline")
    assert not ahead.exists() or not ahead.read_bytes(), "the process that was to compile ahead"


def test_init_copies_what_a_run_needs_and_overwrites_nothing(run, folder: Path) -> None:
    result = run("init", "quickstart")
    assert result.returncode == 0, result.stderr
    names = {"quickstart.yaml", "addition.yaml", "addition.py"}
    assert {path.name for path in folder.iterdir()} == {"c.yaml", *names}
    assert result.stdout.endswith("then: pgrpo train --config quickstart.yaml\n")
    code = "from pgrpo.config import load_config; print(load_config('quickstart.yaml').data.path)"
    assert run(code=code).stdout == f"{folder}/addition.py:rows\n"  # the copies are what runs
    (folder / "addition.yaml").write_text("mine")
    result = run("init", "quickstart")
    assert result.returncode == 2
    assert "addition.yaml" in result.stderr
    assert (folder / "addition.yaml").read_text() == "mine"
    said = run("init", "quickstrat").stderr
    assert said.startswith("pgrpo: init quickstrat: no such config or recipe; did you mean quickstart? configs: quick")
    assert ", vision_quickstart; recipes: addition, arithmetic, " in said and said.count("\n") == 1
    said = run("init", "nosuch").stderr
    assert said.startswith("pgrpo: init nosuch: no such config or recipe; configs: quickstart, ")
    result = run("init", "quickstart", "--overwrite")
    assert "replaced addition.yaml" in result.stdout and "wrote" not in result.stdout
    schema = (folder / "addition.yaml").read_text().splitlines()[0].removeprefix("# yaml-language-server: $schema=")
    assert "properties" in json.loads(Path(schema).read_text())
    result = run("init", "jsonl")  # a recipe
    assert result.stdout.endswith("then: pgrpo train --config CONFIG recipe=jsonl.yaml\n"), result.stderr


def test_one_source_of_a_config(run, folder: Path) -> None:
    assert run("--version").stdout.startswith("pgrpo 0.")
    assert "give one of --config, --run; 0 were given" in run("eval").stderr
    assert "give one of --config, --run, --model; 2" in run("generate", "--run", "r", "--model", "m").stderr
    assert "--run r: not a run folder" in run("eval", "--run", "r").stderr
    assert "--prompts p.txt: there is no such file" in run("generate", "-c", "c.yaml", "--prompts", "p.txt").stderr
    assert "go with --prompts" in run("generate", "-c", "c.yaml", "--samples", "2").stderr


@pytest.mark.faults
def test_a_folder_or_file_of_another_kind_is_refused_with_the_right_one(folder: Path, monkeypatch, capsys) -> None:
    """In this process, as nothing of these is loaded."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(logging, "lastResort", logging.lastResort)  # ``main`` sets it
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    (folder / "runs" / "r" / "checkpoints" / "step_1").mkdir(parents=True)
    (folder / "runs" / "r" / "config.yaml").write_text(CONFIG)
    (folder / "rows.txt").write_text("one\n")

    def refused(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["pgrpo", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.count("\n") == 1
        return said.removeprefix("pgrpo: ").removesuffix("\n")

    assert (
        refused("train", "--config", "runs/r")
        == "config 'runs/r': is a folder; give a file, such as runs/r/config.yaml"
    )
    for inside in ("runs/r/checkpoints", "runs/r/checkpoints/step_1"):
        belongs = f"not a run folder, it has no config.yaml; the run that it belongs to is {folder / 'runs' / 'r'}"
        assert refused("eval", "--run", inside) == f"--run {inside}: {belongs}"
        assert refused("export", inside, "out") == f"{inside}: {belongs}"
    assert (
        refused("export", "runs/r", "rows.txt/out") == f"rows.txt/out: {folder / 'rows.txt'} is a file; give a folder"
    )
    held_out = ("eval", "-c", "c.yaml", "data.eval_split=test", "--out", "rows.txt")
    assert refused(*held_out) == f"--out rows.txt: {folder / 'rows.txt'} is a file; give a folder"
    generate = ("generate", "-c", "c.yaml", "--prompts")
    assert refused(*generate, "runs") == "--prompts runs: is a folder; give a file of rows"
    assert refused(*generate, "rows.txt", "--out", "runs") == "--out runs: is a folder; give a file"
    with monkeypatch.context() as patch:  # root may write everywhere
        patch.setattr(os, "access", lambda path, mode: path != folder / "runs")
        cannot = f"--out runs: {folder / 'runs'} cannot be written; give another folder"
        assert refused(*generate, "rows.txt", "--out", "runs/o.jsonl") == cannot
        patch.setenv("WORLD_SIZE", "2")
        alone = "pgrpo export writes from one process: start it without torchrun"
        assert refused("export", "runs/r", "out") == alone
    nowhere = "--out no/o.jsonl: there is no folder no; make it, or give another file"
    assert refused(*generate, "rows.txt", "--out", "no/o.jsonl") == nowhere
    (folder / "empty.txt").write_text("\n")
    assert refused(*generate, "empty.txt") == "--prompts empty.txt: has no line of text; write a prompt a line"
    for key, value in (("model.path", "./model"), ("--resume", "nosuch")):
        dry_run = ("train", "--dry-run", "-c", "c.yaml", *([f"{key}={value}"] if "." in key else [key, value]))
        assert "there is no such folder; " in refused(*dry_run)
