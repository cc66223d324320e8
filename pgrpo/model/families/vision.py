"""Vision-language models: the tower runs once a distinct image, and its features take the place of the placeholders' embeddings.

A frozen tower runs outside of autograd, and features of recent images are kept in host memory: so an image is computed once a step,
rollout and all. A tower or projector that is trained runs once a distinct image and micro-batch. FSDP2 gathers its weights with the
root and leaves parameters without gradients out of the reduction, so that every rank must run it in every micro-batch: one without
images runs it on a dummy, whose features count zero.

T packed rows, F rows of features, E hidden size of the language model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from pgrpo.attention.grouped import grouped_attention
from pgrpo.attention.hook import AttentionLayout, attending
from pgrpo.attention.layout import PackedLayout
from pgrpo.distributed.sequence import SplitLayout
from pgrpo.planning.tower import TowerDims, TowerWork, tower_layers
from pgrpo.types import Sample
from pgrpo.vision.families import Family, family_of
from pgrpo.vision.pixels import Pixels, PixelStore
from pgrpo.vision.rows import Block, ImageRows

KEPT_BYTES = 4 * 2**30
"""The most host memory of a frozen tower's features: of more than 500 images of 1,024 rows of 4,096 in bfloat16."""


class Features(NamedTuple):
    """[F, E] what takes the place of placeholders, and what is added behind the first layers (deepstack), [F, E] each."""

    rows: Tensor
    deep: tuple[Tensor, ...] = ()

    def take(self, index: Tensor) -> Features:
        return Features(self.rows.index_select(0, index), tuple(x.index_select(0, index) for x in self.deep))

    def split(self, counts: Sequence[int]) -> list[Features]:
        parts = zip(*(x.split(list(counts)) for x in (self.rows, *self.deep)), strict=True)
        return [Features(rows, tuple(deep)) for rows, *deep in parts]

    def to(self, device: torch.device | str) -> Features:
        return Features(
            self.rows.to(device, non_blocking=True), tuple(x.to(device, non_blocking=True) for x in self.deep)
        )

    def to_host(self) -> Features:
        """Copies: a part of a tensor would keep all of it alive. From a GPU to pinned memory, so that the host does not wait: only
        the GPU may read them."""
        return Features(_to_host(self.rows), tuple(map(_to_host, self.deep)))

    @staticmethod
    def cat(parts: Sequence[Features]) -> Features:
        rows, *deep = (torch.cat(x) for x in zip(*((part.rows, *part.deep) for part in parts), strict=True))
        return Features(rows, tuple(deep))

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.rows, *self.deep))


