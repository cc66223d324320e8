"""``pgrpo bench`` and benchmarks/policy.py on the quick start's model with random weights, and short matrix products."""

from __future__ import annotations

import json
import math
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import policy as policy_script
import pytest
import torch

from pgrpo.commands import bench as bench_module
from pgrpo.commands.bench import bench
from pgrpo.commands.bench_report import Row, Shape
from pgrpo.config import Config, ConfigError, load_config
from pgrpo.distributed.world import World


@pytest.fixture(autouse=True)
def short_products(monkeypatch):
    monkeypatch.setitem(bench_module.MATMUL_SIZE, "cpu", 64)


def config(model: Path, *overrides: str) -> Config:
    return load_config("quickstart", [f"model.path={model}", "data.path=/nowhere", *overrides])


# One layer: q and o 64 x 64, k and v 64 x 32, three matrices 64 x 256; two layers. The head: 64 x 14, 32 completion tokens.
MATRICES, HEAD, PAIR = 2 * 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 256), 2 * 64 * 14 * 32, 4 * 2 * 64
PAIRS_ONCE, PAIRS_BEHIND = 24 * 25 // 2, 8 * (4 * 24 + 4 * 5 // 2)
"""Of a prompt of 24 with eight completions of 4."""


def check_row(row: Row) -> None:
    grouped = MATRICES * (24 + 32) + PAIR * (PAIRS_ONCE + PAIRS_BEHIND) + HEAD
    repeated = MATRICES * (8 * 28) + PAIR * (8 * PAIRS_ONCE + PAIRS_BEHIND) + HEAD
    assert (row.prompt, row.completion, row.group_size, row.groups) == (24, 4, 8, 2)
    assert row.checkpointing == "none"
    assert row.rho == 8 * 28 / (24 + 32)
    assert row.flop_ratio == repeated / grouped
    assert row.max_dlogprob <= 1e-5
    assert row.old_ms > 0
    assert row.update_ms > 0
    # The rate, by which useful work was divided, is that of one matrix product for both.
    rates = 2 * grouped / row.old_ms / row.mfu_old, 3 * 2 * grouped / row.update_ms / row.mfu_update
    assert rates[0] == pytest.approx(rates[1])


def test_bench_times_grouped_and_repeated_prompts(tiny_model, capsys):
    rows = bench(config(tiny_model), [Shape(24, 4, 8, groups=2)], repeats=2)
    assert [row.method for row in rows] == ["grouped", "repeated"]
    for row in rows:
        check_row(row)
        assert math.isnan(row.peak_gib)
    assert rows[0].max_dlogprob == 0
    shown = capsys.readouterr().out
    assert "P=24 R=4 G=8 groups=2, checkpointing none, rho 4.00" in shown
    assert f"{rows[1].update_ms / rows[0].update_ms:.2f}" in shown and "TFLOP/s" in shown


def test_bench_shows_a_difference(tiny_model, monkeypatch):
    build = bench_module.build_batch

    def build_batch(forest, **kwargs):
        batch = build(forest, **kwargs)
        return replace(batch, logit_index=(batch.logit_index - 1).clamp(min=0)) if max(forest.parents) >= 0 else batch

    monkeypatch.setattr(bench_module, "build_batch", build_batch)
    grouped, repeated = bench(config(tiny_model), [Shape(8, 3, 2)], repeats=1)
    assert grouped.max_dlogprob == 0
    assert repeated.max_dlogprob > 1e-3


def test_bench_of_lora_counts_no_gradient_of_frozen_weights(tiny_model):
    for row in bench(
        config(tiny_model, "model.lora_rank=4", "model.lora_targets=[q_proj]"), [Shape(24, 4, 8)], repeats=1
    ):
        # q is 64 x 64, so that its adapter has 4 x 128 parameters in each of two layers.
        linear, adapter = MATRICES * (24 + 32), 2 * 2 * 4 * 128 * (24 + 32)
        attention = PAIR * (PAIRS_ONCE + PAIRS_BEHIND)
        old = (linear + adapter + HEAD + attention) / row.old_ms / row.mfu_old
        update = (2 * (linear + HEAD) + 3 * (adapter + attention)) / row.update_ms / row.mfu_update
        assert old == pytest.approx(update)
        assert row.max_dlogprob <= 1e-5
    with pytest.raises(ConfigError, match="'q_pro' is no linear layer"):
        bench(config(tiny_model, "model.lora_rank=4", "model.lora_targets=[q_pro]"), [Shape(8, 3, 2)])


