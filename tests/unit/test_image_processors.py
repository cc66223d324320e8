"""The tokens that stand for an image are those of transformers' own processors, and as many as the tower makes rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Idefics3Config,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)

from pgrpo.config import ConfigError, ModelConfig
from pgrpo.config.task import ImageConfig
from pgrpo.model.families.vision import Vision
from pgrpo.vision.processors import Processor
from pgrpo.vision.rows import placeholder_runs

SIDE = 32
TEXT = {
    "vocab_size": 200, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip
TOWER = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": SIDE,
    "patch_size": 8,
}  # fmt: skip
MARKS = [
    "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<start_of_image>", "<end_of_image>",
    "<image_soft_token>", *(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)),
]  # fmt: skip


def tokenizer_of(image: str = "<image_soft_token>") -> Any:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<unk>", *MARKS, "a", "b", "\n", "\n\n", " "])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n\n|."), "isolated")
    extra = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": image}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", additional_special_tokens=MARKS,
        extra_special_tokens=extra,
    )  # fmt: skip


def family(name: str, tokenizer: Any) -> SimpleNamespace:
    """Its config, image processor, and transformers' processor."""
    ids = tokenizer.convert_tokens_to_ids
    if name == "gemma3":
        config = Gemma3Config(
            text_config=TEXT, vision_config=TOWER, mm_tokens_per_image=4, image_token_id=ids("<image_soft_token>"),  # pyright: ignore[reportCallIssue]
            boi_token_index=ids("<start_of_image>"), eoi_token_index=ids("<end_of_image>"),
        )  # fmt: skip
        images = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_pan_and_scan=False)
        return SimpleNamespace(
            config=config, images=images, theirs=Gemma3Processor(images, tokenizer, image_seq_length=4)
        )
    if name == "idefics3":
        config = Idefics3Config(
            text_config=TEXT | {"model_type": "llama"}, vision_config=TOWER, scale_factor=2, image_token_id=ids("<image>")
        )  # fmt: skip
        images = Idefics3ImageProcessorPil(
            size={"longest_edge": 4 * SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=True
        )  # fmt: skip
        return SimpleNamespace(
            config=config, images=images, theirs=Idefics3Processor(images, tokenizer, image_seq_len=4)
        )
    pins = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    config = LlavaNextConfig(
        text_config=TEXT | {"model_type": "qwen2"}, vision_config=TOWER | {"model_type": "clip_vision_model", "projection_dim": 32},
        image_token_index=ids("<image>"), image_grid_pinpoints=pins, vision_feature_layer=-2,
    )  # fmt: skip
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=pins
    )  # fmt: skip
    theirs = LlavaNextProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )  # fmt: skip
    return SimpleNamespace(config=config, images=images, theirs=theirs)


@pytest.mark.parametrize("name", ["gemma3", "idefics3", "llava_next"])
@pytest.mark.parametrize("size", [(64, 30), (30, 64), (50, 50)])
def test_tokens_are_those_of_transformers_and_rows_those_of_the_tower(name, size, tmp_path):
    tokenizer = tokenizer_of("<image_soft_token>" if name == "gemma3" else "<image>")
    parts = family(name, tokenizer)
    parts.images.save_pretrained(tmp_path)
    ours = Processor(ModelConfig(path=str(tmp_path)), parts.config, tokenizer, ImageConfig())
    image = Image.effect_noise(size, 50).convert("RGB")
    expansion = ours.expansion(size)
    wanted = parts.theirs(text=[f"a{ours.placeholder}b"], images=[[image]], add_special_tokens=False)["input_ids"][0]
    ids = tokenizer(f"a{expansion.text}b", add_special_tokens=False)["input_ids"]
    assert ids == list(wanted)
    assert placeholder_runs(ids, ours.token_id, [expansion.counts])
    with torch.random.fork_rng():
        model = AutoModelForImageTextToText.from_config(parts.config, attn_implementation="sdpa")
    vision = Vision.of(model)
    assert vision is not None
    with torch.no_grad():
        found = vision._run([ours.pixels(image), ours.pixels(image)])
    assert len(found.rows) == 2 * sum(expansion.counts)
    torch.testing.assert_close(found.rows[: len(found.rows) // 2], found.rows[len(found.rows) // 2 :])


def test_sizes_are_refused_for_a_model_whose_images_have_one(tmp_path):
    tokenizer = tokenizer_of()
    parts = family("gemma3", tokenizer)
    parts.images.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"data.image.max_pixels: 100 has no effect on a gemma3 model"):
        Processor(ModelConfig(path=str(tmp_path)), parts.config, tokenizer, ImageConfig(max_pixels=100))


def test_a_model_without_an_image_processor_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot load its image processor"):
        Processor(
            ModelConfig(path=str(tmp_path)), family("gemma3", tokenizer_of()).config, tokenizer_of(), ImageConfig()
        )
