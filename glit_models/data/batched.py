"""Random crops and flips of whole batches, as tensors on the training device.

timm's transforms process one image at a time, which for small images takes longer than a small network's training step.
Here the training images are kept in memory as bytes, and one `grid_sample` crops, resizes and flips a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import Argument, DataError
from .loading import part_positions

__all__ = ["TensorImages", "random_affine"]

_MOST_BYTES = 8 << 30


class TensorImages:
    """A data set in memory: images [N, 3, H, W] as bytes and labels [N]. Makes augmented batches of them.

    Args:
        dataset: map-style pairs of (RGB PIL image, label).
        size: width and height of the images in a batch.
        device: device on which the batches are made.

    Raises:
        DataError: if the images differ in size, are larger than `size` (there is no antialiasing), or take more than
            8 GiB.
    """

    def __init__(self, dataset: Any, size: int, device: torch.device) -> None:
        self.size, self.device = size, device
        first = _pixels(dataset[0][0])
        if max(first.shape[:2]) > size:
            raise DataError(
                f"images of {first.shape[1]} x {first.shape[0]} pixels are larger than the {size} to train with, and ",
                Argument("batched"), " does not antialias; leave it out",
            )  # fmt: skip
        if len(dataset) * first.nbytes > _MOST_BYTES:
            raise DataError(
                f"{len(dataset)} images do not fit {_MOST_BYTES >> 30} GiB; leave out ", Argument("batched")
            )
        pixels = np.empty((len(dataset), *first.shape), np.uint8)
        labels = np.empty(len(dataset), np.int64)
        for index in range(len(dataset)):
            image, labels[index] = dataset[index]
            array = _pixels(image)
            if array.shape != first.shape:
                raise DataError(
                    f"image {index} has {array.shape[1]} x {array.shape[0]} pixels, image 0 {first.shape[1]} x "
                    f"{first.shape[0]}; ", Argument("batched"), " needs images of one size",
                )  # fmt: skip
            pixels[index] = array
        self.images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        self.labels = torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def steps(
        self, augment: Any, *, batch_size: int, num_parts: int, parts: Sequence[int], seed: int, epoch: int,
        first_step: int = 0,
    ) -> Iterator[list[tuple[Tensor, Tensor]]]:  # fmt: skip
        """Yield this process's parts of an epoch's batches: images [b, 3, S, S] in 0 to 1, labels [b].

        The images come in the order of `train_parts`. A batch is a function of (seed, epoch, step) and does not depend
        on the number of parts. The arguments are those of `train_parts`; `augment` has `scale`, `ratio`, `hflip` and
        `vflip` as in a recipe.
        """
        order = np.random.default_rng((seed, epoch)).permutation(len(self))
        for step in range(first_step, len(self) // batch_size):
            members = torch.from_numpy(order[step * batch_size : (step + 1) * batch_size])
            rng = np.random.default_rng((seed, epoch, step))
            theta = random_affine(batch_size, augment.scale, augment.ratio, augment.hflip, augment.vflip, rng)
            yield [
                self._part(members[positions], theta[positions])
                for positions in (part_positions(batch_size, num_parts, part) for part in parts)
            ]

    def _part(self, members: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        images = self.images[members].to(self.device, non_blocking=True).float() / 255
        grid = F.affine_grid(
            theta.to(self.device, non_blocking=True), [len(members), 3, self.size, self.size], align_corners=False
        )
        images = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
        return images, self.labels[members].to(self.device, non_blocking=True)


def random_affine(
    count: int, scale: tuple[float, float], ratio: tuple[float, float], hflip: float, vflip: float,
    rng: np.random.Generator,
) -> Tensor:  # fmt: skip
    """Matrices [count, 2, 3] for `affine_grid`: random crops of an image, with random flips.

    Args:
        scale: area of the crop as a fraction of the image's, uniform. ratio: width over height, uniform in the
            logarithm, as in torchvision's RandomResizedCrop. A crop wider or higher than the image is cut to it.
        hflip, vflip: probability of each flip.
    """
    area = rng.uniform(*scale, count)
    aspect = np.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1]), count))
    width, height = np.minimum(np.sqrt(area * aspect), 1), np.minimum(np.sqrt(area / aspect), 1)
    x, y = (rng.uniform(-1, 1, count) * (1 - side) for side in (width, height))
    zero = np.zeros(count)
    width = np.where(rng.random(count) < hflip, -width, width)
    height = np.where(rng.random(count) < vflip, -height, height)
    rows = [np.stack([width, zero, x], 1), np.stack([zero, height, y], 1)]
    return torch.from_numpy(np.stack(rows, 1)).float()


def _pixels(image: Any) -> np.ndarray:
    return np.asarray(image.convert("RGB"))
