"""``pgrpo.train``, ``evaluate`` and ``export`` from Python: callbacks, rows, rewards by name, mappings, short tracebacks."""

from __future__ import annotations

import json
import traceback

import pytest
import torch

import pgrpo
from pgrpo import checkpoint
from pgrpo.config import ConfigError, load_config, secrets
from pgrpo.process.lock import open_run_dir

ROWS = [{"a": a, "b": b, "answer": str(a + b)} for a in range(10, 14) for b in (1, 2)]
HELD_OUT = [{"a": 30 + i, "b": 4, "answer": str(34 + i)} for i in range(3)]


def config(tiny_model, tmp_path, **more):
    return {
        "recipe": "addition",
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "rollout": {"prompts_per_step": 2, "group_size": 2},
        "rewards": {"functions": [{"function": "exact_match"}]},
        "train": {"steps": 3, "token_budget": 1000},
        "track": {"console": False},
        **more,
    }


def rows(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


class Recorder(pgrpo.Callback):
    """Writes down what it sees; with ``stop_at`` it stops the run in that event of that step."""

    def __init__(self, stop_at=None):
        self.seen, self.stop_at, self.logged = [], stop_at, {}

    def _see(self, event, run):
        self.seen.append((event, run.step))
        assert run.is_main and run.run_dir.name == "run"
        if (event, run.step) == self.stop_at:
            run.stop()

    def on_step_begin(self, run):
        self._see("begin", run)
        self.before = [p.detach().clone() for p in run.policy.parameters()]

    def on_step_end(self, run):
        self._see("end", run)
        self.logged[run.step] = dict(run.metrics)
        assert any(not torch.equal(p, q) for p, q in zip(run.policy.parameters(), self.before, strict=True))
        assert [len(group.episodes) for group in run.groups] == [2, 2]
        rewards = [episode.reward or 0.0 for group in run.groups for episode in group.episodes]
        assert run.metrics["reward"] == pytest.approx(sum(rewards) / 4)

    def on_evaluate(self, run):
        self._see("eval", run)
        assert "eval/reward" in run.metrics and "loss" not in run.metrics

    def on_save(self, run):
        self._see("save", run)


def spread(completions):
    """Different in every group, so that each step changes the weights."""
    return [float(i % 2) for i in range(len(completions))]


def train(tiny_model, tmp_path, *callbacks, **more):
    keys = {"eval": {"every": 2, "rows": 3}, "checkpoint": {"every": 2}}
    return pgrpo.train(
        config(tiny_model, tmp_path, **keys), rewards=["exact_match", spread], dataset=ROWS, eval_dataset=HELD_OUT,
        callbacks=callbacks, **more,
    )  # fmt: skip


def test_callbacks_hear_of_every_event_in_order_and_see_what_is_logged(tiny_model, tmp_path):
    one, two = Recorder(), Recorder()
    run_dir = train(tiny_model, tmp_path, one, two)
    assert one.seen == two.seen == [
        ("eval", 0), ("begin", 0), ("end", 1), ("begin", 1), ("end", 2), ("eval", 2), ("save", 2), ("begin", 2), ("end", 3),
        ("eval", 3), ("save", 3),
    ]  # fmt: skip
    logged = {row.pop("step"): row for row in rows(run_dir)}
    for step, metrics in one.logged.items():
        assert metrics.items() <= logged[step].items()
    evaluated = rows(run_dir / "eval" / "step_0", "samples.jsonl")
    assert {row["columns"]["a"] for row in evaluated} == {30, 31, 32}
    assert logged[1].keys() >= {"rewards/exact_match/mean", "rewards/exact_match_2/mean", "rewards/spread/mean"}
    written = load_config(run_dir / "config.yaml")  # rewards by name are in it
    assert [f.function for f in written.rewards.functions] == ["exact_match", "exact_match"]


@pytest.mark.parametrize("event", ["begin", "end", "eval", "save"])
def test_a_callback_stops_the_run_with_a_save_and_it_goes_on(tiny_model, tmp_path, caplog, event):
    run_dir = train(tiny_model, tmp_path, Recorder((event, 2)), Recorder())
    assert [row["step"] for row in rows(run_dir)] == [0, 1, 2]
    assert "eval/reward" in rows(run_dir)[2]
    assert checkpoint.latest(run_dir / "checkpoints").name == "step_2"  # pyright: ignore[reportOptionalMemberAccess]
    assert "a callback stopped the run after step 2 of 3, saved" in caplog.text
    train(tiny_model, tmp_path, resume="auto")
    assert [row["step"] for row in rows(run_dir)] == [0, 1, 2, 3]


def test_an_error_in_a_callback_ends_the_run_with_the_finished_step_saved(tiny_model, tmp_path):
    class Failing(pgrpo.Callback):
        def on_step_end(self, run):
            raise KeyError("theirs")

    with pytest.raises(KeyError, match="theirs"):
        train(tiny_model, tmp_path, Failing())
    assert checkpoint.latest(tmp_path / "run" / "checkpoints").name == "step_1"  # pyright: ignore[reportOptionalMemberAccess]


def test_what_nothing_would_call_is_refused(tiny_model, tmp_path):
    class Wrong(pgrpo.Callback):
        def on_log(self, run): ...

    with pytest.raises(
        ConfigError, match=r"callbacks\[0\]: nothing calls Wrong.on_log; there are on_step_begin, on_step_end"
    ):
        train(tiny_model, tmp_path, Wrong())
    with pytest.raises(ConfigError, match=r"callbacks\[0\]: .* is not a pgrpo.Callback"):
        train(tiny_model, tmp_path, print)
    with pytest.raises(ConfigError, match="config: None is no config; give a YAML file, the name of one, or a mapping"):
        pgrpo.train(None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=r"eval_dataset: eval\.every is 0"):
        pgrpo.train(config(tiny_model, tmp_path), eval_dataset=HELD_OUT)
    with pytest.raises(ConfigError, match="resume and overwrite"):
        pgrpo.train(config(tiny_model, tmp_path), resume="auto", overwrite=True)
    with pytest.raises(ConfigError, match="no built-in reward `mth`; did you mean `math`"):
        pgrpo.train(config(tiny_model, tmp_path), rewards=["mth"])
    with pytest.raises(ConfigError, match=r"wieght: no such key; did you mean rewards.functions\[i\].weight"):
        pgrpo.train(config(tiny_model, tmp_path), rewards=[{"function": "math", "wieght": 2}])
    with pytest.raises(ConfigError, match=r"a mapping names its function, such as `file.py:rows` or .* weight 1$"):
        pgrpo.train(config(tiny_model, tmp_path), rewards=[{"function": rows, "weight": 2}])  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "run").exists()


