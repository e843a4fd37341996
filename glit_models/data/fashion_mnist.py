"""Read Fashion-MNIST (Xiao et al. 2017, MIT licence) from its four gzipped IDX files.

torchvision's class reads only unpacked copies that it writes itself, so it can use neither Debian's package nor a
read-only folder, and fails on damaged files with a traceback. So torchvision is used only to download the files.
"""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import Argument, DataError

__all__ = ["CLASS_NAMES", "FashionMNIST", "find_folder"]

CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
"""The ten classes, in the order of their labels."""
_DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist
_PREFIX = {"train": "train", "test": "t10k"}


def _holds_files(folder: Path) -> bool:
    return all((folder / f"{prefix}-images-idx3-ubyte.gz").is_file() for prefix in _PREFIX.values())


def find_folder(root: str | os.PathLike[str] | None = None) -> Path:
    """The folder with the four IDX files: `root` if given, else Debian's, else torchvision's, downloaded if necessary.

    Raises:
        DataError: if `root` is given but does not contain them, or the download fails; suggests a remedy.
    """
    if root is not None:
        for folder in (Path(root), Path(root) / "FashionMNIST" / "raw"):
            if _holds_files(folder):
                return folder
        raise DataError(
            f"{root}: no Fashion-MNIST here; it should hold train-images-idx3-ubyte.gz and the other three files"
        )
    if _holds_files(_DEBIAN_FOLDER):
        return _DEBIAN_FOLDER
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "glit" / "data"
    folder = cache / "FashionMNIST" / "raw"
    if not _holds_files(folder):
        from torchvision.datasets import FashionMNIST as Downloader

        try:
            Downloader(str(cache), download=True)
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"Fashion-MNIST could not be downloaded ({error}); install Debian's dataset-fashion-mnist "
                "or give the folder with its .gz files as ",
                Argument("root"),
            ) from None
    return folder


class FashionMNIST:
    """A map-style data set of (RGB PIL image of 28 x 28 pixels, label) pairs.

    Args:
        split: 'train' (60,000 images) or 'test' (10,000).
        root: see `find_folder`.

    Raises:
        DataError: on missing or damaged files; names the file.
    """

    classes = CLASS_NAMES

    def __init__(self, split: str, root: str | os.PathLike[str] | None = None) -> None:
        if split not in _PREFIX:
            raise DataError(f"Fashion-MNIST has no split {split!r}; it has train and test")
        folder = find_folder(root)
        self.images = _read_idx(folder / f"{_PREFIX[split]}-images-idx3-ubyte.gz", ndim=3)
        self.labels = _read_idx(folder / f"{_PREFIX[split]}-labels-idx1-ubyte.gz", ndim=1)
        if len(self.images) != len(self.labels):
            raise DataError(f"{folder}: {len(self.images)} {split} images but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert("RGB"), int(self.labels[index])


def _read_idx(path: Path, ndim: int) -> np.ndarray:
    """Read the unsigned bytes of a gzipped IDX file as an array of `ndim` dimensions."""
    try:
        with gzip.open(path) as file:
            data = file.read()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged or cut short ({error}); fetch it again") from None
    header = 4 + 4 * ndim
    if len(data) < header or data[:4] != bytes([0, 0, 8, ndim]):
        raise DataError(f"{path}: not an IDX file of bytes in {ndim} dimensions")
    shape = struct.unpack(f">{ndim}I", data[4:header])
    if len(data) - header != int(np.prod(shape)):
        raise DataError(f"{path}: {len(data) - header} bytes of data where its header says {int(np.prod(shape))}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
