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
    located = None
    if pretrained:
        located = resolve.locate(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
        kwargs["pretrained_cfg_overlay"] = located.overlay
    kwargs.setdefault("spec", family.named[variant])

    def filter_fn(state_dict: dict[str, Any], model: SpecTransformer) -> dict[str, Any]:
        if located is not None and located.state_dict is not None:
            state_dict = located.state_dict
            cfg: Any = model.pretrained_cfg
            del cfg["state_dict"]  # the stand-in
            if located.source is not None:
                cfg["source"] = located.source
        try:
            return checkpoint_filter_fn(state_dict, model)
        except Exception:
            check_layout(state_dict.get("model", state_dict), family)  # has the better reason, if it has one
            raise

    return build_model_with_cfg(
        family.model,
        variant,
        pretrained,
        pretrained_filter_fn=filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **kwargs,
    )
