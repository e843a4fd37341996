"""Create a model for a timm entry point: timm builds it and loads it from verified weights."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import build_model_with_cfg

from .families import Family, check_layout
from .model import SpecTransformer, checkpoint_filter_fn
from .parts.part import is_from_outside, try_module
from .weights import resolve

__all__ = ["create"]


def create(variant: str, family: Family, pretrained: bool, **kwargs: Any) -> Any:
    """Create the model of a timm entry point, as timm builds and loads it.

    A model of a family from outside the package is run once, so that errors in it appear here.

    Args:
        variant: timm's name of the network, which is the name of the entry point.
        family: the family of the network.
        pretrained: load weights, which the registry finds and verifies.
        kwargs: the keyword arguments of the entry point.

    Raises:
        SpecError: if a model from outside the package fails or does not return one row of logits per image.
        WeightsError: if the weights are missing, damaged, or do not fit.
    """
    out_indices = kwargs.pop("out_indices", 3)
    located = None
    cfg, overlay = kwargs.get("pretrained_cfg"), dict(kwargs.get("pretrained_cfg_overlay") or {})
    if pretrained:
        located = resolve.locate(variant, cfg, overlay)
        overlay = located.overlay
    if (cfg is None or isinstance(cfg, str)) and not (located and located.is_described):
        overlay.setdefault("label_names", None)  # those of the registered weights, which this model does not have
    kwargs["pretrained_cfg_overlay"] = overlay
    kwargs.setdefault("spec", family.named[variant])

    def filter_fn(state_dict: dict[str, Any], model: SpecTransformer) -> dict[str, Any]:
        if located is not None and located.state_dict is not None:
            state_dict = located.state_dict
            cfg: Any = model.pretrained_cfg
            del cfg["state_dict"]  # the placeholder
            if located.source is not None:
                cfg["source"] = located.source
        try:
            return checkpoint_filter_fn(state_dict, model, kwargs.get("pretrained_strict", True))
        except Exception:
            check_layout(state_dict.get("model", state_dict), family)  # gives a better reason, if it fails
            raise

    model = build_model_with_cfg(
        family.model,
        variant,
        pretrained,
        pretrained_filter_fn=filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **kwargs,
    )
    if is_from_outside(family.model) and isinstance(model, SpecTransformer):  # not with timm's `features_only`
        _try(model, family)
    return model


def _try(model: SpecTransformer, family: Family) -> None:
    """Run the model on two images. Raises SpecError, which names the family."""
    weight = model.pos_embed
    if weight.is_meta or model.num_classes == 0 or model.global_pool == "":
        return
    images = torch.zeros(2, model.in_chans, *model.patch_embed.img_size, device=weight.device, dtype=weight.dtype)
    try_module(f"family {family.name!r}: its model", model, images, (2, model.num_classes))
