"""A teacher that sees the policy's images: the update against the same done with two untouched models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import making
import pytest
import torch
from test_vision_runs import config_of, folder  # noqa: F401
from transformers import AutoImageProcessor, AutoModelForImageTextToText, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from pgrpo.config import ConfigError
from pgrpo.distributed.world import World
from pgrpo.grpo import backward, update_policy
from pgrpo.model.policy import Policy
from pgrpo.training.build import build
from pgrpo.training.progress import Progress
from pgrpo.training.update import count, micro_batches

WORLD = World(0, 1, torch.device("cpu"))
COMPLETIONS = [[[9, 10, 2], [11, 2]], [[12, 13, 14, 2], [2]], [[8, 9], [10, 12, 2]]]
REWARDS = [[1.0, 0.0], [0.5, -0.5], [0.0, 1.0]]


@pytest.fixture(scope="module")
def teacher(folder: Path, tmp_path_factory) -> Path:  # noqa: F811
    """Deeper than the policy, with a wider tower, whose pixels are brighter."""
    out = tmp_path_factory.mktemp("teacher") / "model"
    shutil.copytree(folder / "model", out)
    config: Any = Qwen3VLConfig.from_pretrained(out)
    config.text_config.num_hidden_layers, config.vision_config.hidden_size = 3, 64
    config.text_config.layer_types = ["full_attention"] * 3
    torch.manual_seed(3)
    Qwen3VLForConditionalGeneration(config).save_pretrained(out)
    file = out / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}))
    return out


def keys_of(teacher: Path, *more: str) -> list[str]:
    keys = ["rewards.functions=[]", "loss.entropy_coef=0", "data.shuffle=false", "train.token_budget=70"]
    return [f"loss.teacher={teacher}", *keys, *more]


def logprobs_of(model, processor, prompt, ids) -> torch.Tensor:
    """[R, V] of one sample of an untouched model, without placeholders, for which there is a zero."""
    tokens = torch.tensor([prompt.token_ids + ids])
    made = processor(prompt.columns["images"], return_tensors="pt")
    kinds = (tokens == model.config.image_token_id).int()
    logits = model(input_ids=tokens, mm_token_type_ids=kinds, **made).logits[0, len(prompt.token_ids) - 1 : -1]
    kept = sorted({*range(logits.shape[-1])} - {model.config.image_token_id, model.config.video_token_id})
    logprobs = logits[:, kept].log_softmax(-1)
    return logprobs.new_zeros(logits.shape).index_copy(1, torch.tensor(kept), logprobs)


@pytest.mark.parametrize("form", ["sampled", "full"])
def test_a_teacher_sees_the_same_images(folder, teacher, tmp_path, form):  # noqa: F811
    config = config_of(folder, tmp_path, *keys_of(teacher, f"loss.teacher_kl={form}", "loss.teacher_coef=0.6"))
    with build(config, WORLD) as parts:
        taken = parts.stream.take(13)
        prompts = [taken[i] for i in (0, 1, 12)]  # the last has two images
        groups = [
            making.group(prompt, *(making.episode(ids, a, advantage=a) for ids, a in zip(own, given, strict=True)))
            for prompt, own, given in zip(prompts, COMPLETIONS, REWARDS, strict=True)
        ]
        for group in groups:
            for sample in group.samples:
                sample.images = group.prompt.images
        paths = folder / "model", teacher
        student, model = (AutoModelForImageTextToText.from_pretrained(p, attn_implementation="sdpa") for p in paths)
        processors = [AutoImageProcessor.from_pretrained(path) for path in paths]
        student.model.visual.requires_grad_(False)
        loss, distance, tokens = torch.zeros(()), 0.0, sum(len(ids) for own in COMPLETIONS for ids in own)
        for prompt, own, given in zip(prompts, COMPLETIONS, REWARDS, strict=True):
            for ids, advantage in zip(own, given, strict=True):
                logp = logprobs_of(student, processors[0], prompt, ids)
                with torch.no_grad():
                    logq = logprobs_of(model, processors[1], prompt, ids)
                for t, token in enumerate(ids):
                    ratio, gap = (logp[t, token] - logp[t, token].detach()).exp(), (logp - logq)[t, token].item()
                    kl = (logp[t].exp() * (logp[t] - logq[t])).sum()
                    if form == "sampled":
                        loss, distance = loss - ratio * (advantage - 0.6 * gap) / tokens, distance + gap / tokens
                    else:
                        loss, distance = loss - (ratio * advantage - 0.6 * kl) / tokens, distance + kl.item() / tokens
        loss.backward()
        wanted = {n: p.grad for n, p in Policy(student).named_parameters() if p.grad is not None}
        for batch in micro_batches(parts.learner, groups):
            backward(parts.learner, batch, count(groups))
        got = {n: p.grad.clone() for n, p in parts.policy.named_parameters() if p.grad is not None}
        parts.learner.optimizer.zero_grad()
        metrics = update_policy(parts.learner, Progress(), groups)
        assert metrics["teacher/kl"] == pytest.approx(distance, abs=1e-5)
        assert abs(distance) > 0.05
        assert got.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=2e-6, msg=name)


def test_a_teacher_that_reads_images_otherwise_is_refused(folder, teacher, tmp_path, tiny_model):  # noqa: F811
    def message(path: Path) -> str:
        with pytest.raises(ConfigError) as error, build(config_of(folder, tmp_path, *keys_of(path)), WORLD):
            pass
        return str(error.value)

    text = f"loss.teacher={tiny_model}: a qwen3 model does not read prompts with images as the qwen3_vl model in model.path does"
    assert message(tiny_model).startswith(text)
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    file = other / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"size": {"shortest_edge": 1024, "longest_edge": 2048}}))
    assert message(other).startswith(
        "row 0, column `images`, a RGB image: loss.teacher makes 4 tokens of an image of 64 x 64 pixels, the policy 16: name a"
    )
    file.unlink()
    assert message(other).startswith(f"loss.teacher={other}: cannot load its image processor: ")
