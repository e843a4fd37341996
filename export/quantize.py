"""Quantise a float32 graph to int8 with ONNX Runtime: its linear layers compute in eight bits.

Quantisation is static by default: calibration images give the range of each activation, and the measured sensitivity
of layers decides which of them stay in float. `verify.py` compares the result with PyTorch.

Depthwise convolutions stay in float, because they are no faster in int8 (`python -m benchmarks.export`); norms, softmax
and activation functions do, because they are small and need the range.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from glit_models.errors import ExportError, first_line
from glit_models.runs.console import say
from glit_models.runs.files import temporary_folder

from .extras import require
from .images import ImageSource, prepare
from .metadata import INPUT, OUTPUT, ExportInfo
from .sensitivity import measure_sensitivity
from .sessions import open_session

if TYPE_CHECKING:
    import onnx

__all__ = ["quantize_dynamically", "quantize_statically"]

CALIBRATION_IMAGES = 256
_FEWER_IMAGES = 64  # number of images that is tried first
_SENSITIVITY_IMAGES = 16
_BATCH = 16
_KEPT = (0, 1, 2, 4, 8, 16, 32)  # numbers of layers in float, tried in turn
ENOUGH = 99.0  # top-1 agreement in % with the float graph: one more than verification requires


def quantize_statically(
    model: onnx.ModelProto, form: nn.Module, info: ExportInfo, calibration: ImageSource
) -> tuple[onnx.ModelProto, list[str]]:
    """Quantise with ranges from calibration images, keeping as few layers in float as necessary.

    Args:
        model: the float32 graph of the network, without preprocessing. form: the module that it was traced from.
        info: preprocessing of images. calibration: at most `CALIBRATION_IMAGES` of them are used.

    Returns:
        The quantised graph, and a description of what was chosen.

    Raises:
        DataError: if there are no images, or one cannot be read.
        ExportError: if ONNX Runtime cannot quantise the graph.
    """
    images = prepare(info, calibration.pick(CALIBRATION_IMAGES).images())
    expected = _classes(model.SerializeToString(), images)
    sensitive: list[str] = []
    for num_images, num_kept in _tries(len(images)):
        began = time.monotonic()
        if num_kept and not sensitive:
            sensitive = list(measure_sensitivity(form, torch.from_numpy(images[:_SENSITIVITY_IMAGES])))
        kept = sensitive[:num_kept]
        in_float = (
            f"kept in float as the most sensitive: {', '.join(kept)}" if kept else "all linear layers in eight bits"
        )
        chosen = np.linspace(0, len(images) - 1, num_images).astype(int)
        quantised = _static(model, images[chosen], kept, info.batch)
        same = 100 * float((_classes(quantised.SerializeToString(), images) == expected).mean())
        say(
            f"int8: ranges of {num_images} images, {in_float}: {same:.1f} % of {len(images)} images keep their class, "
            f"{ENOUGH:g} are wanted ({time.monotonic() - began:.0f} s)"
        )
        if same >= ENOUGH:
            break
    return quantised, [f"calibrated on {num_images} images of {calibration.name}", in_float]


def _tries(num_images: int) -> list[tuple[int, int]]:
    """Pairs (number of images for the ranges, layers kept in float), cheapest first: fewer images often suffice."""
    fewer = [(_FEWER_IMAGES, 0)] if num_images >= 2 * _FEWER_IMAGES else []
    return fewer + [(num_images, kept) for kept in _KEPT]


def quantize_dynamically(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """Quantise weights now and activations at run time, by the range of each batch.

    Raises:
        ExportError: if ONNX Runtime cannot quantise the graph.
    """
    quantization = require("onnxruntime.quantization")
    with _workspace() as folder:
        source, target = folder / "float.onnx", folder / "int8.onnx"
        bare = copy.deepcopy(model)
        del bare.graph.value_info[:]  # the quantiser transposes weights but keeps their old shapes
        source.write_bytes(bare.SerializeToString())
        quantization.quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["Gemm", "MatMul"],
            nodes_to_exclude=_stacked(bare),
            per_channel=True,
            reduce_range=True,  # as in `_static`
            weight_type=quantization.QuantType.QInt8,
        )
        return require("onnx").load(target), ["activations quantised at run time"]


def _stacked(model: onnx.ModelProto) -> list[str]:
    """Products with several stacked constant matrices, which ONNX Runtime's int8 operator does not support."""
    stacked = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) > 2}
    return [node.name for node in model.graph.node if node.op_type == "MatMul" and stacked.intersection(node.input)]


def _static(model: onnx.ModelProto, images: np.ndarray, kept: Sequence[str], batch: int | None) -> onnx.ModelProto:
    quantization = require("onnxruntime.quantization")
    targets = [node for node in model.graph.node if _is_target(node, model)]
    names = [node.name for node in targets if node.name.rpartition("/")[0] not in kept]
    if not names:
        raise ExportError("no layer of this network can be quantised")
    with _workspace() as folder:
        quantization.quantize_static(
            copy.deepcopy(model),  # because it is modified
            folder / "int8.onnx",
            _reader(images, batch or _BATCH),
            nodes_to_quantize=names,
            op_types_to_quantize=["Gemm", "Conv"],
            per_channel=True,
            # Seven-bit weights: x86 CPUs without VNNI add two products in 16 bits, where eight-bit weights overflow.
            reduce_range=True,
            # Unsigned activations and signed weights, as x86 dot products take them.
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            # The next layers compute in float, so rounding the results would cost time and accuracy.
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "Conv"]},
        )
        return require("onnx").load(folder / "int8.onnx")


def _is_target(node: onnx.NodeProto, model: onnx.ModelProto) -> bool:
    """Whether a node is a linear layer or a convolution over all channels, with a weight stored in the file."""
    groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
    return node.op_type == "Gemm" or (node.op_type == "Conv" and groups == 1)


def _reader(images: np.ndarray, batch: int) -> Any:
    """Yield the images in full batches, in the form of ONNX Runtime's calibration reader."""
    batches = iter([images[start : start + batch] for start in range(0, len(images) - batch + 1, batch)])
    if len(images) < batch:
        batches = iter([np.resize(images, (batch, *images.shape[1:]))])

    class Reader(require("onnxruntime.quantization").CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, np.ndarray] | None:
            images = next(batches, None)
            return None if images is None else {INPUT: images}

    return Reader()


def _classes(content: bytes, images: np.ndarray) -> np.ndarray:
    """The most probable class [B] of preprocessed images according to a graph, on the CPU."""
    session = open_session(content, ["cpu"]).session
    size = session.get_inputs()[0].shape[0]
    size = size if isinstance(size, int) else _BATCH
    found = []
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        padded = np.resize(batch, (size, *batch.shape[1:]))
        found.append(session.run([OUTPUT], {INPUT: padded})[0][: len(batch)].argmax(1))
    return np.concatenate(found)


@contextlib.contextmanager
def _workspace() -> Iterator[Path]:
    """A temporary folder; while it is open, the quantiser is silent and its failures become ExportErrors."""
    logger = logging.getLogger()
    level = logger.level
    with temporary_folder() as folder, contextlib.redirect_stdout(io.StringIO()):
        logger.setLevel(logging.ERROR)
        try:
            yield folder
        except (ValueError, RuntimeError, KeyError, AttributeError) as error:
            raise ExportError(f"ONNX Runtime cannot quantise this graph: {first_line(error)}") from None
        finally:
            logger.setLevel(level)
