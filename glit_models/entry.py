"""What timm entry points of every family share: the model, built by timm and loaded from verified weights."""

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
    """What a timm entry point of a family returns: the model, built and loaded as timm does.

    A model of a family from outside the package is tried once, so that a mistake in it is found here.

    Args:
        variant: timm's name of the network, which is the entry point's name.
        family: the family that the network belongs to.
        pretrained: load weights, which the registry finds and verifies.
        kwargs: the entry point's.

    Raises:
        SpecError: if a model from outside the package fails or returns other than one row of logits an image.
        WeightsError: if the weights are missing, damaged, or do not fit.
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

    model = build_model_with_cfg(
        family.model,
        variant,
        pretrained,
        pretrained_filter_fn=filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **kwargs,
    )
    if is_from_outside(family.model) and isinstance(model, SpecTransformer):  # what timm's `features_only` gives is not
        _try(model, family)
    return model


def _try(model: SpecTransformer, family: Family) -> None:
    """Run the model on two images. Raises SpecError, which names the family."""
    weight = model.pos_embed
    if weight.is_meta or model.num_classes == 0 or model.global_pool == "":
        return
    images = torch.zeros(2, model.in_chans, *model.patch_embed.img_size, device=weight.device, dtype=weight.dtype)
    try_module(f"family {family.name!r}: its model", model, images, (2, model.num_classes))
