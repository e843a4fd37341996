"""The parts that blocks are made of, one file each, and the table of their names.

To add a custom part, subclass `Part` and call `register_part` on the class. See docs/extending.md.
"""

from __future__ import annotations

from ..errors import SpecError
from ..extensions import Table
from .attention import AttentionPart
from .local_conv import LocalConv, LocalConvPart
from .local_conv2d import LocalConv2dPart
from .mlp import MlpPart
from .part import (
    BlockParts,
    BuildOptions,
    ExportOptions,
    Part,
    Slice,
    TokenGrid,
    build_part,
    count_linear_params,
)
from .relative_attention import RelativeAttentionPart
from .window_attention import WindowAttentionPart

__all__ = [
    "PARTS",
    "AttentionPart",
    "BlockParts",
    "BuildOptions",
    "ExportOptions",
    "LocalConv",
    "LocalConv2dPart",
    "LocalConvPart",
    "MlpPart",
    "Part",
    "RelativeAttentionPart",
    "Slice",
    "TokenGrid",
    "WindowAttentionPart",
    "build_part",
    "count_linear_params",
    "register_part",
]

PARTS: Table[type[Part]] = Table("part", Part, SpecError)
"""The kinds of parts, by name."""
register_part = PARTS.register_class("kind")
"""Class decorator that registers a `Part` under its `kind`."""
for _part in (AttentionPart, LocalConvPart, LocalConv2dPart, WindowAttentionPart, RelativeAttentionPart, MlpPart):
    register_part(_part)
