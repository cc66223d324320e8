"""Sizes of a vision tower, counted from its modules as those of the decoder are (``dims.py``); FLOPs and bytes of images.

An image becomes patches, in some models those of several tiles. They are the rows of the tower's layers, in which all rows of a
tile see each other, or those of a window. The projector makes a row of the language model of several patches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from pgrpo.vision.families import Family

FORWARDS = 3
"""A forward and its backward, which has two products for each of the forward, in forwards."""


class TowerWork(NamedTuple):
    """What images cost: patches, rows of the tower's layers (a tile may have one more than patches), pairs of a row and one that it
    sees in layers without and with windows, and rows of the projector."""

    patches: int = 0
    rows: int = 0
    pairs: int = 0
    window_pairs: int = 0
    projected: int = 0

    @staticmethod
    def sum(parts: Iterable[TowerWork]) -> TowerWork:
        return TowerWork(*map(sum, zip(TowerWork(), *parts, strict=True)))


@dataclass(frozen=True, slots=True)
class TowerDims:
    """Sizes of a vision tower with its projector.

    Attributes:
        layers, hidden: of the tower. ``is_rms``: its norms are RMS norms.
        kept: elements a row that attention and MLP of a layer keep for their backward.
        parameters, projector_parameters: of the tower without the projector, and of the projector.
        matrices: elements of all matrices of the layers; ``patch`` of what makes a patch a row, ``projector`` of the projector.
        patch_side: pixels along a side of a patch. ``merged``: patches along a side of what becomes a row of the language model.
        side: patches along a side of a tile; 0 where images have sizes of their own.
        window: patches along a side of a window; 0 without windows. ``whole``: number of layers without them.
        has_class: a tile has a row beside its patches. ``projects_class``: the projector sees it.
        deep: number of features beside the first that a row of the language model has (deepstack).
    """

    layers: int
    hidden: int
    is_rms: bool
    kept: int
    parameters: int
    projector_parameters: int
    matrices: int
    patch: int
    projector: int
    patch_side: int
    merged: int
    side: int
    window: int
    whole: int
    has_class: bool
    projects_class: bool
    deep: int

    @staticmethod
    def of(model: PreTrainedModel, family: Family) -> TowerDims:
        """Of a model, which may be on PyTorch's meta device."""
        config: Any = model.config
        tower, layers = config.vision_config, tower_layers(model, family)
        parts = {False: 0, True: 0}
        projector, has_class = 0, False
        for name, parameter in model.base_model.named_parameters():
            if (is_projector := family.is_projector(name)) is not None:
                parts[is_projector] += parameter.numel()
                projector += parameter.numel() if is_projector and parameter.ndim > 1 else 0
                has_class |= name.endswith(("class_embedding", "cls_token"))
        makes_patches: Any = next(
            m for m in model.base_model.get_submodule(family.tower).modules() if isinstance(m, nn.Conv2d | nn.Conv3d)
        )
        patch_side = makes_patches.kernel_size[-1]
        window = (getattr(tower, "window_size", None) or 0) // patch_side
        return TowerDims(
            layers=len(layers),
            hidden=tower.hidden_size,
            is_rms=any("RMS" in type(m).__name__ for m in layers[0].modules()),
            kept=_kept(tower, layers[0]),
            parameters=parts[False],
            projector_parameters=parts[True],
            matrices=sum(p.numel() for layer in layers for p in layer.parameters() if p.ndim > 1),
            patch=makes_patches.weight.numel(),
            projector=projector,
            patch_side=patch_side,
            merged=_merged(config),
            side=(getattr(tower, "image_size", None) or 0) // patch_side,
            window=window,
            whole=len(tower.fullatt_block_indexes) if window else len(layers),
            has_class=has_class,
            projects_class=has_class and getattr(config, "vision_feature_select_strategy", "") == "full",
            deep=len(getattr(tower, "deepstack_visual_indexes", None) or ()),
        )

    @property
    def rows_a_token(self) -> int:
        """Rows of the tower for a row of the language model, about: tiles of any resolution have up to twice as many where their
        padding is cut off."""
        return max(2, self.merged**2)

    def work(self, pixels: Mapping[str, Tensor]) -> TowerWork:
        """Of one image, by what the image processor made of it."""
        if "image_grid_thw" in pixels:
            tiles = [(h, w) for t, h, w in pixels["image_grid_thw"].tolist() for _ in range(t)]
        else:
            *tiles_of, _, high, wide = pixels["pixel_values"].shape
            tiles = [(high // self.patch_side, wide // self.patch_side)] * math.prod(tiles_of)
        return self._work(tiles)

    def work_of_tokens(self, tokens: int) -> TowerWork:
        """Of so many rows of the language model: of one square image, or of as many tiles as have them."""
        patches = tokens * self.merged**2
        side = self.side or math.isqrt(patches)
        return self._work([(side, side)] * -(-patches // side**2)) if side else TowerWork()

    def _work(self, tiles: Iterable[tuple[int, int]]) -> TowerWork:
        """``tiles``: patches of each, down and across."""
        parts = []
        for high, wide in tiles:
            rows = high * wide + self.has_class
            squares = (
                [sum(n * n for n in _parts(side, self.window)) for side in (high, wide)] if self.window else [0, 0]
            )
            projected = high * wide // self.merged**2 + self.projects_class
            parts.append(TowerWork(high * wide, rows, rows * rows, squares[0] * squares[1], projected))
        return TowerWork.sum(parts)

    def flops(self, work: TowerWork, *, tower: bool = False, projector: bool = False) -> int:
        """FLOPs of a forward, and of the backward of what is trained: ``tower`` (with the projector, whose inputs have gradients
        then) or ``projector``."""
        pairs = self.whole * work.pairs + (self.layers - self.whole) * work.window_pairs
        layers = 2 * self.patch * work.patches + 2 * self.matrices * work.rows + 4 * self.hidden * pairs
        projected = 2 * self.projector * work.projected
        return layers * (FORWARDS if tower else 1) + projected * (FORWARDS if tower or projector else 1)

    def layer_activations(self, dtype_bytes: int) -> int:
        """Bytes a row that one layer keeps for its backward: attention and MLP, and inputs and outputs of two norms."""
        norm = (4 + 2 * dtype_bytes) if self.is_rms else 2 * dtype_bytes
        return 2 * self.hidden * norm + self.kept * dtype_bytes


def tower_layers(model: PreTrainedModel, family: Family) -> list[nn.Module]:
    """The tower's layers, in order."""
    tower: Any = model.config
    count = getattr(tower.vision_config, "depth", None) or tower.vision_config.num_hidden_layers
    for part in model.base_model.get_submodule(family.tower).modules():
        if isinstance(part, nn.ModuleList) and len(part) == count:
            return list(part)
    raise ValueError(f"the vision tower of a {model.config.model_type} model has no list of {count} layers")


def _kept(tower: Any, layer: nn.Module) -> int:
    """Elements a row, as autograd saves them: queries, keys, values and the output of attention; where one product makes the first
    three also their positions' rotation and the output in order; and of the MLP what surrounds its activation function."""
    names = {name.rpartition(".")[2] for name, _ in layer.named_modules()}
    attention = 7 if "qkv" in names else 4
    mlp = 4 if "gate_proj" in names else 3 if tower.hidden_act == "quick_gelu" else 2
    return attention * tower.hidden_size + mlp * tower.intermediate_size


def _merged(config: Any) -> int:
    """Patches along a side of what becomes one row of the language model."""
    tower = config.vision_config
    if tokens := getattr(config, "mm_tokens_per_image", None):
        return tower.image_size // tower.patch_size // round(tokens**0.5)
    return getattr(tower, "spatial_merge_size", None) or getattr(config, "scale_factor", None) or 1


def _parts(side: int, window: int) -> list[int]:
    """A side in windows, of which the last may be smaller."""
    return [min(window, side - start) for start in range(0, side, window)]
