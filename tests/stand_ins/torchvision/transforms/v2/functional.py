from enum import Enum

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from torchvision.missing import missing as __getattr__  # noqa: F401


class InterpolationMode(Enum):
    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


def pil_to_tensor(image) -> Tensor:
    """[channels, height, width] uint8."""
    array = np.array(image, copy=True)
    return torch.from_numpy(array[:, :, None] if array.ndim == 2 else array).permute(2, 0, 1)


def resize(image: Tensor, size, interpolation=InterpolationMode.BILINEAR, antialias=True) -> Tensor:
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    batch = image if image.ndim == 4 else image[None]
    found = F.interpolate(batch, list(size), mode=interpolation.value, align_corners=False, antialias=antialias)
    return found if image.ndim == 4 else found[0]


def normalize(image: Tensor, mean, std, inplace=False) -> Tensor:
    mean, std = (torch.as_tensor(x, dtype=image.dtype, device=image.device).view(-1, 1, 1) for x in (mean, std))
    return image.sub_(mean).div_(std) if inplace else (image - mean) / std


def pad(image: Tensor, padding, fill=0, padding_mode="constant") -> Tensor:
    left, top, right, bottom = padding
    return F.pad(image, (left, right, top, bottom), mode=padding_mode, value=fill)


def crop(image: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    return image[..., top : top + height, left : left + width]


def grayscale_to_rgb(image: Tensor) -> Tensor:
    return image if image.shape[-3] == 3 else image.expand(*image.shape[:-3], 3, *image.shape[-2:])
