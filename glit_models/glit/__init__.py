"""timm entry points of the GLiT family. timm uses this module's name as the module of its models."""

from __future__ import annotations

from typing import Any

from timm.models import generate_default_cfgs, register_model

from ..entry import create
from ..weights import resolve
from .checkpoint import convert_official_state_dict
from .named import FAMILY, GLIT_BASE, GLIT_SMALL, GLIT_TINY, GLiT
from .spec import BlockSpec, GLiTSpec

__all__ = [
    "FAMILY",
    "GLIT_BASE",
    "GLIT_SMALL",
    "GLIT_TINY",
    "BlockSpec",
    "GLiT",
    "GLiTSpec",
    "convert_official_state_dict",
]

default_cfgs = generate_default_cfgs(resolve.default_cfgs(FAMILY))


@register_model
def glit_tiny(pretrained: bool = False, **kwargs: Any) -> GLiT:
    """GLiT-Tiny: 7.26 M parameters, 1.47 G multiply-adds at 224 pixels."""
    return create("glit_tiny", FAMILY, pretrained, **kwargs)


@register_model
def glit_small(pretrained: bool = False, **kwargs: Any) -> GLiT:
    """GLiT-Small: 27.9 M parameters, 5.58 G multiply-adds at 224 pixels."""
    return create("glit_small", FAMILY, pretrained, **kwargs)


@register_model
def glit_base(pretrained: bool = False, **kwargs: Any) -> GLiT:
    """GLiT-Base: 109.3 M parameters, 21.7 G multiply-adds at 224 pixels."""
    return create("glit_base", FAMILY, pretrained, **kwargs)
