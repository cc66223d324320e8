"""What families of models make of an image: pixels for the tower, and tokens for the prompt.

transformers' own image processors make the pixels. Its processors of text and images need torchvision in some families, so the
tokens are made here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import AutoImageProcessor, PretrainedConfig, PreTrainedTokenizerBase

from pgrpo.config import ConfigError, ModelConfig
from pgrpo.config.task import ImageConfig
from pgrpo.types import Image
from pgrpo.vision.families import FAMILIES, image_token_id

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


@dataclass(frozen=True, slots=True)
class Expansion:
    """What stands for an image of some size in a prompt.

    Attributes:
        text: in place of the placeholder.
        counts: image tokens of each run in it.
        grid: rows and columns of its tokens, where positions need them.
    """

    text: str
    counts: tuple[int, ...]
    grid: tuple[int, int] | None = None


class Processor:
    """The images of one model.

    Args:
        model: where its files are.
        config: its config.json.
        tokenizer: of the same model.
        limits: sizes of images.

    Attributes:
        placeholder: what the chat template writes for an image. ``token``: what an expansion has for each of its rows.

    Raises:
        ConfigError: there is no image processor, or it has images of one size and a size was given.
    """

    def __init__(
        self, model: ModelConfig, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, limits: ImageConfig
    ) -> None:
        self.config, self.name, self.family = config, config.model_type, FAMILIES[config.model_type]
        self.token_id = image_token_id(config)
        self.token = self.placeholder = str(tokenizer.convert_ids_to_tokens(self.token_id))
        if self.name == "gemma3":
            ids = [config.boi_token_index, config.eoi_token_index]
            self.placeholder, self.end = map(str, tokenizer.convert_ids_to_tokens(ids))
        try:
            self.images: Any = AutoImageProcessor.from_pretrained(
                model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
            )
        except (OSError, ValueError, ImportError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"model.path={model.path}: cannot load its image processor: {reason}") from error
        self.size = self._size(limits)
        self.expansion: Callable[[tuple[int, int]], Expansion] = lru_cache(maxsize=2**16)(self._expansion)
        """Of an image of this (width, height)."""

    @property
    def settings(self) -> dict[str, Any]:
        """Two processors with equal settings make equal pixels of an image."""
        return self.images.to_dict()

    def pixels(self, image: Picture) -> dict[str, Tensor]:
        """The tower's arguments for one image.

        Raises:
            ValueError: the processor refuses the image, for its aspect ratio say.
        """
        made = self.images([image], return_tensors="pt", **self.size)
        return {name: made[name] for name in TOWER_INPUTS if name in made}

    def _size(self, limits: ImageConfig) -> dict[str, Any]:
        if limits.min_pixels is None and limits.max_pixels is None:
            return {}
        key, value = ("max_pixels", limits.max_pixels) if limits.max_pixels else ("min_pixels", limits.min_pixels)
        if not self.name.startswith("qwen"):
            raise ConfigError(
                f"data.image.{key}: {value} has no effect on a {self.name} model, whose images have one size; leave it out"
            )
        own = self.images.size
        low, high = limits.min_pixels or own["shortest_edge"], limits.max_pixels or own["longest_edge"]
        if limits.min_pixels is None:
            low = min(low, high)
        if low > high:
            raise ConfigError(f"data.image.min_pixels: {low} is more than the largest image, {high} pixels; lower it")
        return {"size": {"shortest_edge": low, "longest_edge": high}}

    def _expansion(self, size: tuple[int, int]) -> Expansion:
        """Of an image of this (width, height), by an empty one of that size."""
        from PIL import Image as pillow

        config = self.config
        if self.name == "gemma3":
            count = config.mm_tokens_per_image
            return Expansion(f"\n\n{self.placeholder}{self.token * count}{self.end}\n\n", (count,))
        if self.family.positions_3d:
            made = self.images([pillow.new("RGB", size, "gray")], return_tensors="pt", **self.size)
            _, h, w = made["image_grid_thw"][0].tolist()
            grid = h // self.images.merge_size, w // self.images.merge_size
            return Expansion(self.token * (grid[0] * grid[1]), (grid[0] * grid[1],), grid)
        if self.family.tiles_dim:
            made = self.images([[pillow.new("RGB", size, "red")]], return_row_col_info=True, return_tensors="pt")
            return self._tiled(made["rows"][0][0], made["cols"][0][0])
        made = self.images([pillow.new("RGB", size, "gray")], return_tensors="pt")
        height, width = made["image_sizes"][0].tolist()
        count = self._any_resolution(height, width, int(made["pixel_values"].shape[-1]))
        return Expansion(self.token * count, (count,))

    def _tiled(self, rows: int, columns: int) -> Expansion:
        """Idefics3 and SmolVLM: a line of text in front of every tile, and at last the whole image in small."""
        tower = self.config.vision_config
        count = (tower.image_size // tower.patch_size) ** 2 // self.config.scale_factor**2
        around, tile = "<fake_token_around_image>", self.token * count
        text = "".join(
            "".join(f"{around}<row_{r + 1}_col_{c + 1}>{tile}" for c in range(columns)) + "\n" for r in range(rows)
        )
        whole = f"{around}<global-img>{tile}{around}"
        return Expansion(f"{text}\n{whole}" if text else whole, (count,) * (rows * columns + 1))

    def _any_resolution(self, height: int, width: int, side: int) -> int:
        """LLaVA-Next: tokens of the whole image in small, and of its tiles without their padding, with one more at the end of each
        line."""
        from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

        tower = self.config.vision_config
        across = side // tower.patch_size
        rows, columns = get_anyres_image_grid_shape((height, width), self.config.image_grid_pinpoints, tower.image_size)
        high, wide = rows * across, columns * across
        if width / height > wide / high:
            high -= 2 * ((high - int(round(height * (wide / width), 7))) // 2)
        else:
            wide -= 2 * ((wide - int(round(width * (high / height), 7))) // 2)
        own_class = self.config.vision_feature_select_strategy == "full"
        return across * across + own_class + high * wide + high


TOWER_INPUTS = ("pixel_values", "image_grid_thw", "pixel_attention_mask", "image_sizes")


def positions_3d(length: int, images: Sequence[Image], grids: Sequence[tuple[int, int]]) -> list[list[int]]:
    """[3][P] positions of a Qwen-VL prompt: text counts in all three; an image stays at one in the first, and counts its rows and
    columns in the others; what follows begins behind the largest.

    Args:
        length: P tokens.
        images: of one run each.
        grids: rows and columns of the tokens of each.
    """
    positions: list[list[int]] = [[], [], []]
    at = follows = 0
    for image, (rows, columns) in zip(images, grids, strict=True):
        ((start, end),) = image.runs
        for axis in positions:
            axis += range(follows, follows + start - at)
        follows += start - at
        positions[0] += [follows] * (rows * columns)
        positions[1] += [follows + row for row in range(rows) for _ in range(columns)]
        positions[2] += [*range(follows, follows + columns)] * rows
        follows, at = follows + max(rows, columns), end
    for axis in positions:
        axis += range(follows, follows + length - at)
    return positions
