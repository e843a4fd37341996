"""Draw a network: one column per block, with the parts that mix tokens at the top and the feed-forward network below.

Used by model cards, search reports and the README. Each part defines its label and color.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .parts import BlockParts, Part
from .spec import Spec

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["draw_network", "network_image", "network_png", "network_svg"]

_INK, _PAPER = "#1f2430", "#ffffff"
_CELL, _GAP, _MARGIN, _LEFT, _MIXER_HEIGHT, _MLP_HEIGHT = 92, 10, 24, 108, 168, 96
_TOP = _MARGIN + 34  # top of the parts that mix tokens
_BELOW = _TOP + _MIXER_HEIGHT + 2 * _GAP  # top of the feed-forward networks
_FONT_SIZE = 14
_COLOURS = 64
_ONE_LINE = 22  # pixels; lower boxes stay empty, and those below twice this show one line


def draw_network(spec: Spec, path: str | Path) -> None:
    """Draw a network of any family as a PNG file. Raises OSError if it cannot be written."""
    Path(path).write_bytes(network_png(spec))


def network_png(spec: Spec) -> bytes:
    """The figure as the content of a PNG file."""
    from PIL.Image import Dither

    buffer = io.BytesIO()
    # A palette makes the file a third as large; the figure only has a few colours and their shades at edges of text.
    network_image(spec).quantize(_COLOURS, dither=Dither.NONE).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def network_svg(spec: Spec) -> str:
    """The figure as the content of an SVG file."""
    svg = _Svg(_size(spec))
    _draw(svg, None, spec)
    return svg.content(f"{spec.family}: {spec.depth} blocks of width {spec.embed_dim}")


def network_image(spec: Spec) -> Image:
    """Draw the figure. A part's height is its share of the channels, that of an MLP its hidden width over C."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", _size(spec), _PAPER)
    _draw(ImageDraw.Draw(image), ImageFont.load_default(size=_FONT_SIZE), spec)
    return image


def _size(spec: Spec) -> tuple[int, int]:
    """Width and height in pixels."""
    return max(_LEFT + spec.depth * (_CELL + _GAP) + _MARGIN, 420), _BELOW + _MLP_HEIGHT + 40 + _MARGIN


def _draw(draw: Any, font: Any, spec: Spec) -> None:
    """Draw a network on an `ImageDraw`, or on an object with the same methods."""
    blocks = [spec.block_parts(index) for index in range(spec.depth)]
    for label, middle in (("heads", _TOP + _MIXER_HEIGHT / 2), ("feed-forward", _BELOW + _MLP_HEIGHT / 2)):
        draw.text((_LEFT - 14, middle), label, fill=_INK, font=font, anchor="rm")
    for index, block in enumerate(blocks):
        left = _LEFT + index * (_CELL + _GAP)
        draw.text((left + _CELL / 2, _TOP - 16), str(index), fill=_INK, font=font, anchor="mm")
        _draw_block(draw, font, block, left, _largest_ratio(blocks))
    kinds = {part.kind.replace("_", " "): part.color for block in blocks for part in block.mixers}
    x, y = float(_LEFT), _BELOW + _MLP_HEIGHT + 26
    for text, color in {**kinds, f"width {spec.embed_dim}": None, f"patch {spec.patch_size}": None}.items():
        if color is not None:
            draw.rectangle((x, y - 6, x + 12, y + 6), fill=color)
            x += 18
        draw.text((x, y), text, fill=_INK, font=font, anchor="lm")
        x += draw.textlength(text, font=font) + 24


def _largest_ratio(blocks: list[BlockParts]) -> float:
    return max((_ratio(block.mlp) for block in blocks if block.mlp is not None), default=1.0)


def _ratio(mlp: Part) -> float:
    """Hidden width over channels; 1 for a custom part without a hidden width."""
    return float(getattr(mlp, "hidden", mlp.channels)) / mlp.channels


def _draw_block(draw: Any, font: Any, block: BlockParts, left: int, largest: float) -> None:
    if block.mlp is None:
        draw.text((left + _CELL / 2, _TOP + _MIXER_HEIGHT / 2), "identity", fill=_INK, font=font, anchor="mm")
        return
    upper = float(_TOP)
    for part in block.mixers:
        height = _MIXER_HEIGHT * part.channels / block.dim
        _draw_box(draw, font, part, left, upper, height)
        upper += height
    _draw_box(draw, font, block.mlp, left, _BELOW, _MLP_HEIGHT * _ratio(block.mlp) / largest)


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


_ANCHORS = {"l": "start", "m": "middle", "r": "end"}  # of ImageDraw, and their SVG names


class _Svg:
    """SVG versions of the `ImageDraw` methods that `_draw` calls."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self.elements: list[str] = []

    def rectangle(self, box: Sequence[float], radius: float = 0, *, fill: str) -> None:
        left, top, right, bottom = box
        place = f'x="{left:g}" y="{top:g}" width="{right - left:g}" height="{bottom - top:g}"'
        self.elements.append(f'<rect {place} rx="{radius}" fill="{fill}"/>')

    rounded_rectangle = rectangle

    def text(self, place: tuple[float, float], text: str, *, fill: str, font: Any, anchor: str) -> None:
        where = f'x="{place[0]:g}" y="{place[1] + _FONT_SIZE * 0.35:g}" text-anchor="{_ANCHORS[anchor[0]]}"'
        self.elements.append(f'<text {where} fill="{fill}">{escape(text)}</text>')

    def multiline_text(self, place: tuple[float, float], text: str, *, align: str, **style: Any) -> None:
        lines = text.split("\n")
        for number, line in enumerate(lines):
            self.text((place[0], place[1] + 18 * (number - (len(lines) - 1) / 2)), line, **style)

    def textlength(self, text: str, font: Any) -> float:
        return 0.52 * _FONT_SIZE * len(text)  # average of common sans-serif fonts

    def content(self, title: str) -> str:
        width, height = self.size
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"'
        style = f'font-family="system-ui, sans-serif" font-size="{_FONT_SIZE}"'
        paper = f'<title>{escape(title)}</title>\n<rect width="{width}" height="{height}" fill="{_PAPER}"/>'
        return "\n".join([f'{head} width="{width}" {style}>', paper, *self.elements, "</svg>"]) + "\n"
