"""Load the model to export, by name or folder or as given, with the hash of its weights.

Other modules export it.
"""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
from timm.data import resolve_data_config
from torch import nn

import glit_models
from glit_models import SpecTransformer
from glit_models.errors import ExportError
from glit_models.weights.files import MULTILABEL
from glit_models.weights.loading import is_other_model, load_model

from .form import resize
from .metadata import ExportInfo, Precision

__all__ = ["ImageSize", "ModelSource", "open_source"]

ImageSize = tuple[int, int] | Literal["dynamic"] | None


@dataclass(frozen=True, eq=False)
class ModelSource:
    """A timm classifier, in float32 on the CPU and in evaluation mode, with its name and the sha256 of its weights."""

    model: Any
    name: str
    sha256: str

    def at_size(self, image_size: tuple[int, int] | None) -> Any:
        """A copy of the model for images of this height and width; None keeps the model's size.

        Raises:
            SpecError: if the size is not a multiple of the patch size.
        """
        model = copy.deepcopy(self.model)
        resize(model, image_size)
        return model

    def describe(
        self, opset: int, precision: Precision, batch: int | None, image_size: ImageSize, preprocess: bool
    ) -> ExportInfo:
        """The metadata of the exported file.

        Raises:
            ExportError: if the model's preprocessing is unknown.
        """
        model = self.model
        cfg = _pretrained_cfg(model, self.name)
        config = resolve_data_config(pretrained_cfg=cfg, model=model)
        embed = getattr(model, "patch_embed", None)
        channels, *sides = config["input_size"]
        own = tuple(getattr(embed, "img_size", None) or sides)
        channels = getattr(model, "in_chans", channels)
        size = own if image_size in (None, "dynamic") else image_size
        spec = model.spec if isinstance(model, SpecTransformer) else None
        names = cfg.get("label_names") or ()
        return ExportInfo(
            source=self.name,
            sha256=self.sha256,
            package_version=glit_models.__version__,
            opset=opset,
            precision=precision,
            batch=batch,
            input_size=(channels, *size),
            dynamic_size=image_size == "dynamic",
            patch_size=spec.patch_size if spec else (getattr(embed, "patch_size", None) or (1,))[0],
            preprocess=preprocess,
            mean=_per_channel(config["mean"], channels),
            std=_per_channel(config["std"], channels),
            interpolation=config["interpolation"],
            crop_pct=float(config["crop_pct"]),
            crop_mode=config.get("crop_mode") or "center",
            multilabel=getattr(model, "problem_type", None) == MULTILABEL,
            num_classes=model.num_classes,
            class_names=tuple(names) if len(names) == model.num_classes else None,
            spec_data={"family": spec.family, **json.loads(spec.to_json())} if spec else None,
        )


def open_source(model: nn.Module | ModelSource | str | Path) -> ModelSource:
    """Load the model to export.

    Args:
        model: any timm classifier, which is not changed; 'model.tag', a weight folder, or a Hub repository; a
            `ModelSource` is returned unchanged.

    Raises:
        WeightsError: if there are no such weights, they are damaged, or do not fit the configuration.
        ExportError: if the model has no head.
    """
    if isinstance(model, ModelSource):
        return model
    if isinstance(model, (str, Path)):
        loaded = load_model(model, any_timm=is_other_model(model))
        name = _local_name(Path(model).resolve()) if Path(model).exists() else loaded.name
        source = ModelSource(loaded.model, name, loaded.sha256 or _sha256_of_state(loaded.model))
    elif isinstance(model, nn.Module) and hasattr(model, "num_classes"):
        own = copy.deepcopy(model).cpu().float().eval()
        source = ModelSource(own, _given_name(model), _sha256_of_state(own))
    else:
        raise ExportError(f"{type(model).__name__} is not a model that timm.create_model made")
    if source.model.num_classes < 1:
        raise ExportError(f"{source.name} has no head, so there are no logits to export; give it num_classes")
    if getattr(source.model, "global_pool", None) == "":
        raise ExportError(f"{source.name} does not pool its tokens; give it global_pool='token' or 'avg'")
    _check_finite(source)
    return source


def _local_name(folder: Path) -> str:
    """The name of a weight folder; in a run's folder: RUN/model."""
    return f"{folder.parent.name}/model" if folder.name == "model" else folder.name


def _sha256_of_state(model: nn.Module) -> str:
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    return hashlib.sha256(safetensors.torch.save(state)).hexdigest()


def _check_finite(source: ModelSource) -> None:
    for name, tensor in source.model.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ExportError(f"{source.name}: {name!r} holds values that are not finite; it cannot be exported")


def _given_name(model: nn.Module) -> str:
    """The name of the architecture, without the tag, whose weights may be others; the hash identifies the weights."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return str(cfg.get("architecture") or getattr(getattr(model, "spec", model), "family", type(model).__name__))


def _pretrained_cfg(model: nn.Module, name: str) -> dict[str, Any]:
    cfg = getattr(model, "pretrained_cfg", None)
    if cfg is None:
        raise ExportError(f"{name}: its preprocessing is not known; make it with timm.create_model")
    return dict(cfg)


def _per_channel(values: Any, channels: int) -> tuple[float, ...]:
    """One value per channel; a model with other than three channels uses the first one, as timm's transform does."""
    values = tuple(float(value) for value in values)
    return values if len(values) in (1, channels) else values[:1] * channels
