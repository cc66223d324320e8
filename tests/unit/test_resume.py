"""A run that was interrupted and resumed equals the uninterrupted one, bit for bit (one thread, on the CPU)."""

import json
import math
import random
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import pgrpo
from pgrpo import checkpoint, grpo
from pgrpo.checkpoint import CheckpointError
from pgrpo.config import load_config
from pgrpo.distributed.world import World
from pgrpo.rollout.embedded.engine import EmbeddedEngine
from pgrpo.training.checkpointing import find
from pgrpo.training.messages import out_of_memory
from pgrpo.training.progress import Progress
from pgrpo.training.update import NonFiniteError

VOLATILE = ("time/", "perf/")


def digits(completions, **_):
    """Spread in almost every group, so that there is something to learn."""
    return [float(sum(c == "1" for c in text)) for text in completions]


def overrides(model, run_dir, steps=6, **changes):
    keys = {
        "model.path": model, "run_dir": run_dir, "train.steps": steps, "rollout.prompts_per_step": 4,
        "rollout.group_size": 4, "eval.every": 0, "track.console": "false", "checkpoint.every": 3, "checkpoint.keep": 9,
        "optim.schedule": "cosine", **changes,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in keys.items()]


def train(model, run_dir, resume=None, **changes):
    torch.set_num_threads(1)
    return pgrpo.train("quickstart", overrides(model, run_dir, **changes), rewards=[digits], resume=resume)


def metrics(run_dir):
    rows = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(VOLATILE)} for row in rows]


def assert_equal_checkpoints(one, other):
    (tensors, scalars), (other_tensors, other_scalars) = checkpoint.load(one), checkpoint.load(other)
    assert tensors.keys() == other_tensors.keys()
    for name, named in tensors.items():
        assert named.keys() == other_tensors[name].keys()
        for key, tensor in named.items():
            assert torch.equal(tensor, other_tensors[name][key]), (name, key)
    for key in ("step", "stream", "world_size"):
        assert scalars[key] == other_scalars[key]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train.updates_per_step": 2, "loss.kl_coef": 0.1},
        {"model.lora_rank": 4, "optim.lr": 1e-2, "loss.kl_coef": 0.1},
        {"loss.teacher": "${model.path}", "loss.teacher_kl": "full", "train.epochs_per_step": 2},
        {"loss.kl_coef": 0.1, "loss.ref_refresh_every": 2, "train.epochs_per_step": 2, "rollout.resample_limit": 2},
    ],
)
@pytest.mark.faults
def test_a_run_resumed_in_the_middle_equals_the_uninterrupted_run(tiny_model, tmp_path, changes):
    whole = train(tiny_model, tmp_path / "whole", **changes)
    parts = tmp_path / "parts"
    train(tiny_model, parts, **changes)
    (parts / "checkpoints" / "step_6").rename(tmp_path / "step_6")  # as if the run had stopped after step 3
    torch.manual_seed(1234)  # whatever the state of the process is
    train(tiny_model, parts, resume="auto", **changes)
    assert_equal_checkpoints(whole / "checkpoints" / "step_6", parts / "checkpoints" / "step_6")
    assert metrics(whole) == metrics(parts)
    assert len(metrics(parts)) == 6
    before, _ = checkpoint.load(whole / "checkpoints" / "step_3")
    after, _ = checkpoint.load(whole / "checkpoints" / "step_6")
    assert any(not torch.equal(before["model"][n], after["model"][n]) for n in before["model"])


def test_the_refreshed_reference_and_the_position_in_the_data_are_restored(tiny_model, tmp_path):
    """The test above can fail: both matter in this run."""
    changes = {"loss.kl_coef": 0.1, "loss.ref_refresh_every": 2, "rollout.resample_limit": 2}
    train(tiny_model, tmp_path / "run", **changes)
    rows = metrics(tmp_path / "run")
    assert [row["kl"] == 0 for row in rows] == [True, False] * 3  # the policy is compared with itself
    assert sum(row["resampling/groups"] for row in rows) > 0
    tensors, scalars = checkpoint.load(tmp_path / "run" / "checkpoints" / "step_3")
    initial, now = tensors["reference"], tensors["model"]
    assert any(not torch.equal(initial[name], now[name]) for name in now)
    offset = sum(4 + row["resampling/groups"] for row in rows[:3])
    assert scalars["stream"]["offset"] == offset > 12


