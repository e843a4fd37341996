"""timm entry points of the AutoFormer family, including ViTAS's networks.

timm uses this module's name as the module of its models.
"""

from __future__ import annotations

from typing import Any

from timm.models import generate_default_cfgs, register_model

from ..entry import create
from ..weights import resolve
from .checkpoint import convert_autoformer_state_dict
from .named import (
    AUTOFORMER_BASE,
    AUTOFORMER_SMALL,
    AUTOFORMER_TINY,
    FAMILY,
    VITAS_A,
    VITAS_B,
    VITAS_C,
    VITAS_E,
    VITAS_F,
    AutoFormer,
)
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
    "AutoFormerBlock",
    "AutoFormerSpec",
    "convert_autoformer_state_dict",
]

default_cfgs = generate_default_cfgs(resolve.default_cfgs(FAMILY))


@register_model
def autoformer_tiny(pretrained: bool = False, **kwargs: Any) -> AutoFormer:
    """AutoFormer-T: 5.87 M parameters, 1.48 G multiply-adds at 224 pixels."""
    return create("autoformer_tiny", FAMILY, pretrained, **kwargs)


@register_model
def autoformer_small(pretrained: bool = False, **kwargs: Any) -> AutoFormer:
    """AutoFormer-S: 22.9 M parameters, 5.16 G multiply-adds at 224 pixels."""
    return create("autoformer_small", FAMILY, pretrained, **kwargs)


@register_model
def autoformer_base(pretrained: bool = False, **kwargs: Any) -> AutoFormer:
    """AutoFormer-B: 53.7 M parameters, 11.7 G multiply-adds at 224 pixels."""
    return create("autoformer_base", FAMILY, pretrained, **kwargs)


def _create_vitas(variant: str, pretrained: bool, **kwargs: Any) -> AutoFormer:
    """Create a ViTAS network; unlike AutoFormer's, its head uses the class token."""
    kwargs.setdefault("global_pool", "token")
    return create(variant, FAMILY, pretrained, **kwargs)


@register_model
def vitas_a(pretrained: bool = False, **kwargs: Any) -> AutoFormer:
    """ViTAS-A: 3.68 M parameters, 0.833 G multiply-adds at 224 pixels."""
    return _create_vitas("vitas_a", pretrained, **kwargs)


@register_model
def vitas_b(pretrained: bool = False, **kwargs: Any) -> AutoFormer:
    """ViTAS-B: 4.40 M parameters, 0.959 G multiply-adds at 224 pixels."""
    return _create_vitas("vitas_b", pretrained, **kwargs)


@register_model
def vitas_c(pretrained: bool = False, **kwargs: Any) -> AutoFormer:
    """ViTAS-C: 6.05 M parameters, 1.27 G multiply-adds at 224 pixels."""
    return _create_vitas("vitas_c", pretrained, **kwargs)


@register_model
def vitas_e(pretrained: bool = False, **kwargs: Any) -> AutoFormer:
    """ViTAS-E: 12.6 M parameters, 2.65 G multiply-adds at 224 pixels."""
    return _create_vitas("vitas_e", pretrained, **kwargs)


@register_model
def vitas_f(pretrained: bool = False, **kwargs: Any) -> AutoFormer:
    """ViTAS-F: 22.5 M parameters, 4.90 G multiply-adds at 224 pixels."""
    return _create_vitas("vitas_f", pretrained, **kwargs)
