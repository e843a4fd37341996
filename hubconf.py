"""Entry points for `torch.hub`: `torch.hub.load(DIRECTORY, "glit_tiny", source="local", pretrained=True)`.

Works from a plain checkout that is not installed; what the models are, and their weights, is `glit_models`' to know.
"""

from typing import Any

import timm as _timm
from torch import nn as _nn

import glit_models as _glit_models  # noqa: F401  (registers the models in timm)

dependencies = ["torch", "timm"]


def _create(name: str, pretrained: bool, tag: str | None, kwargs: dict[str, Any]) -> _nn.Module:
    return _timm.create_model(f"{name}.{tag}" if tag else name, pretrained=pretrained, **kwargs)


def glit_tiny(pretrained: bool = False, tag: str | None = None, **kwargs: Any) -> _nn.Module:
    """GLiT-Tiny: 7.26 M parameters, 1.47 G multiply-adds at 224 pixels.

    Args:
        pretrained: load the weights `glit_tiny.TAG`.
        tag: which weights and classes, for example 'fashion_mnist'; None for the default: GLiT-Tiny's is 'fractal1k'.
        kwargs: passed on to `timm.create_model`.
    """
    return _create("glit_tiny", pretrained, tag, kwargs)


def glit_small(pretrained: bool = False, tag: str | None = None, **kwargs: Any) -> _nn.Module:
    """GLiT-Small: 27.9 M parameters, 5.58 G multiply-adds at 224 pixels. Arguments as for `glit_tiny`."""
    return _create("glit_small", pretrained, tag, kwargs)


def glit_base(pretrained: bool = False, tag: str | None = None, **kwargs: Any) -> _nn.Module:
    """GLiT-Base: 109.3 M parameters, 21.7 G multiply-adds at 224 pixels. Arguments as for `glit_tiny`."""
    return _create("glit_base", pretrained, tag, kwargs)
