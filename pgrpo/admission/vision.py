"""The proof's images: a small tower, random pixels, prompts with images, and bugs of images that the comparison must see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from pgrpo.admission.compare import tokens_as_groups
from pgrpo.model.families.vision import Vision
from pgrpo.packing.batch import GroupedBatch
from pgrpo.types import Image, PromptImages, Sample
from pgrpo.vision.families import FAMILIES, image_token_id
from pgrpo.vision.pixels import Pixels
from pgrpo.vision.processors import positions_3d
from pgrpo.vision.rows import placeholder_runs

SIDE, PATCH = 32, 8


def shrink_tower(values: dict[str, Any], hidden: int, vocab: int) -> None:
    """Replace the sizes of a config's tower, in place. Placeholders get ids that no sample of the proof has.

    Args:
        values: of a small config, as ``shrink`` makes it.
        hidden, vocab: of its language model.
    """
    values["vision_config"] = tower = dict(values["vision_config"])
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    values |= {name: vocab - 1 - ("video" in name) for name in names if name in values}
    values |= {name: vocab - 3 for name in ("vision_start_token_id", "boi_token_index") if name in values}
    values |= {name: vocab - 4 for name in ("vision_end_token_id", "eoi_token_index") if name in values}
    tower |= {"hidden_size": 32, "intermediate_size": 64}
    if "depth" in tower:  # Qwen
        tower |= {"depth": 3, "num_heads": 2, "out_hidden_size": hidden, "patch_size": 4, "spatial_merge_size": 2}
        small = {
            "temporal_patch_size": 2,
            "window_size": 16,
            "num_position_embeddings": 64,
            "fullatt_block_indexes": [1],
        }
        tower |= {name: value for name, value in small.items() if name in tower}
        if tower.get("deepstack_visual_indexes"):
            tower["deepstack_visual_indexes"] = [0, 1]
        return
    tower |= {"num_hidden_layers": 3, "num_attention_heads": 2, "image_size": SIDE, "patch_size": PATCH}
    tower |= {"projection_dim": 32} if "projection_dim" in tower else {}
    small = {"mm_tokens_per_image": 4, "scale_factor": 2, "image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]}
    values |= {name: value for name, value in small.items() if name in values}


class RandomImages:
    """Pixels by key, and prompts that have them."""

    def __init__(self, config: PretrainedConfig, model: PreTrainedModel, seed: int) -> None:
        self.config, self.model = config, model
        self.generator = torch.Generator().manual_seed(seed)
        self._made: dict[str, tuple[Pixels, list[int], tuple[int, int] | None]] = {}

    def pixels(self, key: str) -> Pixels:
        return self._made[key][0]

    def add(self, key: str, shape: int) -> None:
        """A random image. ``shape``: 0 or 1; equal shapes have equal numbers of tokens."""
        name = self.config.model_type
        if name.startswith("qwen"):
            h, w = ((4, 6), (8, 4))[shape]
            pixels = {"pixel_values": self._random(h * w, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, h, w]])}
            self._made[key] = pixels, [h * w // 4], (h // 2, w // 2)
        elif name == "llava_next":
            pixels = {"pixel_values": self._random(1, 3, 3, SIDE, SIDE)}
            pixels["image_sizes"] = torch.tensor([[64, 30]] if shape else [[30, 64]])
            with torch.no_grad():
                found: Any = self.model.base_model
                rows = found.get_image_features(**pixels, return_dict=True).pooler_output[0]
            self._made[key] = pixels, [len(rows)], None
        elif FAMILIES[name].tiles_dim:
            tiles = 1 + shape
            self._made[key] = {"pixel_values": self._random(1, tiles, 3, SIDE, SIDE)}, [4] * tiles, None
        else:
            self._made[key] = {"pixel_values": self._random(1, 3, SIDE, SIDE)}, [4], None

    def prompt(self, parts: Sequence[list[int] | str]) -> tuple[list[int], PromptImages | None]:
        """Token ids of texts (ids) and images (keys); text stands between the tiles of an image."""
        placeholder, ids = image_token_id(self.config), []
        keys = [part for part in parts if isinstance(part, str)]
        for part in parts:
            if isinstance(part, str):
                for count in self._made[part][1]:
                    ids += [placeholder - 2, *[placeholder] * count]
                ids.append(placeholder - 3)
            else:
                ids += part
        if not keys:
            return ids, None
        runs = placeholder_runs(ids, placeholder, [self._made[key][1] for key in keys])
        images = tuple(Image(key, own) for key, own in zip(keys, runs, strict=True))
        grids = [grid for key in keys if (grid := self._made[key][2])]
        return ids, PromptImages(images, [], positions_3d(len(ids), images, grids) if grids else None)

    def samples(self, vocab: int, stretch: int = 1) -> list[Sample]:
        """Prompts of one and of two images, of which some begin alike, one with an image of the same size as its neighbour's, and
        one without; ragged completions, three for each of the first."""
        for key, shape in (("a", 0), ("b", 0), ("c", 1)):
            self.add(key, shape)

        def text(n: int) -> list[int]:
            return torch.randint(3, vocab - 4, (n * stretch,), generator=self.generator).tolist()

        system, end = text(3), text(2)
        prompts = [[system, "a", end], [system, "b", end], [system, "a", text(2), "c", text(3)], [system, text(3)]]
        begin = text(2)
        completions = [
            [begin + text(5), begin + text(2), text(1)], [begin + text(3), text(4), []], [text(6), text(2), text(4)], [text(3)]
        ]  # fmt: skip
        made = [self.prompt(parts) for parts in prompts]
        samples = []
        for group, (_, images) in zip(tokens_as_groups([ids for ids, _ in made], completions), made, strict=True):
            samples += [replace(sample, images=images) for sample in group.samples]
        return samples

    def long_samples(self, texts: Sequence[list[int]]) -> list[Sample]:
        """``texts`` of a prompt with an image between its halves and of its two completions, and of a prompt with a completion."""
        self.add("a", 0)
        prompt, first, second, short, third = texts
        half = len(prompt) // 2
        ids, images = self.prompt([prompt[:half], "a", prompt[half:]])
        long, other = tokens_as_groups([ids, short], [[first, second], [third]])
        return [replace(sample, images=images) for sample in long.samples] + other.samples

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)


def reference_inputs(untouched: PreTrainedModel, images: RandomImages | None) -> Callable[[Sample], dict[str, Any]]:
    """What the untouched model is given beside a sample's token ids."""
    vision = Vision.of(untouched)
    if vision is None or images is None:
        return lambda _: {}
    vision.pixels = images.pixels
    return vision.reference_inputs


