"""Export a model folder for optimum's ONNX Runtime classes and transformers.js: file, `config.json`, preprocessing.

The file is that of `onnx.py`, with an input named `pixel_values`. `config.json` declares the model as a `vit`, so that
both libraries find a class with this input; they build no layers from it.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glit_models.errors import Argument, ExportError
from glit_models.runs.files import scratch_folder, whole_folder
from glit_models.weights.files import MULTILABEL
from glit_models.weights.folder import to_json

from .metadata import ExportInfo
from .onnx import OnnxArtifact, OnnxOptions, OnnxTarget
from .source import ModelSource
from .targets import Target, register_target

__all__ = ["HuggingFaceOptions", "HuggingFaceTarget"]

# transformers.js's names: `dtype: "fp16"` is model_fp16.onnx, `dtype: "q8"` is model_quantized.onnx.
_FILES = {"fp32": "model.onnx", "fp16": "model_fp16.onnx", "int8": "model_quantized.onnx"}
_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # Pillow's numbers


@dataclass(frozen=True)
class HuggingFaceOptions(OnnxOptions):
    """Options of the exported file; see `OnnxOptions`."""

    input_name: str = "pixel_values"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision not in _FILES:
            raise ExportError(Argument("precision"), f" must be one of {', '.join(_FILES)}, got {self.precision!r}")
        if self.preprocess or self.image_size == "dynamic":
            raise ExportError("these libraries prepare images of one size themselves; leave the preprocessing to them")


@register_target
class HuggingFaceTarget(Target):
    """A folder with `onnx/model.onnx`, `config.json` and `preprocessor_config.json`."""

    name = "huggingface"
    suffix = ""
    is_folder = True
    options = HuggingFaceOptions
    packages = OnnxTarget.packages

    def export(self, source: ModelSource, path: Path, options: HuggingFaceOptions) -> OnnxArtifact:
        """Write the folder; if it does not agree with PyTorch, it is named `PATH.unverified`."""
        name = _FILES[options.precision]
        with scratch_folder(path.with_name(f"{path.name}.export")) as workplace:
            artifact = OnnxTarget().export(source, workplace / name, options)
            holds = artifact.agreement is not None and artifact.agreement.holds
            final = path if holds else path.with_name(f"{path.name}.unverified")
            with whole_folder(final, replace=True) as folder:
                (folder / "onnx").mkdir()
                os.replace(artifact.path, folder / "onnx" / name)
                os.replace(artifact.path.with_name(f"{artifact.path.name}.json"), folder / "report.json")
                (folder / "config.json").write_text(to_json(_config(artifact.info)), encoding="utf-8")
                (folder / "preprocessor_config.json").write_text(
                    to_json(_preprocessor(artifact.info)), encoding="utf-8"
                )
        return replace(artifact, path=final / "onnx" / name)


def _config(info: ExportInfo) -> dict[str, Any]:
    labels = dict(enumerate(info.labels))
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "num_channels": info.input_size[0],
        "image_size": info.input_size[1],
        "patch_size": info.patch_size,
        "id2label": {str(index): label for index, label in labels.items()},
        "label2id": {label: index for index, label in labels.items()},
        **({"problem_type": MULTILABEL} if info.multilabel else {}),
        "glit": info.spec_data,
    }


def _preprocessor(info: ExportInfo) -> dict[str, Any]:
    """timm's preprocessing: scale the shorter side (both for the crop mode 'squash'), crop the center, normalise."""
    _, height, width = info.input_size
    if info.interpolation not in _RESAMPLE:
        raise ExportError(f"{info.source}: these libraries do not resize images by {info.interpolation!r}")
    scaled = (math.floor(height / info.crop_pct), math.floor(width / info.crop_pct))
    if info.crop_mode == "squash":
        size = {"height": scaled[0], "width": scaled[1]}
    elif info.crop_mode == "center" and height == width:
        size = {"shortest_edge": scaled[0]}
    else:
        raise ExportError(
            f"{info.source}: these libraries do not crop as {info.crop_mode!r} does at {height} x {width}"
        )
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": _RESAMPLE[info.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(info.mean),
        "image_std": list(info.std),
    }
