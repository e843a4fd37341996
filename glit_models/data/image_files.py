"""Image files: which files are images, and the one function that opens them, upright and in RGB.

Everything in this package that reads an image from a file reads it here: prediction, training, scoring, calibration.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ..errors import DataError, first_line
from ..runs.console import say

__all__ = ["FORMATS", "find_images", "list_images", "open_image", "to_rgb"]

# Named, because Pillow would hand other files to other programs: PostScript to Ghostscript, whatever their suffix.
FORMATS = ("JPEG", "PNG", "WebP", "TIFF", "BMP", "GIF", "AVIF", "PPM")
MOST_PIXELS = 150_000_000
MOST_STRETCHED = 200  # the longer side over the shorter one: transforms scale the shorter one to the model's size
_PAGED = ("GIF", "WEBP", "PNG", "AVIF", "TIFF")  # may hold several images that are not views of one


@functools.cache
def _formats() -> dict[str, list[str]]:
    """The suffixes of each format that this Pillow reads, by Pillow's name of it."""
    Image.init()
    suffixes: dict[str, list[str]] = {name.upper(): [] for name in FORMATS if name.upper() in Image.OPEN}
    for suffix, name in Image.registered_extensions().items():
        if name in suffixes:
            suffixes[name].append(suffix)
    return suffixes


# ---- finding ----


def find_images(paths: Iterable[str]) -> list[Path]:
    """The image files that `paths` name: files as they are, folders searched through in order of name.

    Raises:
        DataError: on a URL, a path that does not exist, or a folder without images.
    """
    found: list[Path] = []
    for text in paths:
        path = Path(text)
        if "://" in text:
            raise DataError(f"{text}: URLs are not fetched; download the image and give its path")
        if path.is_dir():
            inside = sorted(map(Path, list_images(path)))
            if not inside:
                raise DataError(f"{path}: no images in this folder; the formats are {', '.join(FORMATS)}")
            found.extend(inside)
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"{path}: no such file or folder")
    return found


def list_images(folder: Path) -> Iterator[str]:
    """The paths of the image files in a folder and below it, in no order.

    They are told by their suffix. Hidden files and folders are left out, also the `._*` files that macOS makes. Links
    are followed, except one that leads back to a folder above it.

    Raises:
        DataError: if a folder cannot be read.
    """
    suffixes = tuple(suffix for suffixes in _formats().values() for suffix in suffixes)
    yield from _walk(str(folder), suffixes, frozenset(map(str, Path(os.path.realpath(folder)).parents)))


def _walk(folder: str, suffixes: tuple[str, ...], above: frozenset[str]) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from None
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(entry.path, suffixes, above | {real})
        elif entry.name.lower().endswith(suffixes) and (entry.is_file() or entry.is_symlink()):
            yield entry.path  # a link to nothing, too: to leave it out would hide that it is broken


# ---- opening ----


def open_image(source: str | Path | IO[bytes], name: str | None = None, most_pixels: int | None = None) -> Image.Image:
    """Read an image file.

    Args:
        source: path, or an open file.
        name: what to call it in a message; the path unless given.
        most_pixels: that it may have; `MOST_PIXELS` unless given.

    Returns:
        The image in RGB as `to_rgb` makes it; of an animation or a file of several pages the first, which is said
        once.

    Raises:
        DataError: if it is not a whole image of one of `FORMATS`, has more than `most_pixels`, or one side is more than
            `MOST_STRETCHED` times the other.
    """
    name = name or str(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of large sizes and damaged metadata; both are dealt with here
            with Image.open(source, formats=tuple(_formats())) as image:
                _check_size(image, name, most_pixels or MOST_PIXELS)
                if image.format in _PAGED and getattr(image, "is_animated", False):
                    _say_first_frame(name)
                return to_rgb(image)
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{name}: not an image of a known format") from None
    except Exception as error:  # decoders raise all sorts of things on damaged files
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise DataError(f"{name}: cannot be read ({reason})") from None


def _check_size(image: Image.Image, name: str, most_pixels: int) -> None:
    width, height = image.size
    if width * height > most_pixels:
        raise DataError(f"{name}: has {width} x {height} pixels, more than {most_pixels:,} together; scale it down")
    if max(width, height) > MOST_STRETCHED * min(width, height):
        raise DataError(
            f"{name}: has {width} x {height} pixels, one side more than {MOST_STRETCHED} times the other; crop it"
        )


_told: set[str] = set()


def _say_first_frame(name: str) -> None:
    if not _told and multiprocessing.parent_process() is None:  # else once by every worker, anew in each epoch
        _told.add(name)
        say(f"glit: {name} holds several images; of such files the first one is taken")


def to_rgb(image: Image.Image) -> Image.Image:
    """An image in RGB: turned upright as its EXIF orientation says, transparent pixels over white.

    Grey levels of 16 bits are scaled from 0 to 65,535 to 8 bits. Integers of 32 bits are taken for the same, and
    floating-point numbers for 0 to 1, 0 to 255 or 0 to 65,535, the first that holds them all; levels beyond are scaled
    from the image's least to its largest.
    """
    image = _upright(image)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _to_8_bits(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata, of an image that may be whole
        return image
    return ImageOps.exif_transpose(image) if orientation != 1 else image


def _to_8_bits(image: Image.Image) -> Image.Image:
    values = np.nan_to_num(np.asarray(image).astype(np.float32))
    low, high = float(values.min()), float(values.max())
    ranges = (1, 255, 65535) if image.mode == "F" else (65535,)
    low, high = next(((0.0, float(top)) for top in ranges if low >= 0 and high <= top), (low, high))
    return Image.fromarray((255 * (values - low) / (high - low or 1) + 0.5).astype(np.uint8))
