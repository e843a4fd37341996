"""AutoFormer's model class, the named AutoFormer and ViTAS networks, and the entry in the table of families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..families import Family, Paper, register_family
from ..model import SpecTransformer
from ..spec import Spec
from .checkpoint import convert_autoformer_state_dict, is_autoformer
from .spec import AutoFormerBlock, AutoFormerSpec

__all__ = [
    "AUTOFORMER_BASE",
    "AUTOFORMER_SMALL",
    "AUTOFORMER_TINY",
    "FAMILY",
    "VITAS_A",
    "VITAS_B",
    "VITAS_C",
    "VITAS_E",
    "VITAS_F",
    "AutoFormer",
]


class AutoFormer(SpecTransformer):
    """AutoFormer (arXiv 2107.00651): any network that an `AutoFormerSpec` describes.

    The head sees the mean of the patch tokens, taken after the final LayerNorm over all tokens. ViTAS's networks use
    the class token instead: their entry points, such as `vitas_c`, set `global_pool="token"`.

    Args:
        spec: a spec of the family, a dict of its fields, or the path of a JSON file.
        global_pool: 'avg' (mean of the patch tokens), 'token' (class token) or '' (all tokens).
        fc_norm: normalise after pooling instead of before; None means only with 'avg'.
        kwargs: see `SpecTransformer`.
    """

    spec_class = AutoFormerSpec
    norm_eps = 1e-5

    def __init__(self, spec: Any, *, global_pool: str = "avg", fc_norm: bool | None = False, **kwargs: Any) -> None:
        super().__init__(spec, global_pool=global_pool, fc_norm=fc_norm, **kwargs)

    @staticmethod
    def is_foreign(state_dict: Mapping[str, Any]) -> bool:
        """See `is_autoformer`."""
        return is_autoformer(state_dict)

    @staticmethod
    def convert_foreign(state_dict: Mapping[str, Any], spec: AutoFormerSpec) -> dict[str, Tensor]:
        """See `convert_autoformer_state_dict`."""
        return convert_autoformer_state_dict(state_dict, spec)


def _autoformer(embed_dim: int, heads: str, mlp_ratios: str) -> AutoFormerSpec:
    """Build a network from the tables in the authors' configuration files, one value per block."""
    pairs = zip(heads.split(), mlp_ratios.split(), strict=True)
    return AutoFormerSpec(tuple(AutoFormerBlock(int(h), float(ratio)) for h, ratio in pairs), embed_dim)


def _vitas(embed_dim: int, blocks: str) -> AutoFormerSpec:
    """Build a ViTAS network. Each block lists heads, total width of queries, keys and values, and hidden width.

    '-' stands for an identity block.
    """
    made = []
    for block in blocks.split():
        if block == "-":
            made.append(AutoFormerBlock(0))
            continue
        heads, qkv_width, hidden = map(int, block.split(","))
        made.append(AutoFormerBlock(heads, mlp_hidden=hidden, head_dim=qkv_width // (3 * heads)))
    return AutoFormerSpec(
        tuple(made), embed_dim, max_relative_position=None, scale_by_embed_dim=True, block_norm_eps=1e-6
    )


AUTOFORMER_TINY = _autoformer(
    192,
    "3 3 3 3 3 3 3 3 3 3 4 3 3",
    "3.5 3.5 3.0 3.5 3.0 3.0 4.0 4.0 3.5 4.0 3.5 4.0 3.5",
)
"""AutoFormer-T as its authors released it."""
AUTOFORMER_SMALL = _autoformer(
    384,
    "6 6 5 7 5 5 5 6 6 7 7 6 7",
    "3.0 3.5 3.0 3.5 4.0 4.0 4.0 4.0 4.0 4.0 4.0 3.5 4.0",
)
"""AutoFormer-S as its authors released it."""
AUTOFORMER_BASE = _autoformer(
    576,
    "9 9 9 9 9 10 9 9 10 9 10 9 9 10",
    "3.5 3.5 4.0 3.5 4.0 3.5 3.5 3.0 4.0 4.0 3.0 4.0 3.0 3.5",
)
"""AutoFormer-B as its authors released it."""
# The networks that ViTAS's authors retrained; there is no D among them.
VITAS_A = _vitas(
    154, "12,288,1008 16,720,576 - - 6,288,1296 16,1008,720 - 16,1152,1008 - - - - 16,864,1152 16,1440,1296 -"
)
"""ViTAS-A, as its authors' repository lists it."""
VITAS_B = _vitas(
    192,
    "16,288,864 - - 16,432,576 - 16,432,1008 - - 12,1152,864 12,1008,720 - 12,864,576 16,432,1296 - - 6,864,864",
)
"""ViTAS-B, as its authors' repository lists it."""
VITAS_C = _vitas(230, " ".join(["3,432,720"] * 12))
"""ViTAS-C, as its authors' repository lists it."""
VITAS_E = _vitas(
    346,
    "16,720,720 - 16,1008,864 - 16,864,1008 6,864,1008 - 3,576,720 - 12,1296,1296 6,1296,1152 12,720,144 - "
    "12,1440,864 6,576,1008 12,1152,1296",
)
"""ViTAS-E, as its authors' repository lists it."""
VITAS_F = _vitas(
    307,
    "16,864,1728 16,288,2304 16,1728,864 16,1152,2016 16,2016,864 16,1440,1440 16,2592,2304 16,1440,2016 "
    "16,2304,864 16,2016,576 16,2016,2016 16,1440,2304 16,1728,2304",
)
"""ViTAS-F, as its authors' repository lists it."""

_VITAS: dict[str, Spec] = {
    "vitas_a": VITAS_A, "vitas_b": VITAS_B, "vitas_c": VITAS_C, "vitas_e": VITAS_E, "vitas_f": VITAS_F,
}  # fmt: skip
_VITAS_PAPER = Paper(
    "arXiv:2106.13700",
    "https://github.com/xiusu/ViTAS",
    """@article{su2021vitas,
  title   = {{ViTAS}: Vision Transformer Architecture Search},
  author  = {Su, Xiu and others},
  journal = {arXiv preprint arXiv:2106.13700},
  year    = {2021}
}""",
    "ViTAS, a vision transformer whose widths and numbers of heads an architecture search chose for each block",
)

FAMILY = register_family(
    Family(
        name="autoformer",
        spec=AutoFormerSpec,
        model=AutoFormer,
        named={
            "autoformer_tiny": AUTOFORMER_TINY,
            "autoformer_small": AUTOFORMER_SMALL,
            "autoformer_base": AUTOFORMER_BASE,
            **_VITAS,
        },
        paper="arXiv:2107.00651",
        authors_url="https://github.com/microsoft/Cream/tree/main/AutoFormer",
        citation="""@inproceedings{chen2021autoformer,
  title     = {{AutoFormer}: Searching Transformers for Visual Recognition},
  author    = {Chen, Minghao and Peng, Houwen and Fu, Jianlong and Ling, Haibin},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)},
  pages     = {12270--12280},
  year      = {2021}
}""",
        summary="AutoFormer, a vision transformer whose blocks have heads and hidden widths of their own, as an "
        "architecture search chose",
        papers=dict.fromkeys(_VITAS, _VITAS_PAPER),
    )
)
