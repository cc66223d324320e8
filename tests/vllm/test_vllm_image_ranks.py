"""Whole runs with images and vLLM: ranks that share an engine, of which each gives it the images of its own prompts."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from test_vllm_images import make_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
if torch.cuda.is_available():
    pytestmark += [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")]
DTYPE, TOLERANCE = ("bfloat16", 0.1) if torch.cuda.is_available() else ("float32", 1e-3)
ROOT = Path(__file__).resolve().parents[2]
RUNS = runpy.run_path(str(ROOT / "tests" / "unit" / "test_vision_runs.py"))


@pytest.mark.parametrize("together", [1, 2], ids=["tensor parallel", "sequence parallel too"])
def test_ranks_that_share_an_engine_sample_prompts_with_images(launch, tmp_path, monkeypatch, together):
    """A trained tower: its weights arrive in every step."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    make_model("qwen3_vl", tmp_path / "model", vocabulary=128)  # which ranks can divide
    (tmp_path / "own.py").write_text(RUNS["ROWS"].format(recipe=str(ROOT / "recipes" / "shapes.py")))
    keys = [
        f"model.path={tmp_path / 'model'}", f"model.dtype={DTYPE}", f"run_dir={tmp_path / 'run'}",
        f"data.path={tmp_path / 'own.py'}:mixed", "data.max_prompt_tokens=60", "data.image.max_pixels=2304",
        f"rewards.functions=[{{function: '{tmp_path / 'own.py'}:likes_red'}}]", "rollout.prompts_per_step=4",
        "rollout.group_size=4", "train.steps=2", "eval.every=0", "track.console=false", "optim.lr=1e-3",
        "rollout.engine=vllm", "rollout.enforce_eager=true", "rollout.canary_every=1", "model.compile=false",
        f"rollout.tensor_parallel_size={2 // together}", f"model.sequence_parallel_size={together}",
    ]  # fmt: skip
    done = launch(["-m", "pgrpo", "train", "--config", "vision_quickstart", *keys], 2)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert row["grad_norm"] > 0
        assert row["sampling/sampling_logp_difference/max"] < TOLERANCE
    assert rows[1]["canary/logp_difference"] < TOLERANCE
