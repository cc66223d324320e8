from __future__ import annotations

import builtins
import io
import json
import logging
import os
import resource
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from making import episode, group
from rich.console import Console

import pgrpo
from pgrpo.config import Config, ConfigError, RewardConfig, secrets
from pgrpo.tracking import Trackers, check_services, printable
from pgrpo.types import Group, Prompt

HOSTILE = "[bold red]5[/bold red] \x1b[2J\x07 \u202e :smile: é\nnext"


def make_config(**track) -> Config:
    config = Config()
    config.run_dir, config.model.path, config.data.path, config.train.steps = "runs/x", "m", "d", 20
    config.track.console = False
    for key, value in track.items():
        setattr(config.track, key, value)
    return config


def make_groups(count: int = 3, size: int = 2) -> list[Group]:
    return [
        group(
            Prompt(index=g, text=f"prompt {g}", token_ids=[1]),
            *(
                episode(
                    [2],
                    None if i else 0.5,
                    logprobs=[-0.5],
                    advantage=0.25 * i,
                    finish_reason="stop" if i else "length",
                    text=f"{HOSTILE} {g}.{i}",
                    parts={"exact_match": 1.0, "length": None},
                )
                for i in range(size)
            ),
        )
        for g in range(count)
    ]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def make_console(*, terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    real: dict[str, Any] = {"file": out, "force_terminal": terminal, "width": 120, "color_system": None}
    return Console(markup=False, highlight=False, emoji=False, **real), out


def test_metrics_rows_are_on_disk_when_the_step_is_over(tmp_path):
    track = Trackers(make_config(), tmp_path)
    track.log(1, {"reward": 0.5, "time/step": 2})
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 1, "reward": 0.5, "time/step": 2.0}]
    track.log(2, {"loss": float("nan"), "kl": float("inf"), "lr": 1e-6})
    assert rows(tmp_path / "metrics.jsonl")[1] == {"step": 2, "loss": None, "kl": None, "lr": 1e-6}
    track.close()
    track.close()


@pytest.mark.faults
def test_a_file_that_cannot_be_written_is_named(tmp_path):
    """By the row that does not fit, by closing it, and by going on with a run; what was written stays."""
    track = Trackers(make_config(), tmp_path)
    track.log(1, {"reward": 0.5})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    message = r"{}: cannot be written \(File too large\); training stops .*; make room, then --resume auto$"
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with pytest.raises(RuntimeError, match=message.format("metrics.jsonl")):
            track.log(2, {"reward": 0.5})
        with pytest.raises(RuntimeError, match=message.format("metrics.jsonl")):
            track.close()
        with pytest.raises(RuntimeError, match=message.format("metrics.jsonl")):
            Trackers(make_config(), tmp_path, resume={"step": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 1, "reward": 0.5}]


def test_completions_rows(tmp_path):
    track = Trackers(make_config(completions=3), tmp_path)
    groups = make_groups(3, 2)
    groups[1].episodes[0].text = "lone \udc80"
    track.completions(4, groups)
    track.completions(5, [])
    track.close()
    got = rows(tmp_path / "completions.jsonl")
    assert [row["prompt"] for row in got] == ["prompt 0", "prompt 1", "prompt 2"]
    assert got[0] == {
        "step": 4,
        "prompt": "prompt 0",
        "completion": f"{HOSTILE} 0.0",
        "reward": 0.5,
        "parts": {"exact_match": 1.0, "length": None},
        "advantage": 0.0,
        "finish_reason": "length",
    }
    assert got[1]["completion"] == "lone \udc80"
    assert '"é' not in (text := (tmp_path / "completions.jsonl").read_text("utf-8")) and " é" in text


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (1, 1), (6, 6), (100, 6)])
def test_number_of_completions(tmp_path, count, expected):
    track = Trackers(make_config(completions=count), tmp_path)
    track.completions(1, make_groups(3, 2))
    track.close()
    assert len(rows(tmp_path / "completions.jsonl")) == expected


