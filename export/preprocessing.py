"""Build timm's evaluation preprocessing as an ONNX graph: uint8 images [B, h, w, C] to preprocessed [B, C, H, W].

`onnx.py` joins this graph to a network.

Images are resized as in Pillow: with antialiasing, in integer levels of 0 to 255, rows first. ONNX Runtime's result is
within `PIXEL_TOLERANCE` level of timm's transform, and equal if nothing is resized. A recent Pillow filters columns
first when it shrinks an image that is higher than wide; rounding then differs, and some pixels with strong contrast
differ by more. So 19 of 20 pixels of every image must be within the tolerance.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from glit_models.errors import Argument, ExportError

from .extras import require
from .metadata import INPUT, ExportInfo

if TYPE_CHECKING:
    import onnx

__all__ = ["PIXEL_QUANTILE", "PIXEL_TOLERANCE", "PREPARED", "preprocessing_graph", "preprocessing_model"]

PIXEL_TOLERANCE = 1.0  # levels of 255
PIXEL_QUANTILE = 0.95
PREPARED = "prepared"
_MODES: dict[str, dict[str, Any]] = {
    "bicubic": {"mode": "cubic", "cubic_coeff_a": -0.5},  # as in Pillow; ONNX's default is -0.75
    "bilinear": {"mode": "linear"},
}
_CROPS = ("center", "squash")


def preprocessing_graph(info: ExportInfo, element_type: int) -> onnx.GraphProto:
    """Build the graph from `images` to `prepared`.

    Args:
        info: `input_size`, `mean`, `std`, `interpolation`, `crop_pct` and `crop_mode` set the preprocessing.
        element_type: ONNX's number of the network's type.

    Raises:
        ExportError: on an interpolation or a crop that is not supported; lists the supported ones.
    """
    if info.interpolation not in _MODES:
        raise ExportError(
            f"interpolation {info.interpolation!r} has no ONNX operator that matches it, only "
            f"{' and '.join(_MODES)} have; export without ",
            Argument("preprocess"),
        )
    if info.crop_mode not in _CROPS:
        raise ExportError(
            f"crop_mode {info.crop_mode!r} cannot be put into the graph, only {' and '.join(_CROPS)}; export without ",
            Argument("preprocess"),
        )
    onnx = require("onnx")
    steps = _Steps(onnx)
    channels, height, width = info.input_size
    scaled = _resized_size(steps, info)
    image = steps.add("Transpose", [INPUT], perm=[0, 3, 1, 2])
    # Pixels outside the image are excluded from the filter instead of repeated, as in Pillow.
    resize: dict[str, Any] = {"antialias": 1, "exclude_outside": 1, "coordinate_transformation_mode": "half_pixel"}
    # All four sizes, because ONNX Runtime moves the Transpose past a Resize and then misreads one with `axes`.
    sizes = steps.add("Concat", [steps.add("Shape", [image], start=0, end=2), scaled], axis=0)
    image = steps.add("Resize", [image, "", "", sizes], **resize, **_MODES[info.interpolation])
    image = steps.add("Cast", [_crop(steps, image, scaled, (height, width))], to=onnx.TensorProto.FLOAT)
    shape = (1, channels, 1, 1)
    scale = steps.floats([1 / (255 * value) for value in _per_channel(info.std, channels)], shape)
    pairs = zip(_per_channel(info.mean, channels), _per_channel(info.std, channels), strict=True)
    offset = steps.floats([-mean / std for mean, std in pairs], shape)
    prepared = steps.add("Add", [steps.add("Mul", [image, scale]), offset])
    steps.add("Cast", [prepared], PREPARED, to=element_type)
    batch = info.batch or "batch"
    given = [batch, "image_height", "image_width", channels]
    return onnx.helper.make_graph(
        steps.nodes,
        "preprocess",
        [onnx.helper.make_tensor_value_info(INPUT, onnx.TensorProto.UINT8, given)],
        [onnx.helper.make_tensor_value_info(PREPARED, element_type, [batch, *info.input_size])],
        steps.constants,
    )


def preprocessing_model(info: ExportInfo) -> bytes:
    """The graph as a separate model, for any batch, with float32 output. Raises the errors of `preprocessing_graph`."""
    onnx = require("onnx")
    opset = onnx.helper.make_opsetid("", info.opset)
    version = onnx.helper.find_min_ir_version_for([opset])
    graph = preprocessing_graph(dataclasses.replace(info, batch=None), onnx.TensorProto.FLOAT)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=version)
    content: bytes = model.SerializeToString()
    return content


class _Steps:
    """Collects nodes and constants. Final."""

    def __init__(self, onnx: Any) -> None:
        self.onnx = onnx
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def add(self, operator: str, inputs: list[str], output: str | None = None, **attributes: Any) -> str:
        """Add a node; returns the name of its output."""
        name = f"preprocess/{operator}_{len(self.nodes)}"
        output = output or f"{name}:0"
        self.nodes.append(self.onnx.helper.make_node(operator, inputs, [output], name=name, **attributes))
        return output

    def _constant(self, element_type: int, values: list[Any], shape: tuple[int, ...]) -> str:
        name = f"preprocess/constant_{len(self.constants)}"
        self.constants.append(self.onnx.helper.make_tensor(name, element_type, shape, values))
        return name

    def integers(self, *values: int) -> str:
        """A constant [n] of int64."""
        return self._constant(self.onnx.TensorProto.INT64, list(values), (len(values),))

    def doubles(self, *values: float) -> str:
        """A constant [n] of float64."""
        return self._constant(self.onnx.TensorProto.DOUBLE, list(values), (len(values),))

    def floats(self, values: list[float], shape: tuple[int, ...]) -> str:
        """A constant of float32."""
        return self._constant(self.onnx.TensorProto.FLOAT, values, shape)

    def cast(self, value: str, to: str) -> str:
        """The value converted to INT64 or DOUBLE."""
        return self.add("Cast", [value], to=getattr(self.onnx.TensorProto, to))


def _resized_size(steps: _Steps, info: ExportInfo) -> str:
    """The height and width to resize to, int64 [2]."""
    _, height, width = info.input_size
    target = [math.floor(side / info.crop_pct) for side in (height, width)]
    if info.crop_mode == "squash":
        return steps.integers(*target)
    size = steps.add("Shape", [INPUT], start=1, end=3)
    if target[0] == target[1]:  # torchvision's Resize: shorter side to the target, longer one rounded down
        short = steps.add("ReduceMin", [size], keepdims=1)
        return steps.add("Div", [steps.add("Mul", [size, steps.integers(target[0])]), short])
    # timm's ResizeKeepRatio: both sides by the smaller ratio, rounded to the nearest.
    size = steps.cast(size, "DOUBLE")
    ratio = steps.add("ReduceMin", [steps.add("Div", [size, steps.doubles(*target)])], keepdims=1)
    return steps.cast(steps.add("Round", [steps.add("Div", [size, ratio])]), "INT64")


def _crop(steps: _Steps, image: str, size: str, target: tuple[int, int]) -> str:
    """The centre of a resized image, with the offset of torchvision's CenterCrop."""
    excess = steps.cast(steps.add("Sub", [size, steps.integers(*target)]), "DOUBLE")
    half = steps.add("Round", [steps.add("Mul", [excess, steps.doubles(0.5)])])
    start = steps.cast(half, "INT64")
    end = steps.add("Add", [start, steps.integers(*target)])
    return steps.add("Slice", [image, start, end, steps.integers(2, 3)])


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return values * channels if len(values) == 1 else values
