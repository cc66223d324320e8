"""Checkpoints that are written while training goes on: a consistent copy, errors that stop the run, what stays."""

from __future__ import annotations

import os
import textwrap
import time
from pathlib import Path

import pytest
import torch

import pgrpo
from pgrpo.checkpoint import CheckpointError, Writer, latest, list_steps, load, tidy, verify
from pgrpo.checkpoint import files as files_module
from pgrpo.checkpoint import writer as writer_module
from pgrpo.checkpoint.shards import whole
from pgrpo.config import ConfigError
from pgrpo.distributed.world import World

WORLD = World(0, 1, torch.device("cpu"))


def sets(*values: float):
    return {"model": {f"w{i}": whole(torch.full((1000, 100), value)) for i, value in enumerate(values)}}


def test_what_is_written_is_the_copy_of_the_moment(tmp_path):
    writer, weight = Writer(tmp_path, WORLD, keep=2), torch.zeros(3_000_000)
    for step in (1, 2, 3):
        weight.fill_(step)
        writer.save(step, {"model": {"w": whole(weight)}}, {"step": step})
        weight.fill_(-1.0)
    writer.wait()
    assert list_steps(tmp_path) == [2, 3]
    for step in (2, 3):
        tensors, scalars = load(tmp_path / f"step_{step}")
        assert scalars == {"step": step} and torch.equal(tensors["model"]["w"], torch.full((3_000_000,), float(step)))


