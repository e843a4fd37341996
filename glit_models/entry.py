"""What timm entry points of every family share: the model, built by timm and loaded from verified weights."""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg

from .families import Family, check_layout
from .model import SpecTransformer, checkpoint_filter_fn
from .weights import resolve

__all__ = ["create"]


def create(variant: str, family: Family, pretrained: bool, **kwargs: Any) -> Any:
    """What a timm entry point of a family returns: the model, built and loaded as timm does.

    Args:
        variant: timm's name of the network, which is the entry point's name.
        family: the family that the network belongs to.
        pretrained: load weights, which the registry finds and verifies.
        kwargs: the entry point's.
    """
    out_indices = kwargs.pop("out_indices", 3)
    if pretrained:
        kwargs["pretrained_cfg_overlay"] = resolve.locate(
            variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay")
        )
    kwargs.setdefault("spec", family.named[variant])

    def filter_fn(state_dict: dict[str, Any], model: SpecTransformer) -> dict[str, Any]:
        check_layout(state_dict.get("model", state_dict), family)
        return checkpoint_filter_fn(state_dict, model)

    return build_model_with_cfg(
        family.model,
        variant,
        pretrained,
        pretrained_filter_fn=filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **kwargs,
    )