def test_skipped_updates_in_a_row_are_counted_on_over_a_resume(tiny_model, tmp_path, monkeypatch):
    backward = grpo.backward

    def spoiled(*arguments):
        sums = backward(*arguments)
        return sums._replace(loss=sums.loss * math.nan)

    monkeypatch.setattr(grpo, "backward", spoiled)
    changes = {"train.max_skipped_updates": 2, "checkpoint.every": 1, "optim.schedule": "constant"}
    train(tiny_model, tmp_path / "run", steps=2, **changes)
    with pytest.raises(NonFiniteError, match="in 3 updates in a row"):
        train(tiny_model, tmp_path / "run", resume="auto", steps=9, **changes)
    assert len(metrics(tmp_path / "run")) == 2


def test_steps_without_any_reward_are_saved(tiny_model, tmp_path):
    """Their mean reward is nan."""

    def nothing(completions, **_):
        return [None] * len(completions)

    for steps in (2, 3):
        keys = overrides(tiny_model, tmp_path / "run", steps=steps, **{"rewards.functions": [], "checkpoint.every": 1})
        run_dir = pgrpo.train("quickstart", keys, rewards=[nothing], resume="auto")
        assert checkpoint.load(run_dir / "checkpoints" / f"step_{steps}")[1]["recent_rewards"] == ["nan"] * steps


def test_a_run_stops_at_its_target_reward(tiny_model, tmp_path, caplog):
    """After ten steps that reach it, the first of them before a resume; then there is nothing to go on with."""

    first = set()

    def ones(completions, prompts, **_):
        first.update(prompts if len(first) < 4 else ())  # the first step's four get nothing
        return [float(prompt not in first) for prompt in prompts]

    changes = {"train.target_reward": 1.0, "rewards.functions": [], "optim.schedule": "constant"}
    pgrpo.train("quickstart", overrides(tiny_model, tmp_path / "run", steps=5, **changes), rewards=[ones])
    keys = overrides(tiny_model, tmp_path / "run", steps=30, **changes | {"eval.every": 100, "eval.rows": 2})
    for _ in range(2):
        caplog.clear()
        run_dir = pgrpo.train("quickstart", keys, rewards=[ones], resume="auto")
        assert metrics(run_dir)[-1]["step"] == 11
        assert (run_dir / "checkpoints" / "step_11").is_dir()
        assert "train.target_reward=1.0 reached: mean reward of the last 10 steps 1; done after step 11" in caplog.text
    assert "eval/reward" in metrics(run_dir)[-1]


@pytest.mark.faults
def test_random_generators_that_rewards_draw_from_go_on_where_they_were(tiny_model, tmp_path):
    def noisy(completions, **_):
        return [float(c.count("1")) + random.random() + np.random.rand() + float(torch.rand(())) for c in completions]

    def run(name, **changes):
        torch.set_num_threads(1)
        return pgrpo.train(
            "quickstart", overrides(tiny_model, tmp_path / name, **changes), rewards=[noisy], resume="auto"
        )

    whole = run("whole")
    run("parts")
    (tmp_path / "parts" / "checkpoints" / "step_6").rename(tmp_path / "step_6")
    random.seed(5)
    np.random.seed(6)
    torch.manual_seed(7)
    run("parts")
    assert_equal_checkpoints(whole / "checkpoints" / "step_6", tmp_path / "parts" / "checkpoints" / "step_6")
    assert metrics(whole) == metrics(tmp_path / "parts")


