"""Configs of models that see images, for tests."""

from transformers import (
    Gemma3Config,
    Idefics3Config,
    LlavaNextConfig,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
    SmolVLMConfig,
)

MROPE = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
CONFIGS = {
    "qwen2_5_vl": Qwen2_5_VLConfig(text_config={"rope_parameters": MROPE}),
    "qwen3_vl": Qwen3VLConfig(text_config={"rope_parameters": MROPE | {"mrope_interleaved": True}}),
    "gemma3": Gemma3Config(),
    "idefics3": Idefics3Config(),
    "smolvlm": SmolVLMConfig(),
    "llava_next": LlavaNextConfig(),
}
