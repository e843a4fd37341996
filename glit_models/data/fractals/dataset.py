"""Formula-driven images for pretraining: each class is a random fractal, and each image is drawn on demand.

Based on FractalDB (Kataoka et al., ACCV 2020), OFDB, which shows that one instance per class is enough (Nakamura et
al., ICCV 2023, arXiv 2307.14710), and 1p-frac, where all classes are small changes of one fractal (Nakamura et al.,
ECCV 2024, arXiv 2408.00677). `ifs` does the drawing. Nothing is stored, downloaded or drawn in advance.

Axes: B images, F maps, P colour planes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import DataError
from .classes import find_classes
from .config import FractalConfig
from .ifs import MAX_SIZE, contract, draw, hash_keys, images_at_once, numbers

__all__ = ["Fractals", "HeldOutFractals"]

Integers = Tensor | Sequence[int]  # of 64 bits

_GRAY = 127  # as in FractalDB
_NUM_COLORS = 4  # per image
_HELD_OUT = 1 << 40  # images of a class from this index on are held out; training never reaches it
_FACTORS, _VIEW, _PALETTE, _PATTERN = range(10, 14)  # purposes of random numbers; `ifs` uses the ones below


@dataclass(frozen=True)
class HeldOutFractals:
    """Images of every class that training never sees.

    Args:
        fractals: the data set that they belong to.
        number: number of the set, from 0; different sets share no images.
    """

    fractals: Fractals
    number: int

    def __len__(self) -> int:
        return self.fractals.config.num_classes * self.fractals.config.held_out

    def members(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The labels and indices [B] of the images at these positions [B]."""
        num_classes, held_out = self.fractals.config.num_classes, self.fractals.config.held_out
        return positions % num_classes, _HELD_OUT + self.number * held_out + positions // num_classes


class Fractals:
    """`num_classes * instances` fractals per epoch, drawn in batches on the device that asks for them.

    An image is a function of configuration, seed, class, index and size. It does not depend on the batch, on earlier
    images or on the device.

    Args:
        config: settings of the images.
        seed: seed of the classes and of the differences between their instances, from 0.

    Attributes:
        maps: [classes, F, 6] float32, as `ifs.contract` describes them.
        num_maps: [classes] int64, number of the F maps that a class uses.
        class_names: one per class.

    Raises:
        DataError: if the thresholds of `config` leave too few classes; names them.
    """

    def __init__(self, config: FractalConfig, seed: int = 0) -> None:
        if not 0 <= seed < 2**63:
            raise DataError(f"seed must be from 0 to {2**63 - 1}, got {seed}")
        self.config = config
        self.seed = seed
        self.maps, self.num_maps = find_classes(config, seed)
        digits = len(str(config.num_classes - 1))
        self.class_names = tuple(f"fractal_{label:0{digits}d}" for label in range(config.num_classes))
        self._placed = {self.maps.device: (self.maps, self.num_maps)}

    def __len__(self) -> int:
        return self.config.num_classes * self.config.instances

    def batch(self, labels: Integers, indices: Integers, size: int, device: torch.device | str = "cpu") -> Tensor:
        """Draw one image for each pair of label and index.

        Args:
            labels: [B] classes.
            indices: [B] instances, from 0 to 2**63 - 1; a run uses new ones in every epoch.
            size: width and height in pixels, from 8 to 1024.
            device: device to draw on.

        Returns:
            uint8 [B, 3, size, size] on `device`, 0 where there is no fractal.

        Raises:
            DataError: on a label or an index out of range (not checked for tensors on a GPU, which would force a
                synchronisation), on unequal lengths, or on an invalid size.
        """
        label, index = _checked(labels, indices, self.config.num_classes)
        if not 8 <= size <= MAX_SIZE:
            raise DataError(f"size must be from 8 to {MAX_SIZE}, got {size}")
        label, index = label.to(device, non_blocking=True), index.to(device, non_blocking=True)
        images = torch.empty(len(label), 3, size, size, dtype=torch.uint8, device=label.device)
        step = images_at_once(size, self.config.density, label.device)
        for start in range(0, len(label), step):
            part = slice(start, start + step)
            images[part] = self._draw(label[part], index[part], size)
        return images

    def _draw(self, label: Tensor, index: Tensor, size: int) -> Tensor:
        config = self.config
        if label.device not in self._placed:
            self._placed[label.device] = self.maps.to(label.device), self.num_maps.to(label.device)
        all_maps, all_counts = self._placed[label.device]
        maps, num_maps = all_maps[label], all_counts[label]
        keys = hash_keys(self.seed, label, index)
        if config.perturbation:
            sway = (2 * numbers(keys, _FACTORS, maps.shape[1] * 6) - 1).view_as(maps)
            maps = contract(maps * (1 + sway * config.perturbation))
        num_colors = _NUM_COLORS if config.color == "color" else 1
        images = _packed(draw(maps, num_maps, keys, self._view(keys), size, config.density, num_colors))
        images = _patched(images, keys) if config.render == "patch" else images[:, 1:-1, 1:-1]
        return _colored(images, keys) if config.color == "color" else (images * _GRAY).unsqueeze(1)

    def _view(self, keys: Tensor) -> Tensor:
        """[B, 4] for `draw`."""
        config = self.config
        turn, mirror, zoom, anchor = numbers(keys, _VIEW, 4).unbind(-1)
        turn = (turn * 2 - 1) * (config.rotation / 360)
        turn = (turn + (turn < 0)).clamp(max=1 - 2**-20)  # a tiny negative turn rounds to a full one
        zoom = config.zoom_min + zoom * (config.zoom_max - config.zoom_min)
        return torch.stack((turn, config.flip_prob - mirror, zoom, anchor), -1)


