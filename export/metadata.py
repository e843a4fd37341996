"""What an exported file says of itself: where it comes from, what it takes and what it gives.

It turns that into the texts that ONNX keeps beside a graph and back; it opens no file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from glit_models.errors import ExportError

__all__ = ["INPUT", "OUTPUT", "PREFIX", "ExportInfo", "Precision"]

Precision = Literal["fp32", "fp16", "bf16", "int8"]
INPUT, OUTPUT = "images", "logits"
PREFIX = "glit."


@dataclass(frozen=True)
class ExportInfo:
    """What stands in the file, each field as JSON under `glit.<field>`.

    Attributes:
        source: the model's name or folder's name. sha256: of its weights file, or of its state as safetensors.
        package_version: of glit-models when it was exported.
        opset: of the graph. precision: of its arithmetic.
        batch: images at a time, None for any number.
        input_size: channels, height, width; of `dynamic_size`, the size that the model was trained at.
        dynamic_size: whether any height and width that `patch_size` divides will do.
        preprocess: whether the input is uint8 pictures [B, h, w, C] of any size rather than prepared images
            [B, C, H, W].
        mean, std, interpolation, crop_pct, crop_mode: timm's preprocessing.
        num_classes: outputs. class_names: theirs, if they have any.
    """

    source: str
    sha256: str
    package_version: str
    opset: int
    precision: Precision
    batch: int | None
    input_size: tuple[int, int, int]
    dynamic_size: bool
    patch_size: int
    preprocess: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str
    num_classes: int
    class_names: tuple[str, ...] | None

    def to_texts(self) -> dict[str, str]:
        """Keys and values as ONNX keeps them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {PREFIX + name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}

    @classmethod
    def from_texts(cls, texts: Mapping[str, str], where: str) -> ExportInfo:
        """Read back what `to_texts` wrote. `where` is what to call the file.

        Raises:
            ExportError: if the file is not one of ours, or a field is missing or damaged; names it.
        """
        names = [field.name for field in fields(cls)]
        if not any(key.startswith(PREFIX) for key in texts):
            raise ExportError(f"{where}: not exported by glit-models; `glit export` makes such files")
        values: dict[str, Any] = {}
        for name in names:
            if PREFIX + name not in texts:
                raise ExportError(f"{where}: its metadata lacks {PREFIX + name!r}; export it again")
            try:
                value = json.loads(texts[PREFIX + name])
            except ValueError:
                raise ExportError(f"{where}: its metadata {PREFIX + name!r} is damaged; export it again") from None
            values[name] = tuple(value) if isinstance(value, list) else value
        return cls._checked(values, where)

    @classmethod
    def _checked(cls, values: dict[str, Any], where: str) -> ExportInfo:
        size, names, count = values["input_size"], values["class_names"], values["num_classes"]
        sound = {
            "input_size": isinstance(size, tuple) and len(size) == 3 and all(type(n) is int and n > 0 for n in size),
            "num_classes": type(count) is int and count > 0,
            "class_names": names is None or (isinstance(names, tuple) and len(names) == count),
            "batch": values["batch"] is None or (type(values["batch"]) is int and values["batch"] > 0),
            "precision": values["precision"] in ("fp32", "fp16", "bf16", "int8"),
            "mean": isinstance(values["mean"], tuple),
            "std": isinstance(values["std"], tuple),
        }
        for name, good in sound.items():
            if not good:
                raise ExportError(f"{where}: its metadata {PREFIX + name!r} is damaged; export it again")
        return cls(**values)

    @property
    def labels(self) -> tuple[str, ...]:
        """The class names, or numbers where there are none."""
        return self.class_names or tuple(map(str, range(self.num_classes)))

    @property
    def data_config(self) -> dict[str, Any]:
        """What `timm.data.create_transform` takes to prepare a picture."""
        return {
            "input_size": self.input_size,
            "mean": self.mean,
            "std": self.std,
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
            "crop_mode": self.crop_mode,
        }
