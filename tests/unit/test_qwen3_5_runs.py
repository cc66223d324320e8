"""Runs of Qwen3.5 as it is published, with its tower where `model.load_vision` asks for it: linear layers and images together."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from seeing import VISION, qwen3_5_config
from test_vision_runs import ROOT, ROWS, check_two_ranks_train_as_one, config_of, metrics_of, weights_of
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, Qwen3_5ForConditionalGeneration

import pgrpo
from pgrpo.commands.check import check
from pgrpo.commands.export import export
from pgrpo.commands.plan import plan_text
from pgrpo.config import ConfigError, ModelConfig
from pgrpo.distributed.world import World
from pgrpo.model.policy import load_model
from pgrpo.model.weights import full_weights, weight_names
from pgrpo.training import vision

SEES = "model.load_vision=true"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    tmp = tmp_path_factory.mktemp("qwen3_5")
    torch.manual_seed(0)
    model = Qwen3_5ForConditionalGeneration(qwen3_5_config())
    for part in (model, VISION["make_tokenizer"](), VISION["make_processor"]()):
        part.save_pretrained(tmp / "model")
    (tmp / "own.py").write_text(ROWS.format(recipe=str(ROOT / "recipes" / "shapes.py")))
    return tmp


@pytest.fixture(scope="module")
def published(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("key", ["", "model.lora_rank=2", "model.train_vision=true", "model.train_projector=true"])
def test_a_run_with_images_samples_what_it_scores_and_exports_what_it_trained(folder, published, tmp_path, key):
    """In groups of which prompts and images are computed once. The export is as the published folder, and loads alike."""
    run = pgrpo.train(config_of(folder, tmp_path / "run", SEES, "optim.lr=1e-3", *filter(None, [key])))
    rows = metrics_of(run)
    assert len(rows) == 2 and all(row["grad_norm"] > 0 and row["tokens/rho"] > 2 for row in rows)
    assert max(row["sampling/sampling_logp_difference/max"] for row in rows) < 1e-4
    out = export(run, tmp_path / "out")
    exported = load_file(out / "model.safetensors")
    assert exported.keys() == published.keys()
    changed = {name for name, tensor in exported.items() if not torch.equal(tensor, published[name])}
    tower = {n for n in published if "visual" in n and "merger" not in n}
    projector = {n for n in published if "merger" in n}
    assert "model.language_model.layers.0.linear_attn.in_proj_qkv.weight" in changed
    assert bool(changed & tower) == ("train_vision" in key)
    assert bool(changed & projector) == ("train_projector" in key)
    loaded: Any = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    model, info = loaded
    assert type(model) is Qwen3_5ForConditionalGeneration and not any(info.values())
    assert all(torch.equal(tensor, exported[name]) for name, tensor in model.state_dict().items() if name in exported)
    assert AutoImageProcessor.from_pretrained(out).size == VISION["make_processor"]().size
    assert (out / "config.json").read_text().count("language_model_only") == 0


def test_a_run_with_images_resumes_to_the_bit(folder, tmp_path):
    keys = (SEES, "checkpoint.every=1", "model.train_vision=true", "optim.lr=1e-3")
    whole = pgrpo.train(config_of(folder, tmp_path / "whole", *keys))
    part = pgrpo.train(config_of(folder, tmp_path / "part", *keys, "train.steps=1"))
    pgrpo.train(config_of(folder, part, *keys), resume="auto")
    a, b = weights_of(whole), weights_of(part)
    assert a.keys() == b.keys() and any("visual" in name for name in a)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_two_ranks_train_as_one(folder, published, tmp_path, warm):
    """Of which one has prompts of text only."""
    keys = (
        SEES, f"data.path={folder / 'own.py'}:mixed", "data.shuffle=false", "rollout.prompts_per_step=2", "optim.lr=1e-3",
        "model.train_vision=true", "loss.scale_advantages=none", "optim.eps=1e-3",
    )  # fmt: skip
    one, two = (config_of(folder, tmp_path / name, *keys) for name in ("alone", "two"))
    wanted = check_two_ranks_train_as_one(one, two, warm)
    assert any("visual" in name for name in wanted if not torch.equal(wanted[name], published[name]))


def test_its_weights_are_pushed_under_the_published_names(folder, published):
    model = load_model(ModelConfig(path=str(folder / "model"), load_vision=True))
    pushed = dict(full_weights(model, torch.float32))
    assert pushed.keys() == weight_names(model) == published.keys()
    assert all(torch.equal(tensor, published[name]) for name, tensor in pushed.items())


def test_on_text_it_is_the_language_model_of_the_published_names(folder, published, tmp_path):
    """The same folder, whose class, parameters and export are those of a language model."""
    keys = ("prompt.images_column=null", "prompt.messages=[{role: user, content: '{question}'}]")
    of_text = {name for name in published if "visual" not in name}
    model = load_model(ModelConfig(path=str(folder / "model")))
    assert type(model).__name__ == "Qwen3_5ForCausalLM"
    assert weight_names(model) == of_text
    run = pgrpo.train(config_of(folder, tmp_path / "run", *keys, "train.steps=1"))
    assert weights_of(run).keys() == dict(model.named_parameters()).keys()
    out = export(run, tmp_path / "out")
    assert load_file(out / "model.safetensors").keys() == {n.replace("language_model.", "") for n in of_text}
    saved = json.loads((out / "config.json").read_text())
    assert saved["architectures"] == ["Qwen3_5ForCausalLM"] and not saved.keys() & {
        "language_model_only",
        "vision_config",
    }


def test_check_and_dry_run_count_its_images(folder, tmp_path, capsys):
    check(config_of(folder, tmp_path / "run", SEES, "data.shuffle=false"))
    shown = capsys.readouterr().out
    assert "tokens, images of 16 (64 x 64))" in shown and "seeded bug, an image of the neighbour: " in shown
    assert "all checks passed" in shown
    assert "more for images" in plan_text(config_of(folder, tmp_path, SEES))


@pytest.mark.parametrize(
    ("kind", "keys", "said"),
    [
        ("qwen3_5", (), "prompt.images_column: images: a qwen3_5 model is trained as a language model, without its vision tower"),
        ("qwen3_5", (SEES, "prompt.images_column=null"), "model.load_vision: true has no effect on prompts without images"),
        ("qwen3_vl", (SEES,), "model.load_vision: true has no effect on a qwen3_vl model: it is for qwen3_5; leave it out"),
        ("qwen3", (SEES,), "model.load_vision: true has no effect on a qwen3 model"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_its_tower_is_refused(folder, tmp_path, kind, keys, said):
    config, world = config_of(folder, tmp_path / "run", *keys), World(0, 1, torch.device("cpu"))
    hf_config = AutoConfig.for_model(kind)
    if kind == "qwen3_5":
        hf_config = vision.load_hf_config(config.model)
    with pytest.raises(ConfigError, match=re.escape(said)):
        vision.image_reader(config, hf_config, VISION["make_tokenizer"](), world)
