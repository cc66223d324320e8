"""What a run saves comes back, whatever else it finds is refused: another data set, damaged scalars, another shape."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from pgrpo.checkpoint import CheckpointError
from pgrpo.config import ConfigError, load_config
from pgrpo.data import PromptStream
from pgrpo.distributed.world import World
from pgrpo.training.checkpointing import Checkpoints
from pgrpo.training.progress import Progress
from pgrpo.types import Prompt

TRACKERS = {"step": 3, "wandb_id": None}
ROWS = [{"q": str(n), "answer": n} for n in range(6)]


def build(run_dir, rows=ROWS, seed=0, width=3) -> Any:
    """The parts of a run that checkpoints know, with a model of one layer."""
    policy = nn.Module()
    policy.model = nn.Linear(width, 2)
    optimizer = torch.optim.AdamW(policy.parameters())
    policy.model(torch.ones(width)).sum().backward()
    optimizer.step()
    prompts = [Prompt(i, str(i), [i], columns=row) for i, row in enumerate(rows)]
    stream, progress = PromptStream(prompts, seed=seed, shuffle=True), Progress()
    config, world = load_config("quickstart", [f"run_dir={run_dir}"]), World(0, 1, torch.device("cpu"))
    learner: Any = SimpleNamespace(config=config, world=world, policy=policy, optimizer=optimizer, reference=None)
    checkpoints = Checkpoints(run_dir / "checkpoints", learner, stream, progress)
    return SimpleNamespace(
        checkpoints=checkpoints, optimizer=optimizer, stream=stream, progress=progress, policy=policy
    )


@pytest.fixture
def saved(tmp_path):
    """A run after three steps, saved; its updates were skipped twice, its metrics wait for an evaluation."""
    run = build(tmp_path / "run")
    run.stream.take(8)
    run.progress.skipped_in_row = 2
    run.progress.step, run.progress.recent_rewards = 3, [0.5, math.nan]
    run.progress.best, run.progress.unlogged = {"step": 2, "value": 0.25}, {"reward": math.nan, "lr": 0.1}
    run.checkpoints.save(TRACKERS)
    run.checkpoints.wait()
    return run


def test_all_that_a_run_saves_comes_back(saved, tmp_path):
    """Also how many updates were skipped in a row, without which a resumed run would go on for ever."""
    drawn = torch.rand(3)  # after the save: what a resumed run draws next
    run = build(tmp_path / "run")
    assert run.checkpoints.restore("auto") == TRACKERS
    assert torch.equal(torch.rand(3), drawn)
    assert run.progress.skipped_in_row == 2 and run.progress.step == 3 and run.progress.best == saved.progress.best
    assert (
        str(run.progress.recent_rewards) == "[0.5, nan]" and str(run.progress.unlogged) == "{'reward': nan, 'lr': 0.1}"
    )
    assert [p.index for p in run.stream.take(9)] == [p.index for p in saved.stream.take(9)]
    for name, weight in run.policy.named_parameters():
        moments, others = (r.optimizer.state[r.policy.get_parameter(name)] for r in (run, saved))
        assert torch.equal(weight, saved.policy.get_parameter(name))
        assert moments.keys() == others.keys() and all(torch.equal(moments[key], others[key]) for key in moments)


OTHER_ROWS = [*ROWS[:-1], {"q": "5", "answer": 6}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            OTHER_ROWS,
            r"the checkpoint's data has rows \(a hash of their content\) [0-9a-f]{16}, this run's has [0-9a-f]{16}",
        ),
        (ROWS[::-1], r"has rows \(a hash"),
        (ROWS[:5], "has size 6, this run's has 5"),
    ],
)
def test_another_data_set_does_not_go_on_in_the_same_run(saved, tmp_path, rows, message):
    with pytest.raises(ConfigError, match=f"cannot resume: .*{message}.*another run_dir, and pass the checkpoint"):
        build(tmp_path / "run", rows).checkpoints.restore("auto")


def test_equal_rows_from_another_place_go_on(saved, tmp_path):
    """Python rows, with numbers of numpy, in place of a file's."""
    assert build(
        tmp_path / "run", [{**row, "answer": torch.tensor(row["answer"]).numpy()} for row in ROWS]
    ).checkpoints.restore("auto")


