"""Preprocess an image for a model with Pillow and numpy alone, and check the fields that describe the preprocessing.

The result equals that of timm's transform for evaluation; tests compare the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["is_count", "is_number", "prepare_image", "preprocessing_problem"]

_MAX_SIDE = 8192  # pixels, also of what is cropped; Pillow refuses images of twice that
_INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "lanczos", "box", "hamming")
_CROP_MODES = ("center", "border", "squash")


def prepare_image(
    image: Image.Image,
    *,
    input_size: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str,
    crop_pct: float,
    crop_mode: str,
) -> np.ndarray:
    """Resize, crop and normalise an RGB image to [C, H, W] in float32.

    Args:
        image: any size; converted to grey levels if C is 1.
        input_size: C, H, W.
        mean, std: one value, or one per channel.
        interpolation, crop_pct, crop_mode: timm's; they have passed `preprocessing_problem`.
    """
    channels, height, width = input_size
    if channels == 1:
        image = image.convert("L")
    size = _scaled_size(image, (math.floor(height / crop_pct), math.floor(width / crop_pct)), crop_mode)
    if size != image.size:
        image = image.resize(size, Image.Resampling[interpolation.upper()])
    fill = tuple(round(255 * value) for value in mean) if crop_mode == "border" else (0,)
    pixels: np.ndarray = np.asarray(_crop(image, width, height, fill), np.float32) / np.float32(255)
    pixels = (pixels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.ascontiguousarray(pixels.reshape(height, width, channels).transpose(2, 0, 1))


def _scaled_size(image: Image.Image, target: tuple[int, int], crop_mode: str) -> tuple[int, int]:
    """Width and height to resize to, for a target height and width before cropping."""
    width, height = image.size
    if crop_mode == "squash":
        return target[1], target[0]
    if crop_mode == "center" and target[0] == target[1]:  # rounded down, as in torchvision
        short = min(width, height)
        return int(target[0] * width / short), int(target[0] * height / short)
    choose = max if crop_mode == "border" else min
    ratio = choose(height / target[0], width / target[1])
    return round(width / ratio), round(height / ratio)


def _crop(image: Image.Image, width: int, height: int, fill: tuple[int, ...]) -> Image.Image:
    """The centre of an image; a smaller image gets a border."""
    if image.width < width or image.height < height:
        padded = (max(image.width, width), max(image.height, height))
        canvas = Image.new(image.mode, padded, fill[0] if image.mode == "L" else (fill * 3)[:3])
        canvas.paste(image, ((padded[0] - image.width) // 2, (padded[1] - image.height) // 2))
        image = canvas
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def preprocessing_problem(values: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first preprocessing field with an impossible value, and its bound; None if there is none.

    Args:
        values: `input_size`, `mean`, `std`, `interpolation`, `crop_pct` and `crop_mode`; each may be missing.
    """
    size = values.get("input_size", (3, 224, 224))
    if not (isinstance(size, (list, tuple)) and len(size) == 3 and all(is_count(side) for side in size)):
        return "input_size", "(C, H, W)"
    if max(size) > _MAX_SIDE:
        return "input_size", f"at most {_MAX_SIDE}"
    for field in ("mean", "std"):
        numbers = values.get(field, (1.0,))
        if not (isinstance(numbers, (list, tuple)) and all(is_number(number) for number in numbers)):
            return field, "finite numbers"
        if len(numbers) not in (1, size[0]):
            return field, f"one value or {size[0]}"
    if not all(number > 0 for number in values.get("std", (1.0,))):
        return "std", "positive"
    crop = values.get("crop_pct", 1.0)
    if not is_number(crop) or not 0 < crop <= 1 or max(size) > _MAX_SIDE * crop:
        return "crop_pct", f"above 0 and at most 1, and images of at most {_MAX_SIDE} pixels before cropping"
    for field, known in (("interpolation", _INTERPOLATIONS), ("crop_mode", _CROP_MODES)):
        if values.get(field, known[0]) not in known:
            return field, f"one of {', '.join(known)}"
    return None


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and not true or false."""
    return type(value) in (int, float) and math.isfinite(value)


def is_count(value: Any) -> bool:
    """Whether a value is a positive integer, and not true or false."""
    return type(value) is int and value > 0