@pytest.mark.parametrize(("can_wait", "advice"), [(True, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"), (False, "pkill -TERM")])
def test_torchrun_would_kill_a_slow_save(tmp_path, monkeypatch, caplog, can_wait, advice):
    monkeypatch.setattr(writer_module, "CAN_WAIT", can_wait)
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr(writer_module.time, "monotonic", lambda: float(next(clock)))
    writer = Writer(tmp_path, WORLD, keep=2)

    def save(step):
        writer.save(step, sets(1.0), {})
        writer.wait()

    save(1)
    assert not caplog.text  # not under torchrun
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    save(2)
    save(3)
    assert [advice in record.getMessage() for record in caplog.records] == [True]
    assert "took 20 s to write, and torchrun kills the ranks 30 s after" in caplog.text


def test_a_save_reads_each_of_its_files_once_and_no_older_checkpoint(tmp_path, monkeypatch):
    """Also where it removes an old one, which it does only beside a newer one that is sound."""
    hashed, sha256 = [], files_module._sha256
    monkeypatch.setattr(files_module, "_sha256", lambda file: (hashed.append(file.stat().st_size), sha256(file))[1])
    writer, written = Writer(tmp_path, WORLD, keep=2), []
    for step in range(1, 5):
        writer.save(step, sets(step, -step), {})
        writer.wait()
        written += [file.stat().st_size for file in (tmp_path / f"step_{step}").iterdir()]
    assert list_steps(tmp_path) == [3, 4]
    assert sum(hashed) == sum(written) > 4 * 800_000


def test_what_a_failed_write_left_is_no_part_of_the_next_one(tmp_path):
    left = tmp_path / ".writing-step_1" / "model.7.safetensors"
    left.parent.mkdir()
    left.write_bytes(b"half")
    writer = Writer(tmp_path, WORLD, keep=1)
    writer.save(1, sets(1.0), {})
    writer.wait()
    assert latest(tmp_path) == tmp_path / "step_1" and not (tmp_path / "step_1" / left.name).exists()


def test_the_best_stays(tmp_path):
    writer = Writer(tmp_path, WORLD, keep=1)
    for step in (1, 2, 3, 4):
        writer.save(step, sets(step), {}, spare=[2])
    writer.wait()
    assert list_steps(tmp_path) == [2, 4]


@pytest.mark.faults
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_or_inf_weights_fail_the_save_and_the_next_call_raises(tmp_path, bad):
    writer, spoiled = Writer(tmp_path, WORLD, keep=2), sets(1.0, 2.0)
    writer.save(1, sets(1.0), {})
    spoiled["model"]["w1"].tensor[7, 7] = bad
    writer.save(2, spoiled, {})
    with pytest.raises(CheckpointError, match="model weight w1 holds NaN or inf: not saved"):
        writer.save(3, sets(3.0), {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_1"]
    writer.save(3, sets(3.0), {})  # the error is told once
    writer.wait()
    assert list_steps(tmp_path) == [1, 3]


@pytest.mark.faults
def test_a_checkpoint_gets_its_name_only_when_all_of_it_is_on_disk(tmp_path, monkeypatch):
    """Its files and its folder are synced before the rename and the folder above after it; until then another is the latest."""
    synced, renamed = [], []
    fsync, rename = os.fsync, os.rename

    def noting_fsync(descriptor):
        fsync(descriptor)
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    def noting_rename(source, target):
        inside = {str(source), *(str(path) for path in Path(source).iterdir())}
        renamed.append((Path(source).name, Path(target).name, inside <= set(synced), latest(tmp_path), len(synced)))
        assert all((Path(source) / name).is_file() for name in ("manifest.json", "scalars.json"))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "rename", noting_rename)
    writer = Writer(tmp_path, WORLD, keep=2)
    for step in (1, 2):
        writer.save(step, sets(float(step)), {})
    writer.wait()
    before = [None, tmp_path / "step_1"]
    assert [entry[:4] for entry in renamed] == [
        (f".writing-step_{step}", f"step_{step}", True, before[step - 1]) for step in (1, 2)
    ]
    assert [synced[entry[4]] for entry in renamed] == [str(tmp_path)] * 2


KILLED = """
    import os, signal, sys, torch
    from pathlib import Path
    from pgrpo.checkpoint import Writer
    from pgrpo.distributed.world import World
    from pgrpo.checkpoint.shards import whole

    def killing(function, left):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call

    def run(root):
        writer = Writer(root, World(0, 1, torch.device("cpu")), keep=1)
        for step in range(1, 100):
            writer.save(step, {"model": {"w": whole(torch.full((200_000,), float(step)))}}, {"step": step})
            with (root.parent / f"{root.name}.begun").open("a") as begun:
                print(step, file=begun)  # written at once when it closes: a kill leaves the lines whole

    for case in sys.argv[2:]:
        call, count = case.split(":")
        child = os.fork()
        if child == 0:  # one system call of the writer is its last: nothing of the program runs after it
            setattr(os, call, killing(getattr(os, call), [int(count)]))
            run(Path(sys.argv[1]) / f"{call}{count}")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
"""


@pytest.mark.faults
def test_sigkill_between_write_rename_and_prune_leaves_a_checkpoint_that_resumes(warm, tmp_path):
    """Killed at the call itself: renames (to the name, away from it), the removals of pruning, syncs, new folders."""
    cases = [f"{call}:{count}" for call in ("rename", "rmdir", "unlink", "fsync", "mkdir") for count in (3, 4, 5, 6)]
    done = warm.run(["-c", textwrap.dedent(KILLED), tmp_path, *cases])
    assert done.returncode == 0, done.stderr
    left, resumed = set(), 0
    for case in cases:
        root = tmp_path / case.replace(":", "")
        counted = root.parent / f"{root.name}.begun"
        begun = int(counted.read_text().split()[-1]) if counted.exists() and counted.read_text() else 1
        left |= {entry.name.split("step")[0] for entry in root.iterdir()}
        steps = list_steps(root)
        for step in steps:
            verify(root / f"step_{step}")
        tidy(root)
        assert not list(root.glob(".*")) and list_steps(root) == steps
        newest = latest(root)
        if newest is None:
            assert begun == 1  # killed in the very first save
            continue
        resumed += 1
        assert begun - 1 <= load(newest)[1]["step"] <= begun + 1, case
    assert ".writing-" in left and resumed >= 15


def test_keep_best_needs_evaluations_and_a_metric_that_exists(tiny_model, tmp_path):
    keys = [f"model.path={tiny_model}", f"run_dir={tmp_path / 'run'}", "checkpoint.keep_best=eval/rewards"]
    with pytest.raises(ConfigError, match=r"checkpoint\.keep_best: eval/rewards needs evaluations; set eval\.every"):
        pgrpo.train("quickstart", [*keys, "eval.every=0"])
    keys += ["eval.every=1", "eval.rows=4", "train.steps=1", "track.console=false"]
    with pytest.raises(ConfigError, match=r"eval/rewards is not a metric of evaluation; there are eval/reward, "):
        pgrpo.train("quickstart", keys)


def test_a_failed_save_stops_the_run_before_its_end(tiny_model, tmp_path):
    """The folder of checkpoints is a file: the error of the writing thread ends the run within a few steps."""
    run_dir = tmp_path / "run"

    def spoil(completions, **_):
        if not (run_dir / "checkpoints").exists():
            (run_dir / "checkpoints").touch()
        time.sleep(0.1)
        return [float(len(c)) for c in completions]

    keys = [f"model.path={tiny_model}", f"run_dir={run_dir}", "train.steps=50", "rollout.prompts_per_step=2"]
    keys += ["checkpoint.every=1", "eval.every=0", "track.console=false", "rollout.group_size=2"]
    with pytest.raises(CheckpointError, match=r"checkpoints/\.writing-step_1: cannot be made"):
        pgrpo.train("quickstart", keys, rewards=[spoil])
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) < 10
