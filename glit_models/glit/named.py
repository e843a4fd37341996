"""GLiT's model class, its named networks, and the family's entry in the table of families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..families import Family, register_family
from ..model import SpecTransformer
from ..spec import Spec
from .checkpoint import convert_official_state_dict, is_official
from .spec import BlockSpec, GLiTSpec

__all__ = ["FAMILY", "GLIT_BASE", "GLIT_SMALL", "GLIT_TINY", "GLiT"]


class GLiT(SpecTransformer):
    """Global-Local image Transformer (arXiv 2107.02960): any network that a `GLiTSpec` describes.

    See `SpecTransformer` for the arguments.
    """

    spec_class = GLiTSpec

    @staticmethod
    def is_foreign(state_dict: Mapping[str, Any]) -> bool:
        """Whether a state dict is in the layout of the authors' code."""
        return is_official(state_dict)

    @staticmethod
    def convert_foreign(state_dict: Mapping[str, Any], spec: Any) -> dict[str, Tensor]:
        """See `convert_official_state_dict`."""
        return convert_official_state_dict(state_dict)


def _global(qkv_ratio: float, mlp_ratio: float) -> BlockSpec:
    return BlockSpec(3, 0, mlp_ratio, qkv_ratio=qkv_ratio)


def _local(kernel_size: int, expand_ratio: int) -> BlockSpec:
    return BlockSpec(0, 3, mlp_ratio=4, kernel_size=kernel_size, expand_ratio=expand_ratio)


def _mixed(mlp_ratio: float) -> BlockSpec:
    return BlockSpec(1, 2, mlp_ratio, qkv_ratio=1, kernel_size=31, expand_ratio=4)


# The architecture of the checkpoint that the authors released.
GLIT_TINY = GLiTSpec(
    blocks=(
        _global(0.5, 4),
        _local(31, 2),
        _mixed(6),
        _global(1, 4),
        _local(45, 4),
        _mixed(6),
        _global(1, 2),
        _mixed(2),
        _local(45, 4),
        _global(1, 4),
        _local(31, 4),
        _global(2, 6),
    ),
    embed_dim=192,
    num_heads=3,
)
"""The network of the checkpoint that the authors released: width 192, 12 blocks."""
GLIT_SMALL = GLIT_TINY.scaled(embed_dim=384, num_heads=6)
"""GLiT-Tiny scaled as DeiT-S is: width 384, 6 heads. The paper's GLiT-Small is smaller and was never released."""
GLIT_BASE = GLIT_TINY.scaled(embed_dim=768, num_heads=12)
"""GLiT-Tiny scaled as DeiT-B is: width 768, 12 heads. The paper's GLiT-Base is smaller and was never released."""


def _references(depth: int, embed_dim: int, network: Mapping[str, Any]) -> dict[str, Spec]:
    """DeiT's blocks, and GLiT-Tiny's blocks if the depth is the same."""
    num_heads = network["num_heads"]
    all_global = BlockSpec(num_heads, 0, mlp_ratio=4, qkv_ratio=1)
    references: dict[str, Spec] = {"all global, as DeiT": GLiTSpec((all_global,) * depth, embed_dim, **network)}
    if depth == GLIT_TINY.depth and num_heads % GLIT_TINY.num_heads == 0:
        scaled = GLIT_TINY.scaled(embed_dim, num_heads)
        references["GLiT-Tiny's blocks"] = GLiTSpec(scaled.blocks, embed_dim, **network)
    return references


FAMILY = register_family(
    Family(
        name="glit",
        spec=GLiTSpec,
        model=GLiT,
        named={"glit_tiny": GLIT_TINY, "glit_small": GLIT_SMALL, "glit_base": GLIT_BASE},
        references=_references,
        summary="GLiT, a vision transformer whose blocks divide their heads between global self-attention and local "
        "convolution, as an architecture search chose",
        paper="arXiv:2107.02960",
        authors_url="https://github.com/bychen515/GLiT",
        citation="""@inproceedings{chen2021glit,
  title     = {{GLiT}: Neural Architecture Search for Global and Local Image Transformer},
  author    = {Chen, Boyu and Li, Peixia and Li, Chuming and Li, Baopu and Bai, Lei and Lin, Chen and Sun, Ming and
               Yan, Junjie and Ouyang, Wanli},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)},
  pages     = {12--21},
  year      = {2021}
}""",
    )
)
