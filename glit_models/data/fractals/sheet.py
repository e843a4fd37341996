"""Draw a contact sheet of fractals: one row per class, starting with its name."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from ...errors import DataError
from ...runs.files import whole_file
from .dataset import Fractals

__all__ = ["draw_sheet"]

_SHEET_PIXELS = 1 << 26
_CAPTION = 100  # width of the first column, in pixels


def draw_sheet(fractals: Fractals, instances: int, size: int, out: Path) -> None:
    """Write a PNG of all classes, one per row: the name, then instances 0, 1, ...

    Raises:
        DataError: on a number out of range; names it.
        WriteError: if `out` cannot be written.
    """
    num_classes = fractals.config.num_classes
    if instances < 1 or num_classes * instances * size * size > _SHEET_PIXELS:
        raise DataError(
            f"a sheet of {num_classes} classes, {instances} instances and {size} pixels a side "
            f"must have 1 to {_SHEET_PIXELS} pixels"
        )
    labels = torch.arange(num_classes).repeat_interleave(instances)
    images = fractals.batch(labels, torch.arange(instances).repeat(num_classes), size)
    rows = images.unflatten(0, (num_classes, instances)).permute(0, 3, 1, 4, 2)  # [classes, H, instances, W, 3]
    sheet = Image.new("RGB", (_CAPTION + instances * size, num_classes * size), "white")
    sheet.paste(Image.fromarray(rows.reshape(num_classes * size, instances * size, 3).numpy()), (_CAPTION, 0))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for label, name in enumerate(fractals.class_names):
        pen.text((6, (label + 0.5) * size), name, "black", font, anchor="lm")
    with whole_file(out) as path:
        sheet.save(path, format="PNG")