def test_bench_of_random_weights_needs_only_config_json(tiny_model, tmp_path):
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    shapes = [Shape(8, 3, 2), Shape(5, 2, 3, 2)]
    rows = bench(config(tmp_path), shapes, recompute="attention", random_weights=True, repeats=1)
    got = [(row.prompt, row.checkpointing, row.method) for row in rows]
    assert got == [(p, "attention", method) for p in (8, 5) for method in ("grouped", "repeated")]


def test_bench_refuses_several_ranks(tiny_model, monkeypatch):
    monkeypatch.setattr(bench_module, "start", lambda: nullcontext(World(0, 2, torch.device("cpu"))))
    with pytest.raises(ConfigError, match="without torchrun"):
        bench(config(tiny_model), [Shape(8, 3, 2)])


def run_script(model: Path, *arguments: str) -> list[Row]:
    keys = [f"model.path={model}", "data.path=/nowhere"]
    return policy_script.main(["--config", "quickstart", "--repeats", "1", *arguments, "--", *keys])


def without_children(monkeypatch) -> None:
    monkeypatch.setattr(policy_script, "_resident_peaks", lambda *_: {})


def test_the_script_times_every_method_that_runs_on_this_machine(tiny_model, tmp_path, monkeypatch, capsys):
    without_children(monkeypatch)
    file = tmp_path / "b.json"
    rows = run_script(
        tiny_model, "--shape", "24,4,8,2", "--json", str(file), "--profile", str(tmp_path / "profile.txt")
    )
    assert [row.method for row in rows] == ["grouped", "repeated_packed", "repeated_padded", "concat"]
    for row in rows:
        check_row(row)
    assert "prefix_grouper_ours is left out: it is compared on a GPU" in capsys.readouterr().out
    assert "pgrpo::grouped_attention_backward" in (tmp_path / "profile.txt").read_text()
    report = json.loads(file.read_text())
    assert report.keys() == {"device", "versions", "rows"}
    assert report["versions"].keys() == {"python", "torch", "transformers"}
    commits = [row.pop("commit") for row in report["rows"]]
    assert len(set(commits)) == 1 and re.fullmatch(r"[0-9a-f]{7,}|", commits[0])  # nothing where there is no git
    assert [replace(Row(**row), peak_gib=0.0) for row in report["rows"]] == [replace(row, peak_gib=0.0) for row in rows]


def test_the_script_measures_the_memory_of_an_update_alone(tiny_model):
    held = torch.ones(2**28)  # one GiB that the measured process must not be charged with
    (row,) = run_script(tiny_model, "--shape", "24,4,8", "--methods", "grouped")
    assert 0 < row.peak_gib < 0.5
    assert held.sum() > 0


def test_the_script_adds_to_a_file_of_the_same_machine_and_no_other(tiny_model, tmp_path, monkeypatch):
    without_children(monkeypatch)
    file = tmp_path / "b.json"

    def run(prompt: int, keeps: list[str]) -> list[tuple[int, str]]:
        run_script(
            tiny_model,
            "--shape",
            f"{prompt},3,2",
            "--methods",
            "grouped",
            "--json",
            str(file),
            "--checkpointing",
            *keeps,
        )
        return [(row["prompt"], row["checkpointing"]) for row in json.loads(file.read_text())["rows"]]

    assert run(8, ["none"]) == [(8, "none")]
    assert run(9, ["attention", "none"]) == [(8, "none"), (9, "attention"), (9, "none")]
    assert run(8, ["none"]) == [(9, "attention"), (9, "none"), (8, "none")]
    file.write_text(file.read_text().replace('"device": "', '"device": "another '))
    with pytest.raises(SystemExit, match="has rows of device another CPU"):
        run(8, ["none"])


def test_the_script_refuses_before_it_works(tiny_model, tmp_path, capsys):
    for arguments, message in (
        (["--json", str(tmp_path / "none" / "b.json")], "there is no folder"),
        (["--methods", "fastest"], "invalid choice: 'fastest'"),
        (["--checkpointing", "some"], "invalid choice: 'some'"),
    ):
        with pytest.raises(SystemExit):
            run_script(tiny_model, "--shape", "8,3,2", *arguments)
        assert message in capsys.readouterr().err