@pytest.mark.faults
def test_prompts_go_on_where_they_were(tiny_model, tmp_path):
    """Every prompt once an epoch, over an interruption in the middle of one."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"a": 10 + n, "b": 11, "answer": str(21 + n)}) + "\n" for n in range(12)))
    seen = []

    def note(prompts, **_):
        seen.extend(dict.fromkeys(prompts))
        return [float(n) for n in range(len(prompts))]

    for steps in (2, 6):
        changes = {"data.path": rows, "checkpoint.every": 1, "optim.schedule": "constant"}
        keys = overrides(tiny_model, tmp_path / "run", steps=steps, **changes)
        keys += ["rewards.functions[0].function=format_regex", "rewards.functions[0].args={pattern: '.*'}"]
        pgrpo.train("quickstart", keys, rewards=[note], resume="auto")
    assert len(seen) == 24 and len(set(seen[:12])) == len(set(seen[12:])) == 12 and seen[:12] != seen[12:]


@pytest.mark.faults
def test_a_changed_config_is_printed_and_what_cannot_change_is_refused(tiny_model, tmp_path, caplog):
    train(tiny_model, tmp_path / "run", steps=3)
    with caplog.at_level("WARNING"):
        # eval.every is 0 as well: another key with the same name and value
        changes = {"optim.lr": 1e-5, "checkpoint.every": 0, "rollout.stop": "[x]"}
        train(tiny_model, tmp_path / "run", steps=4, resume="auto", **changes)
    said = [text for _, _, text in caplog.record_tuples if text.startswith("config differs from the checkpoint's: ")]
    assert sorted(text.partition(": ")[2] for text in said) == [
        "checkpoint.every: 3 -> 0",
        "optim.lr: 0.0005 -> 1e-05",
        'rollout.stop[0]: (not set) -> "x"',
        "train.steps: 3 -> 4",
    ]
    weights = checkpoint.load(tmp_path / "run" / "checkpoints" / "step_4")[0]["model"]
    for change, message in (
        ({"seed": 1}, "checkpoint's data has seed 0, this run's has 1"),
        ({"data.shuffle": "false"}, "checkpoint's data has shuffle True, this run's has False"),
        (
            {"model.lora_rank": 2},
            r"^--resume auto: .*step_4 was saved with model\.lora_rank=0, and here it is 2; set model\.lora_rank=0, or start",
        ),
    ):
        with pytest.raises((pgrpo.ConfigError, checkpoint.CheckpointError), match=message):
            train(tiny_model, tmp_path / "run", steps=5, resume="auto", **change)
    kept = checkpoint.load(tmp_path / "run" / "checkpoints" / "step_4")[0]["model"]
    assert all(torch.equal(tensor, kept[name]) for name, tensor in weights.items())


@pytest.mark.parametrize("console", ["false", "true"])
def test_the_log_says_from_where_a_run_resumed_and_what_was_wrong_or_other_then(tiny_model, tmp_path, console):
    """All of this is said before the log is open."""
    run_dir, changes = tmp_path / "run", {"checkpoint.every": 1, "optim.schedule": "constant", "track.console": console}
    train(tiny_model, run_dir, steps=3, **changes)
    (run_dir / "checkpoints" / "step_3" / "scalars.json").write_text("{}")
    (run_dir / "checkpoints" / ".writing-step_4").mkdir()
    before = len((run_dir / "log.txt").read_text().splitlines())
    train(tiny_model, run_dir, steps=4, resume="auto", **changes | {"optim.lr": 1e-5})
    lines = [line[21:] for line in (run_dir / "log.txt").read_text().splitlines()[before:]]
    saved = run_dir / "checkpoints"
    for line in (
        f"warning: {saved / '.writing-step_4'}: removed, left by a killed run",
        "warning: config differs from the checkpoint's: optim.lr: 0.0005 -> 1e-05",
        "warning: config differs from the checkpoint's: train.steps: 3 -> 4",
        f"warning: {saved / 'step_3'} is newer than step 2, from which this run resumes: renamed to abandoned_step_3",
        f"resuming from {saved / 'step_2'}: 2 of 4 steps done",
    ):
        assert lines.count(line) == 1, lines
    assert sum(line.startswith("warning: checkpoint step_3 is broken and skipped: ") for line in lines) == 1


@pytest.mark.faults
def test_out_of_memory_names_sizes_and_keys(warm, tiny_model, tmp_path):
    """The process is left a few megabytes before its first update."""
    code = """
import resource, sys
import pgrpo
def limit(completions, **_):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**21, -1))
    return [float(len(c)) for c in completions]
try:
    pgrpo.train("quickstart", sys.argv[1:], rewards=[limit])
