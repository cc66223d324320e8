"""benchmarks/long_context.py on a tiny model: its rows, and what it does with a length that does not fit or would take too long.
benchmarks/rows.py and tables.py: what is in a file of rows after several processes added some, and tables of it."""

import json
import runpy
import sys
from contextlib import contextmanager
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


def test_a_long_update_foretells_the_next_one(run, script, monkeypatch):
    """Short updates take a minute here, which would foretell more than the limit: seconds a FLOP of the first long one, 0.01 s, do
    not."""
    part = script["Watch"].part

    @contextmanager
    def slow(watch, name, limit_s):
        with part(watch, name, limit_s):
            yield
        seconds = {"short update": 60.0, "long update": 0.01}
        if name in seconds and (name != "short update" or watch.row["prompt"] == 60):
            watch.row["parts_s"][name] = seconds[name]

    monkeypatch.setattr(script["Watch"], "part", slow)
    found = run("--limit-s", "50")
    assert ["seconds" in row for row in found] == [True, True] and found[1]["short_seconds"] == 60


def test_only_what_was_measured_of_the_same_work_is_skipped(run, script):
    assert ["not begun" in row["error"] for row in run("--limit-s", "0")] == [True, True]
    one = run("--layers", "1", "--skip-done")
    assert [("seconds" in row, row["shape_layers"]) for row in one] == [(False, None)] * 2 + [(True, 1)] * 2
    all_layers = run("--skip-done")
    assert [row["shape_layers"] for row in all_layers[4:]] == [None, None] and "seconds" in all_layers[4]
    assert len(run("--skip-done")) == len(run("--layers", "1", "--skip-done")) == 6
    row, key_of = all_layers[4], script["key_of"]
    assert row["overrides"] == ["model.dtype=float32", "data.path=/nowhere"]
    for name in ("offload", "overrides", "device", "config", "shape"):
        assert name in row and key_of(row | {name: "other"}) != key_of(row)


def test_rows_are_added_once(script, tmp_path):
    rows, file, other = script["rows"], tmp_path / "a.json", tmp_path / "b.json"
    file.write_text(json.dumps({"note": 1, "rows": [{"x": 1}]}))
    rows.add(file, {"x": 2})
    rows.add(other, {"x": 2}, {"x": 3})
    rows.add(file, *rows.read(other))
    assert json.loads(file.read_text()) == {"note": 1, "rows": [{"x": 1}, {"x": 2}, {"x": 3}]}
    assert rows.read(tmp_path / "none.json") == []


@pytest.fixture
def tables():
    return runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))["tables"]


def test_tables_of_the_docs_are_those_of_the_rows(tables):
    docs = (ROOT / "docs" / "figures.md").read_text().splitlines()
    rows = json.loads((ROOT / "benchmarks" / "multi_gpu.json").read_text())["rows"]
    lines = [line for own in tables(rows).values() for line in own]
    assert len(lines) > len(rows) and [line for line in lines if line not in docs] == []


def test_a_table_compares_the_same_work_only(tables):
    row = {"benchmark": "long_context", "device": "NVIDIA H100", "ranks": 1, "together": 1, "lora_rank": 0, "mfu": 0.5}
    row |= {"prompt": 10, "completion": 1, "group_size": 8, "seconds": 10.0, "shape": "small", "shape_layers": None}
    large = row | {"shape": "large", "seconds": 40.0}
    others = [
        large | {"shape_layers": 4},
        large | {"offload": "cpu"},
        large | {"overrides": ["model.mlp_chunks=2"]},
        row,
    ]
    four = large | {"ranks": 4, "together": 4, "seconds": 10.0}
    *_, last = tables([large, *(one | {"seconds": 10.0} for one in others), four])["long_context"]
    assert last.split("|")[5] == " 4.00 "
    *_, last = tables([*others, four])["long_context"]
    assert last.split("|")[5].strip() == ""
    step = {
        "device": "NVIDIA H100",
        "fsdp_size": None,
        "seconds": 1.0,
        "peak_gib": 1.0,
        "tokens_per_s": 10.0,
        "layers": 4,
    }
    steps = [step | {"ranks": 1}, step | {"ranks": 2, "tokens_per_s": 15.0}, step | {"ranks": 2, "layers": 8}]
    assert [line.split("|")[5].strip() for line in tables(steps)["train_step"][1:]] == ["1", "1.50", ""]


@pytest.mark.parametrize(
    ("name", "what"), [("h100_step", "without ranks"), ("h100_forest", "without ranks"), ("other", "of soak")]
)
def test_rows_that_no_table_is_made_of_are_refused_in_a_line(name, what, tmp_path, monkeypatch):
    file = ROOT / "benchmarks" / f"{name}.json"
    if name == "other":
        file = tmp_path / "other.json"
        file.write_text(json.dumps({"rows": [{"benchmark": "soak", "ranks": 1}]}))
    monkeypatch.setattr(sys, "argv", ["tables.py", str(file)])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(ROOT / "benchmarks" / "tables.py"), run_name="__main__")
    assert str(exit.value).startswith(f"{file}: a row {what}: there are tables of ") and "\n" not in str(exit.value)


def test_a_table_compares_with_one_gpu_and_says_what_did_not_fit(tables):
    row = {
        "benchmark": "long_context",
        "device": "NVIDIA H100 80GB HBM3",
        "completion": 1024,
        "group_size": 8,
        "lora_rank": 0,
    }
    row |= {"mfu": 0.6, "peak_gib": 70.0, "layers": {"full": 36}, "mlp_chunks": 1, "prompt": 131_072}
    one, four = row | {"ranks": 1, "together": 1, "seconds": 50.0}, row | {"ranks": 4, "together": 4, "seconds": 14.0}
    failed = one | {"prompt": 524_288, "error": "too much"}
    failed.pop("seconds")
    _, *lines = tables([one, four, failed, four | {"lora_rank": 16}])["long_context"]
    assert lines == [
        "| 1 H100, 1 | | 131,072, 1,024, 8 | 50.0 | 1 | 0.60 | 70.0 | full 36 |",
        "| 4 H100, 4 | | 131,072, 1,024, 8 | 14.0 | 3.57 | 0.60 | 70.0 | full 36 |",
        "| 1 H100, 1 | | 524,288, 1,024, 8 | too much | | | | full 36 |",
        "| 4 H100, 4 | 16 | 131,072, 1,024, 8 | 14.0 | | 0.60 | 70.0 | full 36 |",
    ]
    step = {
        "benchmark": "full_step",
        "ranks": 2,
        "device": "NVIDIA H200",
        "prompts": 2,
        "prompt": 4096,
        "completion": 64,
    }
    step |= {
        "group_size": 8,
        "overrides": ["a=1"],
        "rollout_tokens_per_s": 1234.5,
        "mfu_update": 0.5,
        "device_peak_gib": 70.0,
    }
    step |= {f"time/{name}": 1.0 for name in ("rollout", "update", "weight_sync", "step")}
    gradients = {"benchmark": "long_gradients", "from_float32": {"one rank": 0.02, "2 ranks": 0.021}}
    found = tables([step, gradients | {"from_one_rank": {"2 ranks": 0.0042}}])
    assert (
        found["full_step"][1]
        == "| 2 H200 | 2, 4,096, 64, 8 | `a=1` | 1.0 s, 1,234 | 1.0 s, 0.50 | 1.0 s | 1.0 s | 70.0 |"
    )
    assert found["long_gradients"][1:] == ["| one rank | 0.0200 | |", "| 2 ranks | 0.0210 | 0.0042 |"]
