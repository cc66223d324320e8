"""The families of vision-language models that are known: where their parts are, and what is special in them. Whether grouped
attention is exact on one is for the proof to say (``admission/proof.py``), which sees images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig


@dataclass(frozen=True, slots=True)
class Family:
    """Names are below the model's ``base_model``.

    Attributes:
        tower: the module that sees pixels.
        projector: what brings features to the language model's width; may be inside the tower.
        text: the language model.
        positions_3d: positions have three dimensions, of which images use all.
        sees_whole_images: an image's row sees the rows behind it in its image too.
        tiles_dim: pixels of several images are joined along this dimension.
        image_token: key of the config with the placeholder's id.
    """

    tower: str
    projector: tuple[str, ...]
    text: str = "language_model"
    positions_3d: bool = False
    sees_whole_images: bool = False
    tiles_dim: int = 0
    image_token: str = "image_token_id"

    def is_projector(self, name: str) -> bool | None:
        """Whether the parameter of this name below ``base_model`` is the projector's; None for one of the language model."""
        if any(name == part or name.startswith(f"{part}.") for part in self.projector):
            return True
        return False if name.startswith(f"{self.tower}.") else None


FAMILIES = {
    "qwen2_5_vl": Family("visual", ("visual.merger",), positions_3d=True),
    "qwen3_vl": Family("visual", ("visual.merger", "visual.deepstack_merger_list"), positions_3d=True),
    "qwen3_5": Family("visual", ("visual.merger",), positions_3d=True),
    "gemma3": Family("vision_tower", ("multi_modal_projector",), sees_whole_images=True),
    "idefics3": Family("vision_model", ("connector",), "text_model", tiles_dim=1),
    "smolvlm": Family("vision_model", ("connector",), "text_model", tiles_dim=1),
    "llava_next": Family("vision_tower", ("multi_modal_projector", "image_newline"), image_token="image_token_index"),
}
"""Model type -> what is known of it."""
TOWER_ON_REQUEST = ("qwen3_5",)
"""Models that are published with a tower and trained as language models, without it, unless ``model.load_vision`` asks for it."""
WITHOUT_TOWER = "language_model_only"
"""Set in the config of one of these, as it was loaded for a run without the tower. It is in no file: a language model's own config,
which is exported, is the text config inside."""


def family_of(config: PretrainedConfig) -> Family | None:
    """What is known of the model's images; None for a model without a vision tower, or of another family."""
    if getattr(config, "vision_config", None) is None or getattr(config, WITHOUT_TOWER, False):
        return None
    return FAMILIES.get(config.model_type)


def image_token_id(config: PretrainedConfig) -> int:
    """The id of the placeholder, of which an image has one a row."""
    return getattr(config, FAMILIES[config.model_type].image_token)


def never_sampled(config: PretrainedConfig) -> list[int]:
    """Ids of placeholders: neither engine samples them, as a completion has no images, and log-probs are without them."""
    if family_of(config) is None:
        return []
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    found = {value for name in names if isinstance(value := getattr(config, name, None), int)}
    return sorted(x for x in found if 0 <= x < config.get_text_config().vocab_size)


def auto_class(config: PretrainedConfig) -> Any:
    """The class that loads the model with its tower, if it has one that is known."""
    return AutoModelForCausalLM if family_of(config) is None else AutoModelForImageTextToText


def attention_names(config: PretrainedConfig, name: str) -> Any:
    """``attn_implementation`` for attention ``name`` in the language model; a tower has PyTorch's own."""
    if family_of(config) is None:
        return name
    return {"": "sdpa", "text_config": name, "vision_config": "sdpa"}