def _checked(labels: Integers, indices: Integers, num_classes: int) -> tuple[Tensor, Tensor]:
    try:
        label, index = torch.as_tensor(labels, dtype=torch.int64), torch.as_tensor(indices, dtype=torch.int64)
    except (OverflowError, RuntimeError, TypeError, ValueError):
        raise DataError("labels and indices must be whole numbers of 64 bits") from None
    if label.ndim != 1 or label.shape != index.shape:
        raise DataError(f"labels and indices must be equally long, got {list(label.shape)} and {list(index.shape)}")
    for name, values, end in (("label", label, num_classes), ("index", index, 2**63)):
        if values.device.type == "cpu" and len(values):
            for value in (int(values.min()), int(values.max())):
                if not 0 <= value < end:
                    raise DataError(f"{name} must be from 0 to {end - 1}, got {value}")
    return label, index


# ---- from planes to colours ----


def _packed(planes: Tensor) -> Tensor:
    """Pack planes [B, P, H, W] into [B, H, W]: bit p is plane p."""
    images = planes[:, 0].clone()
    for plane in range(1, planes.shape[1]):
        images |= planes[:, plane] << plane
    return images


def _patched(images: Tensor, keys: Tensor) -> Tensor:
    """Draw each image's 3 x 3 pattern, never an empty one, around every point; removes the border of one pixel."""
    size = images.shape[-1] - 2
    pattern = (numbers(keys, _PATTERN, 1) * 511).to(torch.int64) + 1
    masks = (((pattern >> torch.arange(9, device=keys.device)) & 1) * 255).to(torch.uint8).view(-1, 9, 1, 1)
    result = torch.zeros_like(images[:, :size, :size])
    for place in range(9):
        y, x = divmod(place, 3)
        result |= images[:, y : y + size, x : x + size] & masks[:, place]
    return result


def _colored(images: Tensor, keys: Tensor) -> Tensor:
    """Colour packed [B, H, W] as [B, 3, H, W]: a random colour per bit; where bits overlap, each channel's maximum."""
    device = keys.device
    palette = (64 + numbers(keys, _PALETTE, _NUM_COLORS * 3) * 192).to(torch.uint8).view(-1, 3, _NUM_COLORS)
    bits = (torch.arange(1 << _NUM_COLORS, device=device)[:, None] >> torch.arange(_NUM_COLORS, device=device)) & 1
    colors = (palette.unsqueeze(2) * bits.to(torch.uint8)).amax(-1)  # [B, 3, 16]
    flat = images.flatten(1).to(torch.int64).unsqueeze(1).expand(-1, 3, -1)
    return colors.gather(2, flat).unflatten(-1, images.shape[1:])
