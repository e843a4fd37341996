"""Images for comparison and calibration: real ones, spread evenly over a folder or data set, or generated ones.

Axes: B images, C channels, H/W height and width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import Compose, Grayscale

from glit_models.data.image_files import find_images, open_image
from glit_models.data.labelled import LabelledSplit, open_labelled
from glit_models.data.sources import Stream
from glit_models.errors import DataError

from .metadata import ExportInfo

__all__ = ["ImageSource", "generated_images", "prepare"]

_SEED = 0


@dataclass(frozen=True, eq=False)
class ImageSource:
    """Images for comparison or calibration: a folder, or a labelled data set.

    Args:
        name: a folder, with or without class folders, or a data set as for `glit eval`.
        root: folder of the named data set.
        training: use the training split, if there is one.
        fifth: True uses only every fifth image, False all others, None all.
    """

    name: str
    root: str | None = None
    training: bool = False
    fifth: bool | None = None

    def __str__(self) -> str:
        return f"a fifth of {self.name}, held out" if self.fifth else self.name

    def labelled(self) -> LabelledSplit | None:
        """The data set with its labels; None for a folder of images without class folders.

        Raises:
            DataError: if there is no such folder or data set.
        """
        folder = Path(self.name)
        if folder.is_dir() and not any(path.is_dir() for path in folder.iterdir()):
            return None
        if self.training:
            with contextlib.suppress(DataError):
                return open_labelled(self.name, self.root, "train")
        return open_labelled(self.name, self.root)

    def pick(self, count: int) -> tuple[list[Image.Image], np.ndarray | None, LabelledSplit | None]:
        """`count` RGB images, spread evenly over all images, with labels [B] and data set if they have labels.

        Raises:
            DataError: if there are none, or one cannot be read; names it.
        """
        split = self.labelled()
        if split is None:
            paths = find_images([self.name])
            return [open_image(paths[index]) for index in self._evenly(len(paths), count)], None, None
        if isinstance(split.source, Stream):
            raise DataError(f"{self.name} is read as a stream, from which images cannot be picked; give a folder")
        pairs = [split.source[index] for index in self._evenly(len(split.source), count)]
        return [image for image, _ in pairs], np.array([label for _, label in pairs]), split

    def _evenly(self, total: int, count: int) -> list[int]:
        members = [index for index in range(total) if self.fifth is None or (index % 5 == 4) == self.fifth]
        if not members:
            raise DataError(f"{self.name}: no images to take")
        count = min(len(members), count)
        return [members[index * len(members) // count] for index in range(count)]


def generated_images(count: int, size: tuple[int, int], seed: int = _SEED) -> list[Image.Image]:
    """Smooth random images of about this height and width, each of another size; the same for the same seed."""
    rng = np.random.default_rng(seed)
    height, width = size
    made = []
    for _ in range(count):
        cells = rng.integers(2, 12)
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        shape = (int(width * rng.uniform(0.7, 1.6)) + 1, int(height * rng.uniform(0.7, 1.6)) + 1)
        made.append(coarse.resize(shape, Image.Resampling.BICUBIC))
    return made


def prepare(info: ExportInfo, images: Sequence[Image.Image]) -> np.ndarray:
    """Preprocess images with timm's transform, [B, C, H, W] in float32."""
    transform = create_transform(**info.data_config)
    if info.input_size[0] != 3:
        transform = Compose([Grayscale(info.input_size[0]), transform])
    if not images:
        return np.zeros((0, *info.input_size), np.float32)
    return np.stack([transform(image).numpy() for image in images])
