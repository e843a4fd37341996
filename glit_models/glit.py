"""The named GLiT models as timm entry points: specs, default configurations from the weight registry, registration.

timm shows this file's name as the models' module. Where weights lie is `hub.py`'s to know.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from . import hub
from .model import GLiT, checkpoint_filter_fn
from .spec import BlockSpec, GLiTSpec

__all__ = ["GLIT_BASE", "GLIT_SMALL", "GLIT_TINY", "NAMED_SPECS"]


def _global(qkv_ratio: float, mlp_ratio: float) -> BlockSpec:
    return BlockSpec(3, 0, mlp_ratio, qkv_ratio=qkv_ratio)


def _local(kernel_size: int, expand_ratio: int) -> BlockSpec:
    return BlockSpec(0, 3, mlp_ratio=4, kernel_size=kernel_size, expand_ratio=expand_ratio)


def _mixed(mlp_ratio: float) -> BlockSpec:
    return BlockSpec(1, 2, mlp_ratio, qkv_ratio=1, kernel_size=31, expand_ratio=4)


# The architecture of the authors' released checkpoint.
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
# Scaled from Tiny as DeiT is; the paper's own Small and Base are a little smaller and were never released.
GLIT_SMALL = GLIT_TINY.scaled(embed_dim=384, num_heads=6)
GLIT_BASE = GLIT_TINY.scaled(embed_dim=768, num_heads=12)
NAMED_SPECS = {"glit_tiny": GLIT_TINY, "glit_small": GLIT_SMALL, "glit_base": GLIT_BASE}

default_cfgs = generate_default_cfgs({**hub.default_cfgs()})


def _create_glit(variant: str, default_spec: GLiTSpec, pretrained: bool, **kwargs: Any) -> GLiT:
    out_indices = kwargs.pop("out_indices", 3)
    if pretrained:
        kwargs["pretrained_cfg_overlay"] = hub.locate(
            variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay")
        )
    kwargs.setdefault("spec", default_spec)
    return build_model_with_cfg(
        GLiT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **kwargs,
    )


@register_model
def glit_tiny(pretrained: bool = False, **kwargs: Any) -> GLiT:
    """GLiT-Tiny: 7.26 M parameters, 1.47 G multiply-adds at 224 pixels."""
    return _create_glit("glit_tiny", GLIT_TINY, pretrained, **kwargs)


@register_model
def glit_small(pretrained: bool = False, **kwargs: Any) -> GLiT:
    """GLiT-Small: 27.9 M parameters, 5.58 G multiply-adds at 224 pixels."""
    return _create_glit("glit_small", GLIT_SMALL, pretrained, **kwargs)


@register_model
def glit_base(pretrained: bool = False, **kwargs: Any) -> GLiT:
    """GLiT-Base: 109.3 M parameters, 21.7 G multiply-adds at 224 pixels."""
    return _create_glit("glit_base", GLIT_BASE, pretrained, **kwargs)
