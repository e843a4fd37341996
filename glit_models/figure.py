"""The figure of a network: a column a block, the parts that mix tokens above, the feed-forward network below.

Used by model cards, search reports and the README. What a part is called and its color are the part's own.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .parts import BlockParts, Part
from .spec import Spec

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["draw_network", "network_image", "network_png"]

_INK, _PAPER = "#1f2430", "#ffffff"
_CELL, _GAP, _MARGIN, _LEFT, _MIXER_HEIGHT, _MLP_HEIGHT = 92, 10, 24, 108, 168, 96
_ONE_LINE = 22  # pixels; lower boxes stay empty, and those below twice as much show one line


def draw_network(spec: Spec, path: str | Path) -> None:
    """Draw a network of any family into a PNG file. Raises OSError if it cannot be written."""
    network_image(spec).save(path, format="PNG")


def network_png(spec: Spec) -> bytes:
    """The figure as the content of a PNG file."""
    buffer = io.BytesIO()
    network_image(spec).save(buffer, format="PNG")
    return buffer.getvalue()


def network_image(spec: Spec) -> Image:
    """The figure. The height of a part is its share of the channels, that of an MLP its hidden width over C."""
    from PIL import Image, ImageDraw, ImageFont

    blocks = [spec.block_parts(index) for index in range(spec.depth)]
    kinds = {part.kind: part.color for block in blocks for part in block.mixers}
    top = _MARGIN + 34
    below = top + _MIXER_HEIGHT + 2 * _GAP
    width = max(_LEFT + spec.depth * (_CELL + _GAP) + _MARGIN, 420)
    image = Image.new("RGB", (width, below + _MLP_HEIGHT + 40 + _MARGIN), _PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=14)
    for label, middle in (("heads", top + _MIXER_HEIGHT / 2), ("feed-forward", below + _MLP_HEIGHT / 2)):
        draw.text((_LEFT - 14, middle), label, fill=_INK, font=font, anchor="rm")
    for index, block in enumerate(blocks):
        left = _LEFT + index * (_CELL + _GAP)
        draw.text((left + _CELL / 2, top - 16), str(index), fill=_INK, font=font, anchor="mm")
        _draw_block(draw, font, block, left, top, below, _largest_ratio(blocks))
    legend = "     ".join(
        (*(kind.replace("_", " ") for kind in kinds), f"width {spec.embed_dim}", f"patch {spec.patch_size}")
    )
    x, y = float(_LEFT), below + _MLP_HEIGHT + 26
    for text, color in zip(legend.split("     "), (*kinds.values(), None, None), strict=True):
        if color is not None:
            draw.rectangle((x, y - 6, x + 12, y + 6), fill=color)
            x += 18
        draw.text((x, y), text, fill=_INK, font=font, anchor="lm")
        x += draw.textlength(text, font=font) + 24
    return image


def _largest_ratio(blocks: list[BlockParts]) -> float:
    return max((_ratio(block.mlp) for block in blocks if block.mlp is not None), default=1.0)


def _ratio(mlp: Part) -> float:
    """Hidden width over the channels, as far as a part has one; else 1, for a part of one's own."""
    return float(getattr(mlp, "hidden", mlp.channels)) / mlp.channels


def _draw_block(draw: Any, font: Any, block: BlockParts, left: int, top: int, below: int, largest: float) -> None:
    if block.mlp is None:
        draw.text((left + _CELL / 2, top + _MIXER_HEIGHT / 2), "identity", fill=_INK, font=font, anchor="mm")
        return
    upper = float(top)
    for part in block.mixers:
        height = _MIXER_HEIGHT * part.channels / block.dim
        _draw_box(draw, font, part, left, upper, height)
        upper += height
    _draw_box(draw, font, block.mlp, left, below, _MLP_HEIGHT * _ratio(block.mlp) / largest)


def _draw_box(draw: Any, font: Any, part: Part, left: int, upper: float, height: float) -> None:
    draw.rounded_rectangle((left, upper, left + _CELL, upper + height - 2), 5, fill=part.color)
    if height < _ONE_LINE:
        return
    text = part.label if height >= 2 * _ONE_LINE else part.label.partition("\n")[0]
    middle = (left + _CELL / 2, upper + height / 2 - 1)
    draw.multiline_text(middle, text, fill=_ink_on(part.color), font=font, anchor="mm", align="center")


def _ink_on(color: str) -> str:
    """Black or white, whichever is readable on `color`."""
    red, green, blue = (int(color[start : start + 2], 16) for start in (1, 3, 5))
    return _PAPER if 0.299 * red + 0.587 * green + 0.114 * blue < 140 else _INK
