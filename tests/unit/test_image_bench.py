"""benchmarks/images.py on the tiny vision model: which rows, images and FLOPs it counts."""

import json
import runpy
from pathlib import Path

import images as script
import pytest

from pgrpo.commands import bench as bench_module

ROOT = Path(__file__).resolve().parents[2]
TINY = runpy.run_path(str(ROOT / "scripts" / "make_tiny_vision_model.py"))
PATCHES, ROWS, WIDTH = 64, 16, 48
# The patches' embedding; two layers; what brings features to the language model, at the end and behind the first layer.
EMBEDDING = 2 * PATCHES * (3 * 2 * 8 * 8) * WIDTH
LAYER = 2 * PATCHES * (4 * WIDTH * WIDTH + 2 * WIDTH * 96) + 4 * PATCHES**2 * WIDTH
MERGER = 2 * ROWS * (192 * 192 + 192 * 64)
IMAGE = EMBEDDING + 2 * LAYER + 2 * MERGER


@pytest.mark.parametrize("is_trained", [False, True])
def test_an_update_with_images_counts_the_tower(tmp_path, monkeypatch, is_trained):
    monkeypatch.setitem(bench_module.MATMUL_SIZE, "cpu", 64)
    TINY["make_config"]().save_pretrained(tmp_path)
    file = tmp_path / "rows.json"
    arguments = [
        f"--shape-of={tmp_path}", "--images", "2", "--image-tokens=16", "--text=20", "--completion=5", "--group-size=3",
        "--prompts=2", "--token-budget=140", "--repeats=1", f"--json={file}",
    ]  # fmt: skip
    trained = ["train_vision", "train_projector"] if is_trained else []
    (row,) = script.main([*arguments, *(f"model.{key}=true" for key in trained)])
    assert json.loads(file.read_text())["rows"] == [json.loads(json.dumps(row))]
    assert row["trained"] == trained and row["tower_flops_an_image"] == IMAGE
    grouped, repeated = row["grouped"], row["repeated"]
    assert (grouped["rows"], repeated["rows"]) == (2 * (52 + 15), 2 * 3 * 57)
    assert (grouped["micro_batches"], repeated["micro_batches"]) == (1, 3)
    # A trained tower runs once an image and micro-batch; a frozen one once an image.
    assert grouped["images_in_the_tower"] == 4
    assert repeated["images_in_the_tower"] == 4 if not is_trained else repeated["images_in_the_tower"] >= 6
    for way in (grouped, repeated):
        assert way["tower_flops"] == way["images_in_the_tower"] * IMAGE * (3 if is_trained else 1)
        assert way["mfu"] == pytest.approx(way["flops"] / way["seconds"] / row["matmul_tflops"] / 1e12)
    assert row["flop_ratio"] == repeated["flops"] / grouped["flops"]


def test_images_that_are_not_square_are_refused(capsys):
    with pytest.raises(SystemExit):
        script.main(["--image-tokens", "1000"])
    assert "1000 is no square number" in capsys.readouterr().err
