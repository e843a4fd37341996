"""Entry points for `torch.hub`: `torch.hub.load(DIRECTORY, "glit_tiny", source="local", pretrained=True)`.

Works from a plain checkout that is not installed; `glit_models` defines the models and their weights.
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


def autoformer_tiny(pretrained: bool = False, tag: str | None = None, **kwargs: Any) -> _nn.Module:
    """AutoFormer-T: 5.87 M parameters, 1.48 G multiply-adds at 224 pixels. Arguments as for `glit_tiny`."""
    return _create("autoformer_tiny", pretrained, tag, kwargs)


def autoformer_small(pretrained: bool = False, tag: str | None = None, **kwargs: Any) -> _nn.Module:
    """AutoFormer-S: 22.9 M parameters, 5.16 G multiply-adds at 224 pixels. Arguments as for `glit_tiny`."""
    return _create("autoformer_small", pretrained, tag, kwargs)


def autoformer_base(pretrained: bool = False, tag: str | None = None, **kwargs: Any) -> _nn.Module:
    """AutoFormer-B: 53.7 M parameters, 11.7 G multiply-adds at 224 pixels. Arguments as for `glit_tiny`."""
    return _create("autoformer_base", pretrained, tag, kwargs)


def vitas_a(pretrained: bool = False, tag: str | None = None, **kwargs: Any) -> _nn.Module:
    """ViTAS-A: 3.68 M parameters, 0.833 G multiply-adds at 224 pixels. Arguments as for `glit_tiny`."""
    return _create("vitas_a", pretrained, tag, kwargs)


def vitas_b(pretrained: bool = False, tag: str | None = None, **kwargs: Any) -> _nn.Module:
    """ViTAS-B: 4.40 M parameters, 0.959 G multiply-adds at 224 pixels. Arguments as for `glit_tiny`."""
    return _create("vitas_b", pretrained, tag, kwargs)


def vitas_c(pretrained: bool = False, tag: str | None = None, **kwargs: Any) -> _nn.Module:
    """ViTAS-C: 6.05 M parameters, 1.27 G multiply-adds at 224 pixels. Arguments as for `glit_tiny`."""
    return _create("vitas_c", pretrained, tag, kwargs)


def vitas_e(pretrained: bool = False, tag: str | None = None, **kwargs: Any) -> _nn.Module:
    """ViTAS-E: 12.6 M parameters, 2.65 G multiply-adds at 224 pixels. Arguments as for `glit_tiny`."""
    return _create("vitas_e", pretrained, tag, kwargs)


def vitas_f(pretrained: bool = False, tag: str | None = None, **kwargs: Any) -> _nn.Module:
    """ViTAS-F: 22.5 M parameters, 4.90 G multiply-adds at 224 pixels. Arguments as for `glit_tiny`."""
    return _create("vitas_f", pretrained, tag, kwargs)