class Vision:
    """The images of a policy's model.

    Attributes:
        pixels: gives the processor's output for an image, by its key and, of one that is not of the data, its file.
        store: makes it ahead, in threads; None: ``pixels`` makes it when it is asked.
        dummy: pixels of any image, for ranks without one while the tower is trained.
        calls: number of times that the tower ran so far; ``images``: number of images in these calls.
        flops: of these forwards, and of the backwards that follow them; dummies are not counted.
    """

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        self.model, self.family = model, family
        self.dims = TowerDims.of(model, family)
        self.flops = 0
        self.pixels: Callable[..., Pixels] = _no_pixels
        self.store: PixelStore | None = None
        self.dummy: Callable[[], Pixels] | None = None
        self.calls = self.images = 0
        self._kept: OrderedDict[str, Features] = OrderedDict()

    @staticmethod
    def of(model: PreTrainedModel) -> Vision | None:
        """None for a model without images."""
        family = family_of(model.config)
        return Vision(model, family) if family else None

    def hidden(self, inputs: Mapping[str, Tensor], layout: AttentionLayout, images: ImageRows | None) -> Tensor:
        """[T, E] last hidden states of the language model."""
        base: Any = self.model.base_model
        embedding: Any = self.model.get_input_embeddings()
        ids_T, positions, more = inputs["input_ids"], inputs["position_ids"], {}
        if images is None:
            embeds_TE = embedding(ids_T)
            if self.dummy is not None and torch.is_grad_enabled() and self._is_trained():
                flops, dummy = self.flops, self._run([self.dummy()])
                self.flops = flops
                embeds_TE = embeds_TE + 0.0 * sum(x.sum() for x in (dummy.rows, *dummy.deep))
        else:
            features = self.features(images).take(images.features)
            # A placeholder's id may be beyond the vocabulary.
            embeds_TE = embedding(ids_T.index_fill(0, images.rows, 0))
            embeds_TE = embeds_TE.index_copy(0, images.rows, features.rows.to(embeds_TE.dtype))
            if features.deep:
                is_image_T = torch.zeros_like(ids_T, dtype=torch.bool).index_fill(0, images.rows, True)
                more = {"visual_pos_masks": is_image_T[None], "deepstack_visual_embeds": list(features.deep)}
            if self.family.sees_whole_images:
                if isinstance(layout, SplitLayout):  # attention has all rows
                    layout = replace(layout, whole=WholeImages(layout.whole, images.blocks))
                else:
                    layout = WholeImages(layout, images.blocks)
        if self.family.positions_3d and positions.ndim == 1:
            positions = positions.expand(3, -1)
        with attending(layout):
            output = getattr(base, self.family.text)(
                inputs_embeds=embeds_TE[None], position_ids=positions.unsqueeze(-2), use_cache=False, **more
            )
        return output[0].squeeze(0)

    def forget(self) -> None:
        """Drop kept features: call this when weights of a frozen tower change."""
        self._kept.clear()

    def missing(self, keys: Sequence[str]) -> list[str]:
        """The images whose pixels are needed for their features."""
        return [key for key in keys if key not in self._kept or self._is_trained()]

    def features(self, images: ImageRows) -> Features:
        """Features of the distinct images, in order."""
        if self._is_trained():
            self._kept.clear()  # of other weights
        missing, fresh = self.missing(images.keys), dict[str, Features]()
        if self.store is not None:
            self.store.hurry(missing)
        if self._is_trained():
            return self._checked(self._run([self._pixels(key, images) for key in images.keys]), images.counts)
        if missing:
            counts = [count for key, count in zip(images.keys, images.counts, strict=True) if key in missing]
            with torch.no_grad():
                found = self._checked(self._run([self._pixels(key, images) for key in missing]), counts)
            fresh |= zip(missing, found.split(counts), strict=True)
            self._kept |= {key: part.to_host() for key, part in fresh.items()}
        for key in images.keys:
            self._kept.move_to_end(key)
        device = images.rows.device
        result = Features.cat([fresh.get(key) or self._kept[key].to(device) for key in images.keys])
        total = sum(part.bytes for part in self._kept.values())
        while total > KEPT_BYTES and len(self._kept) > 1:
            total -= self._kept.popitem(last=False)[1].bytes
        return result

    def reference_inputs(self, sample: Sample) -> dict[str, Any]:
        """What the untouched model is given beside a sample's token ids: pixels, and which tokens are images."""
        found = sample.images.images if sample.images else ()
        made = [self.pixels(image.key, image.content) if image.content else self.pixels(image.key) for image in found]
        inputs: dict[str, Any] = self._join(made) if found else {}
        is_image = torch.zeros(1, len(sample.prompt_ids) + len(sample.token_ids), dtype=torch.long, device=self._device)
        for start, end in (run for image in found for run in image.runs):
            is_image[:, start:end] = 1
        if self.family.sees_whole_images:
            inputs["token_type_ids"] = is_image
        elif self.family.positions_3d and found:
            inputs["mm_token_type_ids"] = is_image
        return inputs

    def _pixels(self, key: str, images: ImageRows) -> Pixels:
        content = images.contents.get(key)
        return self.pixels(key) if content is None else self.pixels(key, content)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def recompute(self) -> None:
        """From now on the backward of the tower computes its layers again, and keeps their inputs alone."""
        for layer in tower_layers(self.model, self.family):
            layer.forward = partial(_recomputed, layer)  # pyright: ignore[reportAttributeAccessIssue]

    def _is_trained(self, *, projector: bool | None = None) -> bool:
        """Whether tower or projector are trained; ``projector``: one of them."""
        parts = tower_parameters(self.model, self.family)
        return any(p.requires_grad for which, p in parts if projector is None or which == projector)

    def _run(self, pixels: Sequence[Pixels]) -> Features:
        self.calls += 1
        self.images += len(pixels)
        tower, projector = (torch.is_grad_enabled() and self._is_trained(projector=part) for part in (False, True))
        self.flops += self.dims.flops(TowerWork.sum(map(self.dims.work, pixels)), tower=tower, projector=projector)
        base: Any = self.model.base_model
        output = base.get_image_features(**self._join(pixels), return_dict=True)
        deep = getattr(output, "deepstack_features", None) or ()
        return Features(_flat(output.pooler_output), tuple(_flat(x) for x in deep))

    def _join(self, pixels: Sequence[Pixels]) -> Pixels:
        """The processor's outputs of several images as one."""
        return {name: self._joined([one[name] for one in pixels]) for name in pixels[0]}

    def _joined(self, parts: list[Tensor]) -> Tensor:
        if parts[0].ndim == 5 and self.family.tiles_dim == 0:  # padded to the most tiles
            most = max(x.shape[1] for x in parts)
            parts = [F.pad(x, (0, 0) * 3 + (0, most - x.shape[1])) for x in parts]
        # Only pixels have the tiles in a dimension of their own: grids and sizes are a row an image.
        dtype = next(p for _, p in tower_parameters(self.model, self.family)).dtype
        parts = [x.to(self._device) for x in parts]  # one by one, as joining them on the host would copy them once more
        parts = [x.to(dtype) if x.is_floating_point() else x for x in parts]
        return torch.cat(parts, self.family.tiles_dim if parts[0].ndim >= 4 else 0)

    def _checked(self, found: Features, counts: Sequence[int]) -> Features:
        if len(found.rows) != sum(counts):
            raise RuntimeError(
                f"the vision tower made {len(found.rows)} rows of images that have {sum(counts)} tokens in their prompts: the "
                "image processor and the model do not agree (a black image may have been dropped as padding)"
            )
        return found