except RuntimeError as error:
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    print(error)
"""
    keys = overrides(tiny_model, tmp_path / "run", **{"rollout.prompts_per_step": 128, "rollout.group_size": 16})
    done = warm.run(["-c", code, *keys])
    assert done.stdout.startswith("out of memory in step 1 ("), done.stdout + done.stderr
    # 128 prompts of 8 tokens, 16 completions of 4 for each: a larger budget changes nothing.
    for part in (
        "up to 9216 packed tokens (a whole step, train.token_budget=16384) in 2 layers", "model.activation_checkpointing=auto",
        "rollout.max_concurrent=256", ". Lower train.token_budget (below 9216, at least 12, the longest sample), set model.",
    ):  # fmt: skip
        assert part in done.stdout


@pytest.mark.parametrize(
    ("budget", "recompute", "advice"),
    [
        (100, "auto", "Lower train.token_budget (below 100, at least 12, the longest sample), set model.activation_checkpointing="),
        (12, "full", "Set model.activation_checkpointing=offload, or lower rollout.max_concurrent"),
        (12, "offload", "Lower rollout.max_concurrent"),
    ],
)  # fmt: skip
def test_advice_where_memory_runs_out_is_what_can_still_be_changed(tiny_model, budget, recompute, advice):
    keys = [f"model.path={tiny_model}", f"train.token_budget={budget}", f"model.activation_checkpointing={recompute}"]
    learner = SimpleNamespace(dims=SimpleNamespace(layers=2, hidden=64))
    parts: Any = SimpleNamespace(
        config=load_config("quickstart", keys), learner=learner, world=World(0, 1, torch.device("cpu"))
    )
    said = str(out_of_memory(MemoryError(), parts, Progress()))
    assert f" has up to {budget} packed tokens (train.token_budget={budget}) in 2 layers" in said
    assert said.partition(" decoded at once. ")[2].startswith(advice)


def test_out_of_memory_in_an_evaluation_names_it_and_what_it_decodes(tiny_model, tmp_path, monkeypatch):
    sample, greedy = EmbeddedEngine.sample, []

    def full(engine, requests, params, on_finished):
        greedy.append(params.temperature == 0)  # in evaluations only
        if sum(greedy) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        sample(engine, requests, params, on_finished)

    monkeypatch.setattr(EmbeddedEngine, "sample", full)
    with pytest.raises(RuntimeError) as caught:
        train(tiny_model, tmp_path / "run", **{"eval.every": 1, "eval.rows": 2})
    assert str(caught.value) == (
        "out of memory in the evaluation after step 1 (CUDA out of memory. Tried to allocate 2 GiB.): "
        "rollout.max_concurrent=256 completions of up to 4 tokens are decoded at once. Lower rollout.max_concurrent"
    )


def test_a_refused_resume_changes_nothing_of_the_run(tiny_model, tmp_path):
    """Its config.yaml is what ``pgrpo export`` goes by."""
    run_dir = train(tiny_model, tmp_path / "run", steps=1)
    before = (run_dir / "config.yaml").read_text()
    with pytest.raises(pgrpo.ConfigError, match="data has seed 0"):  # after all is built
        train(tiny_model, run_dir, resume="auto", seed=1)
    assert (run_dir / "config.yaml").read_text() == before
    with pytest.raises(pgrpo.ConfigError, match="step_9: there is no such folder"):
        train(tiny_model, tmp_path / "new", resume=tmp_path / "step_9")
    train(tiny_model, tmp_path / "new", steps=1)  # nothing of the refused run is in the way


def test_the_folder_of_a_run_or_of_its_checkpoints_stands_for_its_newest_checkpoint_that_is_whole(tiny_model, tmp_path):
    old = train(tiny_model, tmp_path / "old", steps=3, **{"checkpoint.every": 1})
    saved = old / "checkpoints"
    train(tiny_model, tmp_path / "new", resume=old, steps=4)
    rows = metrics(tmp_path / "new")
    assert [row["step"] for row in rows] == [4]
    (saved / "step_3" / "manifest.json").unlink()
    for name in (old, saved, saved / "step_2"):
        assert find(name, tmp_path / "other", World(0, 1, torch.device("cpu"))) == saved / "step_2"
    for step in (1, 2):
        (saved / f"step_{step}" / "scalars.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"{saved}: all checkpoints there are broken"):
        find(old, tmp_path / "other", World(0, 1, torch.device("cpu")))


def test_a_run_that_starts_from_anothers_checkpoint_has_its_own_wandb_run_and_best(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    changes = {"track.wandb": "true", "eval.every": 1, "eval.rows": 2, "checkpoint.keep_best": "eval/reward"}
    one = train(tiny_model, tmp_path / "one", steps=1, **changes)
    fork = train(tiny_model, tmp_path / "fork", resume=one / "checkpoints" / "step_1", steps=2, **changes)
    train(tiny_model, one, resume="auto", steps=2, **changes)

    def scalars(run_dir):
        return checkpoint.load(run_dir / "checkpoints" / "step_2")[1]

    ids = {path.name[-8:] for path in (one / "wandb").glob("offline-run-*")}
    assert ids == {scalars(one)["trackers"]["wandb_id"]}
    assert scalars(fork)["trackers"]["wandb_id"] not in ids
    assert scalars(fork)["best"]["step"] == 2


def test_two_runs_from_one_seed_are_bit_equal_and_another_seed_differs(tiny_model, tmp_path):
    first, second = (train(tiny_model, tmp_path / name, steps=3) for name in ("first", "second"))
    assert_equal_checkpoints(first / "checkpoints" / "step_3", second / "checkpoints" / "step_3")
    other = train(tiny_model, tmp_path / "other", steps=3, seed=1)
    assert metrics(first) == metrics(second) != metrics(other)


@pytest.mark.faults
def test_a_used_run_folder_is_refused_and_resume_auto_starts_an_empty_one(tiny_model, tmp_path):
    train(tiny_model, tmp_path / "run", steps=1, resume="auto")
    with pytest.raises(pgrpo.ConfigError, match="--resume auto"):
        train(tiny_model, tmp_path / "run", steps=1)


def test_a_folder_with_a_run_in_it_exits_with_2(warm, tiny_model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    done = warm.run(["-m", "pgrpo", "train", "--config", "quickstart", *overrides(tiny_model, tmp_path)])
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        f"pgrpo: run_dir={tmp_path}: not empty; go on with that run (--resume auto)"
    )
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.faults
def test_a_run_resumed_at_the_end_of_an_epoch_gets_a_full_next_epoch(warm, tiny_model, tmp_path):
    """Four prompts an epoch, one epoch a step; the second half runs in a process that has never seen the first. The whole run is
    this process's, whose strings hash otherwise."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"a": a, "b": 11, "answer": str(a + 11)}) + "\n" for a in (10, 25, 31, 88)))
    changes = {"data.path": rows, "rewards.functions[0].function": "format_regex", "optim.schedule": "constant"}
    changes |= {"rewards.functions[0].args": "{pattern: '.*1.*'}", "checkpoint.every": 1}
    torch.set_num_threads(1)
    pgrpo.train("quickstart", overrides(tiny_model, tmp_path / "whole", steps=4, **changes))
    for steps in (2, 4):
        keys = overrides(tiny_model, tmp_path / "parts", steps=steps, **changes)
        done = warm.run(["-m", "pgrpo", "train", "--config", "quickstart", "--resume", "auto", *keys])
        assert done.returncode == 0, done.stderr
    assert_equal_checkpoints(*(tmp_path / name / "checkpoints" / "step_4" for name in ("whole", "parts")))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    assert [row["epoch"] for row in metrics(tmp_path / "parts")] == [1, 2, 3, 4]
    assert any(row["grad_norm"] > 0 for row in metrics(tmp_path / "parts")[2:])


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_stops(warm, tiny_model, tmp_path, signum, code):
    run_dir = tmp_path / "run"
    keys = overrides(tiny_model, run_dir, steps=100000, **{"checkpoint.every": 0})
    process = warm.start(["-m", "pgrpo", "train", "--config", "quickstart", *keys])
    deadline = time.monotonic() + 60
    while not (run_dir / "metrics.jsonl").exists() or not metrics(run_dir):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signum)
    assert process.wait(timeout=30) == code
    saved = checkpoint.latest(run_dir / "checkpoints")
    assert saved is not None
    assert saved.name == f"step_{metrics(run_dir)[-1]['step']}"
