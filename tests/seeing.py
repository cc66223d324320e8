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
    Qwen3VLConfig,
    SmolVLMConfig,
)

from pgrpo.config import ModelConfig
from pgrpo.config.task import ImageConfig
from pgrpo.vision.reader import ImageReader

MROPE = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
CONFIGS = {
    "qwen2_5_vl": Qwen2_5_VLConfig(text_config={"rope_parameters": MROPE}),
    "qwen3_vl": Qwen3VLConfig(text_config={"rope_parameters": MROPE | {"mrope_interleaved": True}}),
    "gemma3": Gemma3Config(),
    "idefics3": Idefics3Config(),
    "smolvlm": SmolVLMConfig(),
    "llava_next": LlavaNextConfig(),
}

VISION = runpy.run_path(str(Path(__file__).resolve().parents[1] / "scripts" / "make_tiny_vision_model.py"))


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
