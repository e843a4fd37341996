"""A custom family: plain vision transformers whose blocks choose their heads and feed-forward width."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from timm.models import generate_default_cfgs, register_model

from glit_models import Family, Spec, SpecError, SpecTransformer, create, register_family
from glit_models.parts import AttentionPart, BlockParts, MlpPart

__all__ = ["plain_nano"]


@dataclass(frozen=True)
class PlainBlock:
    """A block with heads of 16 channels."""

    num_heads: int
    mlp_ratio: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class PlainSpec(Spec):
    """A plain vision transformer."""

    family: ClassVar[str] = "plain"
    block_class: ClassVar[type] = PlainBlock

    blocks: tuple[PlainBlock, ...]
    embed_dim: int
    patch_size: int = 8

    def __post_init__(self) -> None:
        for index, block in enumerate(self.blocks):
            if block.num_heads < 1:
                raise SpecError(f"blocks[{index}].num_heads must be at least 1, got {block.num_heads}")

    def block_parts(self, index: int) -> BlockParts:
        block, dim = self.blocks[index], self.embed_dim
        return BlockParts(dim, (AttentionPart(dim, block.num_heads, 16),), MlpPart(dim, int(dim * block.mlp_ratio)))

    def to_dict(self) -> dict[str, Any]:
        return {"family": self.family, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "PlainSpec":
        fields = {key: value for key, value in data.items() if key != "family"}
        return cls(**{**fields, "blocks": tuple(PlainBlock(**block) for block in fields["blocks"])})


class Plain(SpecTransformer):
    """Any network that a `PlainSpec` describes."""

    spec_class = PlainSpec


NANO = PlainSpec(blocks=(PlainBlock(2, 2), PlainBlock(3, 4)), embed_dim=48)
FAMILY = register_family(Family(name="plain", spec=PlainSpec, model=Plain, named={"plain_nano": NANO}))
default_cfgs = generate_default_cfgs(
    {"plain_nano": {"input_size": (3, 32, 32), "first_conv": "patch_embed.proj", "classifier": "head"}}
)


@register_model
def plain_nano(pretrained: bool = False, **kwargs: Any) -> Plain:
    """Two blocks of 48 channels."""
    return create("plain_nano", FAMILY, pretrained, **kwargs)
