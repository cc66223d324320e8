"""The benchmarks of whole steps run as their pages say, on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
KEYS = ["rollout.engine=embedded", "model.dtype=float32", "optim.offload=none", "model.compile=false"]
SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size": 1100,
}  # fmt: skip


def run(folder: Path, script: str, *arguments: str) -> list[dict]:
    shape = json.loads((ROOT / "benchmarks" / "qwen3_4b" / "config.json").read_text()) | SIZES
    (folder / "shape").mkdir(exist_ok=True)
    (folder / "shape" / "config.json").write_text(json.dumps(shape | {"layer_types": ["full_attention"] * 2}))
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / script),
        "--config=qwen3_4b.yaml",
        f"--shape-of={folder / 'shape'}",
    ]
    command += ["--prompts=2", "--prompt=32", "--completion=8", "--group-size=2", f"--run-dir={folder / 'run'}"]
    subprocess.run([*command, f"--json={folder / 'rows.json'}", *arguments, *KEYS], cwd=ROOT, check=True)
    return json.loads((folder / "rows.json").read_text())["rows"]


def test_a_start_is_timed_with_empty_and_with_full_caches(tmp_path):
    cold, warm = run(tmp_path, "start_time.py", f"--caches={tmp_path / 'caches'}", "--commit=abc")
    assert (cold["run"], warm["run"], cold["commit"]) == ("cold", "warm", "abc")
    for row in (cold, warm):
        assert row["start"] > row["imports"] + row["build"] - 0.1 > 1
        assert row["a later step, tokens/packed"] == 2 * (32 + 2 * 8)
        assert row["matmul_tflops"] > 0 and 0 <= row["a later step, mfu_update"] < 1
    assert warm["the proof"] < cold["the proof"] / 4  # its verdict is kept


def test_steps_of_both_ways_are_timed(tmp_path):
    rows = {row["attention"]: row for row in run(tmp_path, "full_step.py", "--steps=1")}
    assert {*rows} == {"grouped", "repeated"}
    assert rows["grouped"]["tokens/packed"] == 2 * (32 + 2 * 8)
    assert rows["repeated"]["tokens/packed"] == 2 * 2 * (32 + 8)
    for row in rows.values():
        assert row["rollout_tokens_per_s"] == pytest.approx(2 * 2 * 8 / row["time/rollout"])