def neighbours_image(batch: GroupedBatch) -> GroupedBatch | None:
    """Seeded bug: two images are exchanged."""
    if (images := batch.images) is None or len(images.keys) < 2:
        return None
    keys = [images.keys[1], images.keys[0], *images.keys[2:]]
    return replace(batch, images=replace(images, keys=keys))


def rows_in_another_order(batch: GroupedBatch) -> GroupedBatch | None:
    """Seeded bug: an image's rows of features in the opposite order."""
    if (images := batch.images) is None:
        return None
    features = images.features.clone()
    features[: images.counts[0]] = features[: images.counts[0]].flip(0)
    return replace(batch, images=replace(images, features=features))


def positions_of_text(batch: GroupedBatch) -> GroupedBatch | None:
    """Seeded bug: images have positions as text has."""
    if batch.images is None or batch.images.position_ids is None:
        return None
    nodes = batch.layout.nodes
    positions = torch.cat([torch.arange(node.offset, node.offset + node.length) for node in nodes])
    return replace(batch, inputs=batch.inputs | {"position_ids": positions.to(batch.logit_index.device)})


def images_are_causal(batch: GroupedBatch) -> GroupedBatch | None:
    """Seeded bug: an image's rows do not see those behind them."""
    return None if batch.images is None else replace(batch, images=replace(batch.images, blocks=[]))


def image_bugs(config: PretrainedConfig) -> dict[str, Callable[[GroupedBatch], GroupedBatch | None]]:
    """Those that a model of this config must notice."""
    family = FAMILIES[config.model_type]
    bugs = {"an image of the neighbour": neighbours_image, "rows of an image in another order": rows_in_another_order}
    if family.positions_3d:
        bugs["an image with positions of text"] = positions_of_text
    if family.sees_whole_images:
        bugs["an image whose rows are causal"] = images_are_causal
    return bugs