def test_resume_has_each_step_once(tmp_path):
    track = Trackers(make_config(), tmp_path)
    for step in range(1, 6):
        track.log(step, {"reward": step})
        track.completions(step, make_groups())
        if step == 3:
            state = json.loads(json.dumps(track.state_dict()))
    track.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')  # killed while writing
    track = Trackers(make_config(), tmp_path, resume=state)
    for step in range(4, 8):
        track.log(step, {"reward": 10 * step})
        track.completions(step, make_groups())
    track.close()
    assert [(row["step"], row["reward"]) for row in rows(tmp_path / "metrics.jsonl")] == [
        *((s, s) for s in (1, 2, 3)),
        *((s, 10 * s) for s in (4, 5, 6, 7)),
    ]
    assert [row["step"] for row in rows(tmp_path / "completions.jsonl")] == [s for s in range(1, 8) for _ in range(4)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["completions.jsonl", "log.txt", "metrics.jsonl"]


def test_resume_drops_what_is_no_row_and_says_so(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnoise\n[]\n{"loss": 1}\n{"step": 2}\n')
    Trackers(make_config(), tmp_path, resume={"step": 9}).close()
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]
    assert caplog.text.count("dropped a line that is not a valid row") == 3


def test_without_state_the_files_start_anew(tmp_path):
    for _ in range(2):
        track = Trackers(make_config(), tmp_path)
        track.log(1, {"reward": 1})
        track.close()
    assert len(rows(tmp_path / "metrics.jsonl")) == 1
    assert (tmp_path / "log.txt").read_text().count("an earlier run saved no checkpoint; replacing its metrics, ") == 1
    assert (tmp_path / "log.txt").read_text().count("left  reward 1\n") == 2  # log.txt keeps what happened


def test_terminal_shows_escaped_text(tmp_path):
    console, out = make_console(terminal=True)
    track = Trackers(make_config(console_every=10), tmp_path, console=console)
    for step in range(2, 11):
        track.log(step, {"reward": 0.123456, "eval/pass@1": 0.75, "eval/completions/mean_length": 9.0})
        track.completions(step, make_groups())
        if step < 10:
            assert out.getvalue() == ""
    track.message(f"saved {HOSTILE}")
    track.close()
    text = out.getvalue()
    assert "step 10/20" in text and "reward 0.1235" in text and "eval/pass@1 0.75" in text and "mean_length" not in text
    assert r"[bold red]5[/bold red] \x1b[2J\x07 \u202e :smile: é" in text
    assert "\x1b[2J" not in text and "\x07" not in text and "\u202e" not in text
    assert text.count("prompt 0") == 2 and "0.5" in text and "saved [bold red]" in text


def test_plain_lines_without_a_terminal(tmp_path):
    console, out = make_console(terminal=False)
    track = Trackers(make_config(console_every=1, completions=2), tmp_path, console=console)
    track.log(1, {f"eval/pass@{i}": i for i in range(40)} | {"reward": 1.0})
    track.completions(1, make_groups(1, 2))
    track.close()
    lines = out.getvalue().splitlines()
    assert len(lines) == 3 and "left  reward 1  eval/pass@0 0" in lines[0] and len(lines[0]) > 300
    assert lines[1].startswith("  'prompt 0' -> '[bold red]5[/bold red] \\x1b[2J")
    assert lines[1].endswith("advantage 0  length")
    assert lines[2].endswith(r"é\nnext 0.1'  reward -  advantage 0.25  stop")


def test_a_step_says_how_long_the_rest_takes(tmp_path, monkeypatch):
    """By the mean of the last ten steps; the evaluation before training is in no step."""
    clock = iter([0, 100, 103, 105, *range(106, 115)])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    track = Trackers(make_config(console_every=1), tmp_path)
    for step in range(12):
        track.log(step, {"reward": 1.0})
    track.close()
    said = [line.split("  ")[1] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert said[:3] == [
        "step 0/20",
        "step 1/20, 3 s a step, about 57 s left",
        "step 2/20, 2.5 s a step, about 45 s left",
    ]
    assert said[-1] == "step 11/20, 1.1 s a step, about 9.9 s left"  # from step 1 at 103 s to step 11 at 114 s


def test_the_terminal_shows_every_reward(tmp_path):
    console, out = make_console(terminal=True)
    track = Trackers(make_config(console_every=1), tmp_path, console=console)
    names = ["rewards/exact_match/mean", "rewards/format/mean", "eval/rewards/format/mean"]
    track.log(1, dict.fromkeys([*names, "rewards/format/std"], 0.25))
    track.close()
    assert [f"{name} 0.25" in out.getvalue() for name in names] == [True] * 3
    assert "format/std" not in out.getvalue()


def test_printable():
    assert printable("a\tb\r\x9b\n日本") == "a\\tb\\r\\x9b\n日本"
    assert printable("é日", "ascii") == r"\xe9\u65e5"


def test_warnings_reach_the_log_and_the_terminal(tmp_path, monkeypatch, capsys):
    track = Trackers(make_config(), tmp_path)
    logging.getLogger("pgrpo.checkpoint").warning("step_%d is broken", 3)
    track.message("plain message")
    track.close()
    logging.getLogger("pgrpo.checkpoint").warning("after the end")
    text = (tmp_path / "log.txt").read_text()
    assert "warning: step_3 is broken\n" in text and "plain message\n" in text and "after the end" not in text
    captured = capsys.readouterr()
    assert captured.err == "warning: step_3 is broken\n" and captured.out == ""


def test_tensorboard_numbers_and_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track = Trackers(make_config(tensorboard=True), tmp_path)
    for step in range(1, 6):
        track.log(step, {"reward": step / 8, "time/step": 2.0})
        if step == 3:
            state = track.state_dict()
    track.close()
    track = Trackers(make_config(tensorboard=True), tmp_path, resume=state)
    track.log(4, {"reward": 40.0})
    track.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(1, 0.125), (2, 0.25), (3, 0.375), (4, 40.0)]
    assert [e.value for e in events.Scalars("time/step")] == [2.0] * 3


@pytest.mark.faults
def test_a_wandb_offline_run_is_written_and_resumed(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_API_KEY", "")
    track = Trackers(make_config(wandb=True, wandb_project="numbers"), tmp_path)
    track.log(1, {"reward": 0.625})
    state = json.loads(json.dumps(track.state_dict()))
    track.close()
    assert state["step"] == 1 and state["wandb_id"]
    track = Trackers(make_config(wandb=True), tmp_path, resume=state)
    assert track.state_dict()["wandb_id"] == state["wandb_id"]
    track.close()
    files = list(tmp_path.glob(f"wandb/offline-run-*/run-{state['wandb_id']}.wandb"))
    assert files
    content = b"".join(file.read_bytes() for file in files)
    assert b"reward" in content and b"0.625" in content and b"prompts_per_step" in content and b"numbers" in content


def test_tensorboard_has_completions_as_text_that_is_not_read_as_markdown(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugin_util import markdown_to_safe_html

    track = Trackers(make_config(tensorboard=True, completions=2, console_every=10), tmp_path)
    groups = make_groups(1, 2)
    groups[0].episodes[0].text = "<script>alert(1)</script> **bold** [x](javascript:alert(2))\n# head"
    for step in (1, 2, 10):
        track.completions(step, groups)
    track.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = events.Tensors("completions/text_summary")
    assert [event.step for event in found] == [1, 10]  # as often as the terminal; completions.jsonl has all
    assert [row["step"] for row in rows(tmp_path / "completions.jsonl")] == [1, 1, 2, 2, 10, 10]
    text = found[0].tensor_proto.string_val[0].decode()
    assert "reward 0.5  exact_match 1  length -  advantage 0  length" in text
    assert "reward -  exact_match 1  length -  advantage 0.25  stop" in text
    shown = markdown_to_safe_html(text)
    assert shown.count("prompt 0") == 2
    assert "&lt;script&gt;alert(1)&lt;/script&gt; **bold** [x](javascript:alert(2))\n# head" in shown
    assert not any(tag in shown for tag in ("<script", "<strong>", "<a ", "<h1>"))


def wandb_records(folder: Path) -> Iterator:
    """All records of the offline runs in a folder: a LevelDB log behind 7 bytes, whose blocks of 32 KiB hold chunks: a checksum,
    a length and a kind (whole, first, middle, last)."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue] - made when wandb is imported

    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        data, at, record = file.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if (left := 32768 - at % 32768) < 7:
                at += left
                continue
            length, kind = struct.unpack_from("<HB", data, at + 4)
            record += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):
                yield Record.FromString(record)
                record = b""


def test_wandb_offline_has_numbers_and_tables_of_completions(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    track = Trackers(make_config(wandb=True, completions=2, console_every=2), tmp_path)
    groups = make_groups(1, 2)
    groups[0].episodes[1].text = "lone \udc80"
    for step in (1, 2, 3):
        track.completions(step, groups)
        track.log(step, {"reward": step / 8})
    track.close()
    history: dict[str, list] = {}
    until = time.monotonic() + 60  # wandb's own process writes, and ``finish`` does not wait for it
    while not any(record.HasField("exit") for record in wandb_records(tmp_path)) and time.monotonic() < until:
        time.sleep(0.1)
    for record in wandb_records(tmp_path):
        for item in record.history.item:
            history.setdefault("/".join(item.nested_key), []).append(json.loads(item.value_json))
    assert history["reward"] == [0.125, 0.25, 0.375]
    assert history["completions/_type"] == ["table-file"] * 2  # steps 1 and 2
    assert history["completions/nrows"] == [2, 2]
    (file,) = tmp_path.glob(f"wandb/offline-run-*/files/{history['completions/path'][0]}")
    table = json.loads(file.read_text(encoding="utf-8"))
    assert table["columns"] == [
        "step", "prompt", "completion", "reward", "rewards/exact_match", "rewards/length", "advantage", "finish_reason"
    ]  # fmt: skip
    assert table["data"] == [
        [1, "prompt 0", f"{HOSTILE} 0.0", 0.5, 1.0, None, 0.0, "length"],
        [1, "prompt 0", "lone \\udc80", None, 1.0, None, 0.25, "stop"],
    ]


class OnlineRun:
    """What a wandb run is told, in order."""

    id = "abc123"

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []

    def define_metric(self, name: str, step_metric: str) -> None:
        self.told.append(("define_metric", (name, step_metric)))

    def log(self, row: dict) -> None:
        self.told.append(("log", row))

    def finish(self) -> None:
        self.told.append(("finish", None))


def test_wandb_online(tmp_path, monkeypatch):
    """The calls that an online run gets: one run, found again by its id, with the resolved config and its secrets redacted."""
    import wandb

    started, run = [], OnlineRun()
    monkeypatch.setattr(wandb, "init", lambda **given: started.append(given) or run)
    config = make_config(wandb=True, wandb_project="sums", completions=1)
    config.rewards.functions = [RewardConfig("llm_judge", args={"api_key": "sk-secret", "url": "http://x"})]
    track = Trackers(config, tmp_path / ".." / tmp_path.name)
    track.completions(1, make_groups(1, 2))
    track.log(1, {"reward": 0.5, "kl": float("nan")})
    state = track.state_dict()
    track.close()
    Trackers(config, tmp_path, resume=state).close()
    assert [(given["project"], given["name"], given["id"], given["resume"]) for given in started] == [
        ("sums", tmp_path.name, None, "allow"), ("sums", tmp_path.name, "abc123", "allow"),
    ]  # fmt: skip
    assert "mode" not in started[0]  # WANDB_MODE, or wandb's own default: online
    assert started[0]["config"]["rewards"]["functions"][0]["args"] == {"api_key": "(redacted)", "url": "http://x"}
    assert [name for name, _ in run.told] == ["define_metric", "log", "log", "finish", "define_metric", "finish"]
    assert run.told[0][1] == ("*", "step")
    assert run.told[1][1]["step"] == 1 and run.told[1][1]["completions"].data[0][1] == "prompt 0"
    assert run.told[2][1] == pytest.approx({"step": 1, "reward": 0.5, "kl": float("nan")}, nan_ok=True)


@pytest.mark.parametrize("error", ["CommError", "UsageError", TimeoutError, KeyError, "define_metric"])
def test_a_wandb_that_does_not_start_is_a_warning_and_its_run_is_found_again(tmp_path, monkeypatch, caplog, error):
    """Whatever it raises, and where: the run has its own files."""
    import wandb
    import wandb.errors

    class Failing(OnlineRun):
        def define_metric(self, name: str, step_metric: str) -> None:
            raise RuntimeError("no route")

    def init(**_):
        if error == "define_metric":
            return Failing()
        raise getattr(wandb.errors, error)("no route") if isinstance(error, str) else error("no route")

    monkeypatch.setattr(wandb, "init", init)
    track = Trackers(make_config(wandb=True), tmp_path, resume={"step": 0, "wandb_id": "abc123"})
    track.log(1, {"reward": 1.0})
    track.close()
    assert "wandb did not start (" in caplog.text and "no route" in caplog.text
    assert ": the run continues without it" in (tmp_path / "log.txt").read_text()
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 1, "reward": 1.0}]
    assert track.state_dict() == {"step": 1, "wandb_id": "abc123"}


def test_a_tensorboard_that_does_not_start_is_a_warning(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("a file")
    track = Trackers(make_config(tensorboard=True), tmp_path)
    track.log(1, {"reward": 1.0})
    track.close()
    assert "tensorboard did not start (FileExistsError" in caplog.text
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 1, "reward": 1.0}]


SECRET = 'ab"c\\d\n<é>'


@pytest.mark.faults
@pytest.mark.parametrize("terminal", [True, False])
def test_a_secret_in_a_prompt_reaches_no_tracker(tmp_path, monkeypatch, terminal):
    """JSONL, terminal, tensorboard, wandb; with characters that each of them escapes in its own way."""
    import wandb

    monkeypatch.setattr(secrets, "_spellings", [])
    secrets.remember(SECRET)
    run = OnlineRun()
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    console, out = make_console(terminal=terminal)
    track = Trackers(make_config(tensorboard=True, wandb=True, completions=2), tmp_path, console=console)
    groups = make_groups(1, 2)
    groups[0].prompt.text = f"{SECRET} {'x' * 596}{SECRET}"  # the terminal shows the last 600 characters
    groups[0].episodes[0].text = f"it is {SECRET!r}"
    track.completions(1, groups)
    track.log(1, {"reward": 0.5})
    track.message(f"401 for {SECRET}, {json.dumps({'key': SECRET})}, {json.dumps(repr(SECRET))}")
    track.close()
    table = run.told[1][1]["completions"].data
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    shown = [out.getvalue(), str(table), *(path.read_bytes().decode("utf-8", "replace") for path in files)]
    assert len(shown) == 6
    for text in shown:
        assert 'ab"' not in text and "c\\d" not in text and 'b\\"c' not in text and "<é>" not in text, text
    assert rows(tmp_path / "completions.jsonl")[0]["completion"] == "it is '(redacted)'"
    assert table[0][2] == "it is '(redacted)'"
    assert """401 for (redacted), {"key": "(redacted)"}, "'(redacted)'"\n""" in (tmp_path / "log.txt").read_text()


def test_digits_of_a_secret_are_digits_of_a_number_too(tmp_path, monkeypatch):
    monkeypatch.setattr(secrets, "_spellings", [])
    secrets.remember("123456")
    track = Trackers(make_config(), tmp_path)
    track.log(123456, {"n": 0.123456789})
    groups = make_groups(1, 1)
    groups[0].episodes[0].reward, groups[0].prompt.text = 123456.5, "pin 123456"
    track.completions(123456, groups)
    track.close()
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 123456, "n": 0.123456789}]
    [row] = rows(tmp_path / "completions.jsonl")
    assert (row["step"], row["reward"], row["prompt"]) == (123456, 123456.5, "pin (redacted)")


def test_a_secret_as_bytes_in_a_column_is_redacted(monkeypatch):
    monkeypatch.setattr(secrets, "_spellings", [])
    secrets.remember(SECRET)
    assert json.loads(secrets.to_json({"nested": [{"key": SECRET.encode()}]})) == {"nested": [{"key": "b'(redacted)'"}]}


LINKS = ("log.txt", "metrics.jsonl", "completions.jsonl")


@pytest.mark.faults
@pytest.mark.parametrize("name", [*LINKS, *(f".{name}.PID" for name in LINKS), "metrics.tmp", "completions.tmp"])
def test_a_symbolic_link_in_the_run_folder_is_not_followed(tmp_path, name):
    """A run that goes on writes each of its files anew; the link's target stays as it is."""
    victim, run, name = tmp_path / "victim", tmp_path / "run", name.replace("PID", str(os.getpid()))
    victim.write_text('{"step": 1}\nprecious')
    run.mkdir()
    track = Trackers(make_config(), run)
    track.log(1, {"reward": 1.0})
    track.close()
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(victim)
    message = r"log\.txt: cannot be written \(Too many levels of symbolic links\); .*; remove the symbolic link"
    # log.txt is only appended to, never replaced.
    with pytest.raises(RuntimeError, match=message) if name == "log.txt" else nullcontext():
        track = Trackers(make_config(), run, resume={"step": 1})
        track.log(2, {"reward": 1.0})
        track.close()
    assert victim.read_text() == '{"step": 1}\nprecious'


def test_a_wandb_without_login_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, warm):
    for name, value in (("HOME", str(tmp_path)), ("NETRC", str(tmp_path / "netrc")), ("WANDB_MODE", "online")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    keys = ["model.path=nowhere", f"run_dir={tmp_path / 'run'}", "track.wandb=true"]
    code = f"import pgrpo; pgrpo.train('quickstart', {keys})"
    done = warm.run(["-c", code], cwd=tmp_path)
    assert "track.wandb=true: wandb has no login; run `wandb login`, or set WANDB_MODE=offline" in done.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("key", "module", "fix"),
    [
        ("wandb", "wandb", r"pip install -e '\.\[wandb\]'"),
        ("tensorboard", "torch.utils.tensorboard", r"pip install -e '\.\[tensorboard\]'"),
    ],
)
def test_missing_package(tmp_path, monkeypatch, key, module, fix):
    real = builtins.__import__

    def fake(name, *args, **kwargs):
        if name == module:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)
    with pytest.raises(ConfigError, match=rf"track\.{key}=true: {key} is not installed; {fix}"):
        Trackers(make_config(**{key: True}), tmp_path)
    with pytest.raises(ConfigError, match=f"{key} is not installed"):
        check_services(make_config(**{key: True}))
    assert not logging.getLogger("pgrpo").handlers


def test_wandb_is_not_imported_unless_asked(tmp_path):

    code = "import sys, pgrpo.tracking; assert not {'wandb', 'torch', 'tensorboard'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.faults
def test_a_failing_tracker_warns_once_and_training_goes_on(tmp_path, caplog, monkeypatch):
    track = Trackers(make_config(tensorboard=True), tmp_path)

    def fail(step, metrics):
        raise ConnectionError("gone")

    monkeypatch.setattr(track._services["tensorboard"], "log", fail)
    for step in range(1, 4):
        track.log(step, {"reward": 1.0})
    track.close()
    assert caplog.text.count("tensorboard failed (ConnectionError: gone): the run continues without it") == 1
    assert len(rows(tmp_path / "metrics.jsonl")) == 3


@pytest.mark.faults
def test_a_tracker_that_goes_down_leaves_metrics_jsonl_complete(tiny_model, tmp_path, monkeypatch, caplog):
    """From the second step on tensorboard's disk is gone; the record of the run is whole."""
    from torch.utils.tensorboard import SummaryWriter

    add = SummaryWriter.add_scalar

    def fail(self, name, value, step):
        if step > 1:
            raise OSError(5, "Input/output error")
        add(self, name, value, step)

    monkeypatch.setattr(SummaryWriter, "add_scalar", fail)
    keys = [f"model.path={tiny_model}", f"run_dir={tmp_path / 'run'}", "train.steps=4", "rollout.prompts_per_step=2"]
    pgrpo.train("quickstart", [*keys, "eval.every=0", "track.console=false", "track.tensorboard=true"])
    assert caplog.text.count("tensorboard failed (OSError: [Errno 5] Input/output error): the run continues") == 1
    assert [row["step"] for row in rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]
    assert list((tmp_path / "run" / "checkpoints").glob("step_4"))
