"""Configs of models that see images, and what plays episodes with images, for tests."""

import random
import runpy
import string
from pathlib import Path
from typing import Any

from PIL import Image as pillow
from playing import MAKE
from transformers import (
    Gemma3Config,
    Idefics3Config,
    LlavaNextConfig,
    Qwen2_5_VLConfig,
    Qwen3_5Config,
    Qwen3VLConfig,
    SmolVLMConfig,
)

from pgrpo.config import ModelConfig
from pgrpo.config.task import ImageConfig
from pgrpo.vision.reader import ImageReader

MROPE = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
PARTIAL = MROPE | {"mrope_section": [11, 11, 10], "mrope_interleaved": True, "partial_rotary_factor": 0.25}
CONFIGS = {
    "qwen2_5_vl": Qwen2_5_VLConfig(text_config={"rope_parameters": MROPE}),
    "qwen3_vl": Qwen3VLConfig(text_config={"rope_parameters": MROPE | {"mrope_interleaved": True}}),
    "qwen3_5": Qwen3_5Config(text_config={"rope_parameters": PARTIAL}),
    "gemma3": Gemma3Config(),
    "idefics3": Idefics3Config(),
    "smolvlm": SmolVLMConfig(),
    "llava_next": LlavaNextConfig(),
}

VISION = runpy.run_path(str(Path(__file__).resolve().parents[1] / "scripts" / "make_tiny_vision_model.py"))


def qwen3_5_config(text: dict[str, Any] | None = None, tower: dict[str, Any] | None = None) -> Any:
    """A tiny Qwen3.5 as published, with a layer of each kind, for the tokenizer and the images of the images quick start."""
    values = VISION["make_config"]().to_dict()
    own = {
        "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    }  # fmt: skip
    texts, towers = values["text_config"] | own | (text or {}), values["vision_config"] | (tower or {})
    for one in (texts, towers):
        one.pop("model_type")
    texts["rope_parameters"] |= {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]} | (text or {}).get(
        "rope_parameters", {}
    )
    towers.pop("deepstack_visual_indexes")
    ids = {name: value for name, value in values.items() if name.endswith("_token_id")}
    return Qwen3_5Config(
        text_config=texts, vision_config=towers, **ids, tie_word_embeddings=texts["tie_word_embeddings"]
    )


def seeing_tokenizer() -> Any:
    """The tokenizer of the tools quick start with tokens of images, and a template that takes texts and lists of parts."""
    tokenizer = MAKE["make_tokenizer"]()
    tokenizer.add_special_tokens({"additional_special_tokens": VISION["MARKS"]}, replace_extra_special_tokens=False)
    tokenizer.add_tokens([c for c in string.printable if c not in tokenizer.get_vocab()])
    show = (
        "{%- macro show(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
        "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
        "{% endfor %}{% endif %}{% endmacro %}"
    )
    tokenizer.chat_template = show + str(tokenizer.chat_template).replace("message.content", "show(message.content)")
    return tokenizer


def seeing_config(tokenizer: Any, text: dict[str, Any] | None = None) -> Any:
    """A tiny Qwen3-VL for this tokenizer, with the tower of the images quick start."""
    values = VISION["make_config"]().to_dict()
    for name, mark in (("image", "image_pad"), ("video", "video_pad"), ("vision_start",) * 2, ("vision_end",) * 2):
        values[f"{name}_token_id"] = tokenizer.convert_tokens_to_ids(f"<|{mark}|>")
    own = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    values["text_config"] |= own | {"max_position_embeddings": 2048} | (text or {})
    return Qwen3VLConfig(**values)


def seeing_reader(folder: Path, tokenizer: Any, config: Any, limits: ImageConfig | None = None) -> ImageReader:
    """Reads images for that model; ``folder`` gets its image processor."""
    VISION["make_processor"]().save_pretrained(folder)
    return ImageReader(ModelConfig(path=str(folder)), config, tokenizer, limits or ImageConfig())


def picture(width: int, height: int, seed: int = 0) -> Any:
    """An image of random pixels."""
    return pillow.frombytes("RGB", (width, height), random.Random(seed).randbytes(3 * width * height))
