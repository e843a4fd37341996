"""The metadata of an exported file: its source, its inputs and its outputs.

Converts the metadata to and from the strings that ONNX stores with a graph; opens no file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import Argument, ExportError
from ..preprocessing import is_count, preprocessing_problem
from .extras import require

if TYPE_CHECKING:
    from ..spec import Spec

__all__ = ["INPUT", "OUTPUT", "PREFIX", "SMALLER_BATCH", "ExportInfo", "Precision", "check_batch"]

Precision = Literal["fp32", "fp16", "bf16", "int8"]
_BATCH = 32  # batch size for a file that takes any number of images
INPUT, OUTPUT = "images", "logits"
PREFIX = "glit."
_MAX_CHARS = 1 << 23  # per field; the names of 100,000 classes take a quarter
_MAX_BATCH = 100_000
SMALLER_BATCH = ("take a smaller ", Argument("batch"), " or ", Argument("image_size"))  # the end of a message
_MAX_SPEC_CHARS = 1 << 20  # a network of 100 blocks takes 15,000


def check_batch(batch: int | None) -> None:
    """Raise ExportError unless a file can take batches of this size; None is any size."""
    if batch is not None and not 1 <= batch <= _MAX_BATCH:
        bound = f" must be from 1 to {_MAX_BATCH}, or None for any number, got {batch}"
        raise ExportError(Argument("batch"), bound)


@dataclass(frozen=True)
class ExportInfo:
    """The metadata in the file, each field as JSON under `glit.<field>` (`spec_data` under `glit.spec`).

    Attributes:
        source: name of the model or folder. sha256: of its weights file, or of its state as safetensors.
        package_version: version of glit-models that exported it.
        opset: of the graph. precision: of its arithmetic.
        batch: batch size, None for any.
        input_size: channels, height, width; with `dynamic_size`, the size that the model was trained at.
        dynamic_size: whether any height and width that are multiples of `patch_size` are accepted.
        preprocess: whether the input is uint8 images [B, h, w, C] of any size instead of preprocessed images
            [B, C, H, W].
        mean, std, interpolation, crop_pct, crop_mode: timm's preprocessing.
        num_classes: number of outputs. class_names: their names, if any.
        spec_data: the architecture from `Spec.to_dict`, with `family`; None for a timm model of another library, and in
            files of version 0.1. See `spec`.
        multilabel: whether an image may be of several classes, or none: probabilities are then sigmoids of the logits.
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
    spec_data: Mapping[str, Any] | None = None
    multilabel: bool = False

    @property
    def spec(self) -> Spec | None:
        """The architecture of the network; None if `spec_data` is.

        Raises:
            ExportError: if it is not a valid spec, its family or a part is not registered, or glit-models is not
                installed. A file never triggers an import.
        """
        if self.spec_data is None:
            return None
        for module in _named_modules(self.spec_data):
            if module not in sys.modules:
                raise ExportError(f"the spec of {self.source} names the module {module!r}; import it first")
        zoo = require("glit_models")
        try:
            spec: Spec = zoo.parse_spec(self.spec_data)
            return spec
        except zoo.GlitError as error:
            raise ExportError(f"the spec of {self.source} cannot be used here: {error}") from None

    def to_texts(self) -> dict[str, str]:
        """Keys and values as strings for ONNX."""
        values = {_KEYS.get(field.name, field.name): getattr(self, field.name) for field in fields(self)}
        return {PREFIX + name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}

    @classmethod
    def from_texts(cls, texts: Mapping[str, str], where: str) -> ExportInfo:
        """The inverse of `to_texts`. `where` is the name of the file in messages.

        Raises:
            ExportError: if the file was not written by this package, or a field is missing, damaged or too long.
        """
        if not any(key.startswith(PREFIX) for key in texts):
            raise ExportError(f"{where}: not exported by glit-models; `glit export` makes such files")
        values: dict[str, Any] = {}
        for field in fields(cls):
            key = PREFIX + _KEYS.get(field.name, field.name)
            if key in texts:
                values[field.name] = _parse(texts[key], key, where)
            elif field.default is MISSING:  # not a field that files of version 0.1 lack
                raise ExportError(f"{where}: its metadata lacks {key!r}; export it again")
        for name, is_sound in _checks(values).items():
            if not is_sound:
                raise ExportError(f"{where}: its metadata {PREFIX + name!r} is damaged; export it again")
        return cls(**values)

    def run_in_batches(self, images: np.ndarray, run: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Compute logits [B, K] in float32 of images [B, ...]: `run` gets as many at a time as the file takes."""
        size = self.batch or _BATCH
        found = [np.zeros((0, self.num_classes), np.float32)]
        for start in range(0, len(images), size):
            part = images[start : start + size]
            padded = np.resize(part, (size, *part.shape[1:])) if self.batch else part
            found.append(run(padded)[: len(part)])
        return np.concatenate(found)

    @property
    def labels(self) -> tuple[str, ...]:
        """The class names, or numbers if there are none."""
        return self.class_names or tuple(map(str, range(self.num_classes)))

    @property
    def data_config(self) -> dict[str, Any]:
        """The arguments of `preprocessing.prepare_image` and of `timm.data.create_transform`."""
        return {
            "input_size": self.input_size,
            "mean": self.mean,
            "std": self.std,
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
            "crop_mode": self.crop_mode,
        }


_KEYS = {"spec_data": "spec"}  # fields whose key differs from their name


def _parse(text: str, key: str, where: str) -> Any:
    """Parse the value of one field; lists become tuples."""
    limit = _MAX_SPEC_CHARS if key == PREFIX + "spec" else _MAX_CHARS
    if len(text) > limit:
        raise ExportError(f"{where}: its metadata {key!r} is longer than {limit} characters")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise ExportError(f"{where}: its metadata {key!r} is damaged; export it again") from None
    return tuple(value) if isinstance(value, list) else value


def _checks(values: Mapping[str, Any]) -> dict[str, bool]:
    """Type checks of the fields, by key."""
    size, names, count = values["input_size"], values["class_names"], values["num_classes"]
    spec, batch = values.get("spec_data"), values["batch"]
    checks = {
        "input_size": isinstance(size, tuple) and len(size) == 3 and all(map(is_count, size)),
        "num_classes": is_count(count),
        "class_names": names is None
        or (isinstance(names, tuple) and len(names) == count and all(isinstance(name, str) for name in names)),
        "batch": batch is None or is_count(batch),
        "patch_size": is_count(values["patch_size"]),
        "precision": values["precision"] in ("fp32", "fp16", "bf16", "int8"),
        "spec": spec is None or isinstance(spec, dict),
    }
    for name in ("source", "sha256", "package_version", "interpolation", "crop_mode"):
        checks[name] = isinstance(values[name], str)
    for name in ("dynamic_size", "preprocess", "multilabel"):
        checks[name] = isinstance(values.get(name, False), bool)
    if problem := preprocessing_problem(values):
        checks[problem[0]] = False
    return checks


def _named_modules(data: Any) -> list[str]:
    """The modules in a spec's `module:Name` entries."""
    found, rest = [], [data]
    while rest:
        value = rest.pop()
        if isinstance(value, str) and ":" in value:
            found.append(value.partition(":")[0])
        elif isinstance(value, Mapping):
            rest.extend(value.values())
        elif isinstance(value, (list, tuple)):
            rest.extend(value)
    return found
