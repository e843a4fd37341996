"""Images for comparison and calibration: real ones, spread evenly over a folder or data set, or generated ones.

Axes: B images, C channels, H/W height and width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import Compose, Grayscale

from glit_models.data.image_files import find_images, open_image
from glit_models.data.labelled import LabelledSplit, open_labelled
from glit_models.data.sources import Stream
from glit_models.errors import DataError

from .metadata import ExportInfo

__all__ = ["ImageSource", "PickedImages", "generated_images", "make_transform", "prepare"]

_SEED = 0


@dataclass(frozen=True, eq=False)
class PickedImages:
    """Some images of a source. Each is read when the iteration reaches it, so that few are in memory at a time.

    Attributes:
        read: gives the (RGB image, label) pair at a place of the source; the label is None if there are none.
        places: the places of the picked images.
        split: their data set; None for a folder without class folders.
    """

    read: Callable[[int], tuple[Image.Image, Any]]
    places: Sequence[int]
    split: LabelledSplit | None

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[tuple[Image.Image, Any]]:
        """Yield the pairs of `read`. Raises DataError if an image cannot be read; names it."""
        return map(self.read, self.places)

    def images(self) -> Iterator[Image.Image]:
        """Yield the images without labels."""
        return (image for image, _ in self)


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

    def pick(self, count: int) -> PickedImages:
        """`count` images, spread evenly over all images; all of them if there are fewer.

        Raises:
            DataError: if there are none, or they come as a stream.
        """
        split = self.labelled()
        if split is None:
            paths = find_images([self.name])
            return PickedImages(lambda place: (open_image(paths[place]), None), self._evenly(len(paths), count), None)
        if isinstance(split.source, Stream):
            raise DataError(f"{self.name} is read as a stream, from which images cannot be picked; give a folder")
        return PickedImages(split.source.__getitem__, self._evenly(len(split.source), count), split)

    def _evenly(self, total: int, count: int) -> list[int]:
        members = [index for index in range(total) if self.fifth is None or (index % 5 == 4) == self.fifth]
        if not members:
            raise DataError(f"{self.name}: no images to take")
        count = min(len(members), count)
        return [members[index * len(members) // count] for index in range(count)]


def generated_images(count: int, size: tuple[int, int], seed: int = _SEED) -> Iterator[Image.Image]:
    """Yield smooth random images of about this height and width, each of another size; the same for the same seed."""
    rng = np.random.default_rng(seed)
    height, width = size
    for _ in range(count):
        cells = rng.integers(2, 12)
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        shape = (int(width * rng.uniform(0.7, 1.6)) + 1, int(height * rng.uniform(0.7, 1.6)) + 1)
        yield coarse.resize(shape, Image.Resampling.BICUBIC)


def make_transform(info: ExportInfo) -> Callable[[Image.Image], np.ndarray]:
    """The function that preprocesses one RGB image with timm's transform, to [C, H, W] in float32."""
    transform = create_transform(**info.data_config)
    if info.input_size[0] != 3:
        transform = Compose([Grayscale(info.input_size[0]), transform])
    return lambda image: transform(image).numpy()


def prepare(info: ExportInfo, images: Iterable[Image.Image]) -> np.ndarray:
    """Preprocess at least one image with timm's transform, one at a time: [B, C, H, W] in float32."""
    return np.stack(list(map(make_transform(info), images)))
