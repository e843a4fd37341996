"""Find image files, and open them upright and in RGB.

The whole package reads image files with this module: prediction, training, scoring, calibration.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ..errors import DataError, first_line
from ..runs.console import say

__all__ = ["FORMATS", "find_images", "list_images", "natural_key", "open_image", "to_rgb"]

# An explicit list, because Pillow passes some formats to other programs (PostScript to Ghostscript) for any suffix.
FORMATS = ("JPEG", "PNG", "WebP", "TIFF", "BMP", "GIF", "AVIF", "PPM")
MOST_PIXELS = 150_000_000
MOST_STRETCHED = 200  # longer over shorter side: transforms scale the shorter one to the model's size
_PAGED = ("GIF", "WEBP", "PNG", "AVIF", "TIFF")  # may hold several different images


@functools.cache
def _formats() -> dict[str, list[str]]:
    """The suffixes of each format that the installed Pillow reads, by Pillow's name of the format."""
    Image.init()
    suffixes: dict[str, list[str]] = {name.upper(): [] for name in FORMATS if name.upper() in Image.OPEN}
    for suffix, name in Image.registered_extensions().items():
        if name in suffixes:
            suffixes[name].append(suffix)
    return suffixes


# ---- finding ----


def find_images(paths: Iterable[str]) -> list[Path]:
    """The image files that `paths` name: files as given; folders are searched recursively, sorted by name.

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
    """The paths of the image files in a folder and its subfolders, in no particular order.

    Images are recognised by suffix. Hidden files and folders are skipped, including macOS's `._*` files. Links are
    followed, except links to a parent folder.

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
            yield entry.path  # including broken links, so that they are reported


_DIGITS = re.compile("([0-9]+)")


def natural_key(text: str) -> tuple[object, ...]:
    """The key that sorts as timm's `natural_key` does: 'class 2' before 'class 10', without regard to case.

    Texts that differ only in case or leading zeros are equal there; here they always have the same order.
    """
    parts: list[object] = list(_DIGITS.split(text.lower()))  # digits are at the odd places
    parts[1::2] = [(len(digits := str(part).lstrip("0")), digits) for part in parts[1::2]]
    return parts, text


# ---- opening ----


def open_image(source: str | Path | IO[bytes], name: str | None = None, most_pixels: int | None = None) -> Image.Image:
    """Read an image file.

    Args:
        source: path, or an open file.
        name: name of the image in messages; default: the path.
        most_pixels: maximum number of pixels; default: `MOST_PIXELS`.

    Returns:
        The image in RGB as `to_rgb` makes it; the first frame or page if there are several, with a warning logged
        once.

    Raises:
        DataError: if it is not a complete image of one of `FORMATS`, has more than `most_pixels`, or one side is more
            than `MOST_STRETCHED` times the other.
    """
    name = name or str(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, on large sizes and damaged metadata; both are handled here
            with Image.open(source, formats=tuple(_formats())) as image:
                _check_size(image, name, most_pixels or MOST_PIXELS)
                if image.format in _PAGED and getattr(image, "is_animated", False):
                    _say_first_frame(name)
                return to_rgb(image)
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{name}: not an image of a known format") from None
    except Exception as error:  # decoders can raise anything on damaged files
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
    if not _told and multiprocessing.parent_process() is None:  # otherwise every worker would repeat it in each epoch
        _told.add(name)
        say(f"glit: {name} holds several images; of such files the first one is taken")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB: turn it upright by its EXIF orientation, and put transparent pixels over white.

    16-bit grey levels are scaled from 0 to 65,535 to 8 bits. 32-bit integers are treated the same way; floating-point
    levels are taken as 0 to 1, 0 to 255 or 0 to 65,535, the first range that contains them all. Levels outside these
    ranges are scaled from the image's minimum to its maximum.
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
    except Exception:  # damaged metadata; the image itself may be intact
        return image
    return ImageOps.exif_transpose(image) if orientation != 1 else image


def _to_8_bits(image: Image.Image) -> Image.Image:
    values = np.nan_to_num(np.asarray(image).astype(np.float32))
    low, high = float(values.min()), float(values.max())
    ranges = (1, 255, 65535) if image.mode == "F" else (65535,)
    low, high = next(((0.0, float(top)) for top in ranges if low >= 0 and high <= top), (low, high))
    return Image.fromarray((255 * (values - low) / (high - low or 1) + 0.5).astype(np.uint8))
