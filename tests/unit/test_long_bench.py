"""benchmarks/long_context.py on a tiny model: its rows, and what it does with a length that does not fit or would take too long.
benchmarks/rows.py: what is in a file of rows after several processes added some."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield runpy.run_path(str(ROOT / "benchmarks" / "long_context.py"))
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture
def run(script, tiny_model, tmp_path, monkeypatch):
    """The rows that a call leaves in its file."""
    monkeypatch.setitem(script["measure"].__globals__, "_matmul_flops", lambda *_: 1e9)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / "long_context.py"), "--json", "FILE"])

    def call(*arguments):
        file = tmp_path / "rows.json"
        sizes = ["--prompt", "40", "60", "--warm-up", "20", "--completion", "5", "--group-size", "2"]
        keys = ["model.dtype=float32", "data.path=/nowhere"]
        given = ["--shape-of", str(tiny_model), *sizes, "--json", str(file), "--commit", "abc", *arguments, "--", *keys]
        script["main"](given)
        return json.loads(file.read_text())["rows"]

    return call


def test_a_row_for_each_length_and_kind_of_training(run):
    found = run("--lora", "0", "2")
    assert [(row["lora_rank"], row["prompt"]) for row in found] == [(0, 40), (0, 60), (2, 40), (2, 60)]
    for row in found:
        assert row["seconds"] == row["parts_s"]["long update"] > 0 and row["compiled_in_it"] == 0
        assert row["mfu"] == pytest.approx(row["tflops_a_rank"] / row["matmul_tflops"])
        assert row["tokens_per_s"] * row["seconds"] == pytest.approx(row["prompt"] + 2 * 5)
        assert (row["commit"], row["benchmark"], row["ranks"], row["settings"]) == ("abc", "long_context", 1, "auto")
        assert row["command"] == "python benchmarks/long_context.py --json FILE"
    assert found[0]["grad_norm"] != found[1]["grad_norm"] > 0


def test_a_length_that_does_not_fit_is_tried_with_less_memory_and_the_next_one_too(run, script, monkeypatch):
    tried, update = [], script["update_policy"]

    def update_policy(learner, progress, groups):
        tokens = len(groups[0].prompt.token_ids)
        mode = learner.config.model.activation_checkpointing
        tried.append((tokens, mode))
        if tokens == 60 or (tokens == 40 and mode == "auto"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
        return update(learner, progress, groups)

    monkeypatch.setitem(script["measure"].__globals__, "update_policy", update_policy)
    found = run()
    assert [tokens_and_mode for tokens_and_mode in tried if tokens_and_mode[0] > 20] == [
        (40, "auto"), (40, "offload"), (60, "auto"), (60, "offload"),
    ]  # fmt: skip
    assert [row.get("error") for row in found] == [
        "CUDA out of memory. Tried to allocate",
        None,
        *2 * [found[0]["error"]],
    ]
    assert found[1]["mlp_chunks"] == 16 and found[1]["layers"] == {"offload": 2} and "seconds" not in found[0]
    tried.clear()
    assert run("--skip-done") == found and tried == []


def test_an_update_that_would_take_too_long_is_not_begun(run):
    for row in run("--limit-s", "0"):
        assert row["error"].startswith("not begun: ") and "seconds" not in row and row["short_seconds"] > 0


def test_rows_are_added_once(script, tmp_path):
    rows, file, other = script["rows"], tmp_path / "a.json", tmp_path / "b.json"
    file.write_text(json.dumps({"note": 1, "rows": [{"x": 1}]}))
    rows.add(file, {"x": 2})
    rows.add(other, {"x": 2}, {"x": 3})
    rows.add(file, *rows.read(other))
    assert json.loads(file.read_text()) == {"note": 1, "rows": [{"x": 1}, {"x": 2}, {"x": 3}]}
    assert rows.read(tmp_path / "none.json") == []