class WholeImages:
    """A layout in which every row of an image sees all rows of its image.

    Rows of images are prompt rows, so their output of ``layout`` is replaced by attention to everything up to their image's end."""

    def __init__(self, layout: AttentionLayout, blocks: Sequence[Block]) -> None:
        self.layout, self.blocks = layout, blocks

    def attend(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, scale: float, *, module: nn.Module,
        window: int | None, softcap: float | None, sinks_H: Tensor | None,
    ) -> Tensor:  # fmt: skip
        options: dict[str, Any] = {"window": window, "softcap": softcap, "sinks_H": sinks_H}
        if softcap or sinks_H is not None:
            raise NotImplementedError("images whose rows see each other, with soft-capped scores or sinks")
        if isinstance(self.layout, PackedLayout):
            out_THD = grouped_attention(q_THD, k_TKD, v_TKD, self.layout, scale, **options)
        else:
            out_THD = self.layout.attend(q_THD, k_TKD, v_TKD, scale, module=module, **options)
        for block in self.blocks:
            if not block.is_whole:
                raise RuntimeError("an image whose rows see each other goes on from keys that are not computed here")
            rows = [torch.arange(*r, device=q_THD.device) for r in (*block.before, (block.start, block.end))]
            keys, own = torch.cat(rows), rows[-1]
            q_1HnD, k_1KmD, v_1KmD = (
                x.index_select(0, index).transpose(0, 1)[None]
                for x, index in ((q_THD, own), (k_TKD, keys), (v_TKD, keys))
            )
            seen = None
            if window is not None and window < len(keys):  # it hides keys that are too far back, and none ahead
                at = torch.arange(len(keys), device=q_THD.device)
                seen = at[None] > at[-len(own) :, None] - window
            new = F.scaled_dot_product_attention(q_1HnD, k_1KmD, v_1KmD, attn_mask=seen, scale=scale, enable_gqa=True)
            out_THD = out_THD.index_copy(0, own, new[0].transpose(0, 1).to(out_THD.dtype))
        return out_THD


def tower_parameters(model: PreTrainedModel, family: Family) -> list[tuple[bool, nn.Parameter]]:
    """(whether it is the projector's, parameter) of everything between pixels and the language model."""
    named = [(family.is_projector(name), parameter) for name, parameter in model.base_model.named_parameters()]
    return [(is_projector, parameter) for is_projector, parameter in named if is_projector is not None]


def freeze(model: PreTrainedModel, *, tower: bool, projector: bool) -> None:
    """Freeze what shall not be trained of a vision-language model; nothing in another model."""
    if family := family_of(model.config):
        for is_projector, parameter in tower_parameters(model, family):
            parameter.requires_grad_(parameter.requires_grad and not (projector if is_projector else tower))


def _recomputed(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    run = partial(type(layer).forward, layer)
    if not torch.is_grad_enabled():
        return run(*args, **kwargs)
    return checkpoint(run, *args, use_reentrant=False, **kwargs)


def _to_host(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.device.type == "cuda").copy_(x, non_blocking=True)


def _flat(found: Any) -> Tensor:
    """[F, E] of features by image or tile: a list of [n, E], or [tiles, n, E]."""
    return torch.cat(list(found)) if not isinstance(found, Tensor) else found.flatten(0, -2)


def _no_pixels(key: str) -> Pixels:
    raise KeyError(f"no image {key} was read")