def test_evaluate_and_export_a_run(tiny_model, tmp_path, capsys):
    run_dir = train(tiny_model, tmp_path)
    metrics = pgrpo.evaluate(
        run_dir / "config.yaml", ["eval.samples=2"], checkpoint="auto", dataset=iter(HELD_OUT), out=tmp_path / "out"
    )
    assert f"wrote {tmp_path / 'out'}/samples.jsonl and summary.json" in capsys.readouterr().out.replace("\n", "")
    assert metrics["eval/pass@2"] >= metrics["eval/pass@1"] >= 0
    assert len(rows(tmp_path / "out", "samples.jsonl")) == 3 * 3  # two samples and a greedy one
    pgrpo.evaluate(run_dir / "config.yaml", dataset=HELD_OUT, out=tmp_path / "out")
    assert f"replaced {tmp_path / 'out'}/samples" in capsys.readouterr().out.replace("\n", "")
    with pytest.raises(ConfigError, match=r"data\.eval_path: the rows were passed from Python; pass them again"):
        pgrpo.evaluate(run_dir / "config.yaml", ["data.path=recipes/addition.py:rows"])
    assert pgrpo.export(run_dir, tmp_path / "export") == tmp_path / "export"
    assert (tmp_path / "export" / "model.safetensors").is_file()


def test_a_wrong_input_shows_the_callers_line_and_no_frames_of_ours(tiny_model, tmp_path, monkeypatch):
    with pytest.raises(ConfigError) as caught:
        pgrpo.train(config(tiny_model, tmp_path, seeed=1))
    frames = traceback.extract_tb(caught.value.__traceback__)
    assert [frame.name for frame in frames] == [frames[0].name, "wrapper"]
    assert "from None" not in str(caught.value) and caught.value.__suppress_context__
    monkeypatch.setenv("PGRPO_DEBUG", "1")
    with pytest.raises(ConfigError) as caught:
        pgrpo.train(config(tiny_model, tmp_path, seeed=1))
    assert len(traceback.extract_tb(caught.value.__traceback__)) > 4


def test_overwrite_removes_what_a_run_wrote_and_nothing_else(tiny_model, tmp_path):
    run_dir = train(tiny_model, tmp_path)
    (run_dir / "notes.txt").write_text("mine")
    (run_dir / "eval" / "step_9").mkdir()
    with pytest.raises(
        ConfigError, match=r"not empty; go on with that run \(--resume auto\), replace it \(--overwrite\)"
    ):
        pgrpo.train(config(tiny_model, tmp_path))
    with pytest.raises(ConfigError):  # wrong input removes nothing
        pgrpo.train(config(tiny_model, tmp_path), ["data.max_prompt_tokens=1"], overwrite=True)
    assert (run_dir / "checkpoints" / "step_3").is_dir()
    pgrpo.train(config(tiny_model, tmp_path), ["train.steps=1"], overwrite=True)
    assert [row["step"] for row in rows(run_dir)] == [1]
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_1"]
    assert (run_dir / "notes.txt").read_text() == "mine" and not (run_dir / "eval").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ConfigError, match=r"not empty; go on with that run .*, or set another run_dir"):
        open_run_dir(tmp_path / "other", resume=False, overwrite=True)  # nobody's run


@pytest.mark.faults
def test_an_error_shows_no_secret(tmp_path, monkeypatch):
    """Nor do its causes and notes."""
    monkeypatch.setattr(secrets, "_spellings", [])
    secrets.remember("hunter2-hunter2")

    def failing(*_):
        try:
            raise KeyError("key hunter2-hunter2", 3)
        except KeyError as error:
            error.add_note("of hunter2-hunter2")
            raise RuntimeError("401 for hunter2-hunter2") from error

    monkeypatch.setattr("pgrpo.commands.export.export", failing)
    with pytest.raises(RuntimeError) as raised:
        pgrpo.export(tmp_path, tmp_path / "out")
    shown = [
        line for line in traceback.format_exception(raised.value) if not line.startswith("  File")
    ]  # no source lines
    assert "".join(shown).count("(redacted)") == 3 and "hunter2" not in "".join(shown)
    assert raised.value.__cause__ is not None and raised.value.__cause__.args == ("key (redacted)", 3)