def test_another_run_may_go_on_with_other_data_and_begins_at_its_first_prompt(saved, tmp_path, caplog):
    path = tmp_path / "run" / "checkpoints" / "step_3"
    same, other = build(tmp_path / "same"), build(tmp_path / "other", OTHER_ROWS)
    with caplog.at_level(logging.WARNING):
        same.checkpoints.restore(path)
        assert "hash" not in caplog.text
        other.checkpoints.restore(path)
    assert "a hash of their content" in caplog.text and "training starts with the first prompt" in caplog.text
    assert same.stream.epoch > 1 and other.stream.epoch == 0 and other.progress.step == 3
    assert torch.equal(other.policy.model.weight, saved.policy.model.weight)


def test_a_step_is_saved_again_once_its_metrics_are_logged(saved, tmp_path):
    saved.progress.unlogged = None
    saved.checkpoints.save(TRACKERS)
    saved.checkpoints.wait()
    run = build(tmp_path / "run")
    run.checkpoints.restore("auto")
    assert run.progress.step == 3 and run.progress.unlogged is None


def test_another_run_s_checkpoint_is_not_this_run_s_own(saved, tmp_path):
    """The step that it went on from is saved in its own folder, also where nothing of it waits any more."""
    saved.progress.step, saved.progress.unlogged = 4, None
    saved.checkpoints.save(TRACKERS)
    saved.checkpoints.wait()
    other = build(tmp_path / "other")
    other.checkpoints.restore(tmp_path / "run" / "checkpoints" / "step_4")
    assert other.progress.step == 4 and other.progress.best is None
    other.checkpoints.save(TRACKERS)
    other.checkpoints.wait()
    assert [path.name for path in (tmp_path / "other" / "checkpoints").iterdir()] == ["step_4"]


def test_a_link_that_is_named_is_the_checkpoint_it_points_to(saved, tmp_path):
    (tmp_path / "newest").symlink_to(tmp_path / "run" / "checkpoints" / "step_3")
    run = build(tmp_path / "run")
    run.checkpoints.restore(tmp_path / "newest")
    assert run.progress.step == 3 and run.progress.best == {"step": 2, "value": 0.25}  # the run's own, not another's


ODD_VALUES: list[Any] = [..., None, True, -1, 1.5, 10**30, "", "abc", [], [[]], {}, {"w": 1}]


@pytest.mark.faults
def test_damaged_scalars_are_refused_or_mean_the_same(saved, tmp_path):
    """Every field of scalars.json with another value, or lost, though all sums agree."""
    folder = tmp_path / "run" / "checkpoints" / "step_3"
    whole, manifest = (json.loads((folder / f"{name}.json").read_text()) for name in ("scalars", "manifest"))
    run, refused = build(tmp_path / "run"), 0
    places = [(key,) for key in whole] + [
        (key, inner) for key in whole if isinstance(whole[key], dict) for inner in whole[key]
    ]
    for *outer, key in [*places, ("recent_rewards", 0)]:
        for odd in ODD_VALUES:
            scalars = json.loads(json.dumps(whole))
            within = cast("Any", scalars[outer[0]] if outer else scalars)
            if odd is ...:
                del within[key]
            else:
                within[key] = odd
            text = json.dumps(scalars)
            (folder / "scalars.json").write_text(text)
            manifest["files"]["scalars.json"] = {"size": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
            (folder / "manifest.json").write_text(json.dumps(manifest))
            try:
                trackers = run.checkpoints.restore(folder)
            except (CheckpointError, ConfigError):
                refused += 1
            else:  # a value of the right form: a text, a number, nothing, where these may be
                assert trackers.keys() == TRACKERS.keys() and type(run.progress.step) is int and run.progress.step >= 0
                assert all(type(reward) is float for reward in run.progress.recent_rewards)
                run.stream.take(3)
    assert refused > 0.75 * len(places) * len(ODD_VALUES)


@pytest.mark.faults
def test_a_checkpoint_of_another_shape_is_refused(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.lora_rank: weight is \[2, 3\] in the checkpoint, \[2, 4\] here"):
        build(tmp_path / "run", width=4).checkpoints.restore("auto")
