"""Specs of AutoFormer networks: `AutoFormerBlock` and `AutoFormerSpec`. They also describe ViTAS's retrained networks.

Axes: C channels of a token, H heads, D head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

from ..errors import SpecError
from ..parts import BlockParts, MlpPart, RelativeAttentionPart
from ..spec import Spec, check_depth, check_fields, check_int, check_ratio, parse_blocks

__all__ = ["AutoFormerBlock", "AutoFormerSpec"]


@final
@dataclass(frozen=True)
class AutoFormerBlock:
    """One block: its heads and the width of its feed-forward network.

    Attributes:
        num_heads: H; 0 for an identity block, which has nothing else.
        mlp_ratio: hidden width of the feed-forward network over the embedding width, rounded down.
        mlp_hidden: the hidden width; give exactly one of `mlp_ratio` and `mlp_hidden`.
        head_dim: D; None for the network's value.

    Raises:
        SpecError: names the field, the value and the bound.

    Source: AutoFormer (arXiv 2107.00651), section 3; identity blocks and free widths: ViTAS (arXiv 2106.13700).
    """

    num_heads: int
    mlp_ratio: float | None = None
    mlp_hidden: int | None = None
    head_dim: int | None = None

    def __post_init__(self) -> None:
        check_int("num_heads", self.num_heads, 0)
        if self.num_heads == 0:
            for name in ("mlp_ratio", "mlp_hidden", "head_dim"):
                object.__setattr__(self, name, None)
            return
        if (self.mlp_ratio is None) == (self.mlp_hidden is None):
            raise SpecError("mlp_ratio and mlp_hidden: exactly one must be given")
        if self.mlp_ratio is not None:
            check_ratio("mlp_ratio", self.mlp_ratio)
        for name in ("mlp_hidden", "head_dim"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1)

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set, as plain values."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AutoFormerBlock:
        """The inverse of `to_dict`. Raises SpecError on an unknown, missing or impossible field."""
        return cls(**check_fields(cls, "block", data))


@final
@dataclass(frozen=True)
class AutoFormerSpec(Spec):
    """A whole network: one embedding width, and for each block its heads and feed-forward width.

    Attributes:
        blocks: one `AutoFormerBlock` per block, first to last.
        embed_dim: C, channels of a token.
        patch_size: side of a square patch, in pixels.
        head_dim: D, width of a head; H * D need not be C.
        max_relative_position: larger distances between patches are clamped to this; None for no relative positions.
        scale_by_embed_dim: divide attention scores by sqrt(C // H) instead of sqrt(D), as ViTAS does.
        block_norm_eps: epsilon of the LayerNorms in the blocks; the final LayerNorm's is 1e-5.

    Raises:
        SpecError: names the block, the field, the value and the bound.
    """

    family: ClassVar[str] = "autoformer"
    block_class: ClassVar[type] = AutoFormerBlock
    leading_genes: ClassVar[tuple[str, ...]] = ("num_heads",)

    blocks: tuple[AutoFormerBlock, ...]
    embed_dim: int
    patch_size: int = 16
    head_dim: int = 64
    max_relative_position: int | None = 14
    scale_by_embed_dim: bool = False
    block_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        check_depth(self.blocks)
        for name in ("embed_dim", "patch_size", "head_dim"):
            check_int(name, getattr(self, name), 1)
        if self.max_relative_position is not None:
            check_int("max_relative_position", self.max_relative_position, 1)
        if not isinstance(self.scale_by_embed_dim, bool):
            raise SpecError(f"scale_by_embed_dim must be true or false, got {self.scale_by_embed_dim!r}")
        check_ratio("block_norm_eps", self.block_norm_eps)
        for index, block in enumerate(self.blocks):
            self._check_block(f"blocks[{index}]", block)

    def _check_block(self, where: str, block: AutoFormerBlock) -> None:
        if not isinstance(block, AutoFormerBlock):
            raise SpecError(f"{where} must be an AutoFormerBlock, got {type(block).__name__}")
        if block.mlp_ratio is not None and int(self.embed_dim * block.mlp_ratio) < 1:
            raise SpecError(f"{where}.mlp_ratio must give at least one channel: {block.mlp_ratio} * {self.embed_dim}")

    def block_parts(self, index: int) -> BlockParts:
        """The parts of block `index`, with their sizes."""
        block, dim = self.blocks[index], self.embed_dim
        if block.num_heads == 0:
            return BlockParts(dim, (), None, self.block_norm_eps)
        attention = RelativeAttentionPart(
            dim,
            block.num_heads,
            block.head_dim or self.head_dim,
            self.max_relative_position,
            dim // block.num_heads if self.scale_by_embed_dim else None,
        )
        hidden = block.mlp_hidden or int(dim * (block.mlp_ratio or 0))
        return BlockParts(dim, (attention,), MlpPart(dim, hidden), self.block_norm_eps)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the family's name; fields at their defaults are left out."""
        data: dict[str, Any] = {"family": self.family, "embed_dim": self.embed_dim}
        for field in dataclasses.fields(self)[2:]:
            if (value := getattr(self, field.name)) != field.default:
                data[field.name] = value
        return data | {"blocks": [block.to_dict() for block in self.blocks]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AutoFormerSpec:
        """The inverse of `to_dict`. Raises SpecError on an unknown, missing or impossible field."""
        fields = check_fields(cls, "spec", data, ("family",))
        if fields.pop("family", cls.family) != cls.family:
            raise SpecError(f"family must be {cls.family}, got {data['family']!r}")
        return cls(**{**fields, "blocks": parse_blocks(fields["blocks"], AutoFormerBlock.from_dict)})
