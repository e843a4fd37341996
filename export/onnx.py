"""`export_onnx`: a GLiT written as one ONNX file that runs without this repository, and proven to give the same.

It puts the parts together: the form (`form.py`), the graph (`graph.py`, `preprocessing.py`), int8 (`quantize.py`), the
proof (`verify.py`). Reading such files is `runtime.py`'s.

Axes: B batch, C channels, H/W image height and width, K classes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from glit_models.errors import ExportError
from glit_models.model import GLiT

from . import graph, sessions
from .extras import require
from .form import ExportForm
from .metadata import INPUT, ExportInfo, Precision
from .pictures import Pictures
from .preprocessing import PREPARED, preprocessing_graph
from .runtime import OnnxClassifier
from .sessions import UnrunnableError
from .source import ImageSize, ModelSource, open_source
from .tracing import trace
from .verify import Agreement, compare
from .writing import check_target, write_and_judge

if TYPE_CHECKING:
    import onnx

    Built = tuple[onnx.ModelProto, list[str]]  # and what was chosen, in words

__all__ = ["OPSETS", "OnnxArtifact", "OnnxOptions", "build_graph", "export_onnx", "newest_graph"]

OPSETS = (23, 20, 18)  # `Attention` came with 23, `Gelu` with 20, `Resize` as Pillow does it with 18
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float32}


@dataclass(frozen=True)
class OnnxArtifact:
    """An exported file.

    Attributes:
        path: where it lies; with the suffix `.unverified` if it does not agree with PyTorch.
        info: what it says of itself.
        num_nodes: of its graph. num_bytes: its size.
        agreement: with PyTorch; None if that was not asked for.
        notes: what was chosen, for people.
    """

    path: Path
    info: ExportInfo
    num_nodes: int
    num_bytes: int
    agreement: Agreement | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class OnnxOptions:
    """How to export; see `export_onnx`."""

    precision: Precision = "fp32"
    batch: int | None = None
    image_size: ImageSize = None
    preprocess: bool = False

    def __post_init__(self) -> None:
        if self.precision not in _DTYPES:
            raise ExportError(f"precision must be one of {', '.join(_DTYPES)}, got {self.precision!r}")
        if self.batch is not None and self.batch < 1:
            raise ExportError(f"batch must be at least 1, or None for any number, got {self.batch}")
        if self.preprocess and self.image_size == "dynamic":
            raise ExportError("with preprocessing in the graph the network sees one size; give it, or leave it out")


def export_onnx(
    model: GLiT | str | Path,
    path: str | os.PathLike[str],
    *,
    opset: int | None = None,
    precision: Precision = "fp32",
    batch: int | None = None,
    image_size: ImageSize = None,
    preprocess: bool = False,
    calibration: Pictures | None = None,
    dynamic_int8: bool = False,
    verify: int = 64,
    pictures: Pictures | None = None,
    providers: Sequence[str] | None = None,
    force: bool = False,
) -> OnnxArtifact:
    """Export a GLiT to one ONNX file, and compare what it computes with PyTorch.

    Args:
        model: a GLiT, which stays as it is; 'model.tag', a weight folder, or a Hub repository.
        path: of the file.
        opset: 23, 20 or 18; None takes the newest that ONNX Runtime can run here.
        precision: 'fp32'; 'fp16' or 'bf16', where norms and softmax stay in float32; 'int8', of matrix products and
            convolutions.
        batch: images at a time; None for any number.
        image_size: height and width; 'dynamic' for any that the patch divides; None for the model's own.
        preprocess: put resizing, cropping and normalising into the graph, from uint8 pictures [B, h, w, C].
        calibration: pictures like those that an int8 network will see.
        dynamic_int8: choose the scales of activations at run time, without calibration.
        verify: on how many pictures to compare; 0 for none, which leaves the file marked `.unverified`.
        pictures: to compare on, rather than generated ones.
        providers: to verify with, the first of them and no other; None takes the fastest that works.
        force: replace an existing file.

    Returns:
        The artifact; if it does not agree with PyTorch, its file has the suffix `.unverified`.

    Raises:
        ExportError: on options that do not go together, a target that exists or cannot be written, or a graph that the
            provider cannot run. WeightsError, SpecError, DataError: on a bad model, size or picture.
    """
    path = Path(path)
    options = OnnxOptions(precision, batch, image_size, preprocess)
    _check_options(opset, precision, calibration, dynamic_int8, verify)
    check_target(path, force)
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package)
    source = open_source(model)
    if pictures is not None:
        pictures.pick(1)  # a wrong folder is said now, not when the work is done

    def build(number: int) -> Built:
        if precision == "int8":
            return _int8(source, options, number, calibration)
        return build_graph(source, options, number), [f"opset {number}"]

    if verify:
        proto, notes = _runnable(build, source, options, opset, providers)
    else:  # it may be for a machine that can do more than this one
        proto, notes = build(opset or OPSETS[0])
    content = graph.to_bytes(proto)
    info = ExportInfo.from_texts({item.key: item.value for item in proto.metadata_props}, str(path))

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    def judge(temporary: Path) -> Agreement | None:
        if not verify:
            return None
        # A provider that was named is the one to be judged, not what ONNX Runtime falls back to.
        classifier = OnnxClassifier(temporary, providers, strict=providers is not None)
        return compare(classifier, source, verify, pictures)

    about = {"bytes": len(content), "nodes": len(proto.graph.node), "notes": notes, "info": dataclasses.asdict(info)}
    final, agreement = write_and_judge(path, write, judge, about)
    return OnnxArtifact(final, info, len(proto.graph.node), len(content), agreement, tuple(notes))


def _check_options(
    opset: int | None, precision: str, calibration: Pictures | None, dynamic_int8: bool, verify: int
) -> None:
    if opset is not None and opset not in OPSETS:
        raise ExportError(f"opset must be one of {', '.join(map(str, OPSETS))}, got {opset}")
    if verify < 0:
        raise ExportError(f"verify must be 0 or more pictures, got {verify}")
    if precision == "int8" and calibration is None and not dynamic_int8:
        raise ExportError("int8 needs pictures to calibrate with, --calibration DIR; or --dynamic-int8, without any")
    if calibration is not None and dynamic_int8:
        raise ExportError("--calibration and --dynamic-int8 exclude each other")
    if precision != "int8" and (calibration is not None or dynamic_int8):
        raise ExportError(f"calibration is for int8, not for {precision}")


# ---- the graph ----


def _runnable(
    build: Callable[[int], Built],
    source: ModelSource,
    options: OnnxOptions,
    opset: int | None,
    providers: Sequence[str] | None,
) -> Built:
    """The graph, of the newest opset that opens here, or of the one that was asked for."""
    refused: dict[int, str] = {}
    for candidate in OPSETS if opset is None else (opset,):
        try:
            proto, notes = build(candidate)
            _open(proto, options.precision, candidate, providers)
        except UnrunnableError as error:
            refused[candidate] = str(error)
            continue
        return proto, [*(f"opset {number} was refused: {why}" for number, why in refused.items()), *notes]
    reason = next(iter(refused.values()))
    raise ExportError(f"{reason}; {_what_works(source, options, opset, providers)}; --verify 0 exports it unverified")


def _open(proto: onnx.ModelProto, precision: str, opset: int, providers: Sequence[str] | None) -> None:
    """Raises UnrunnableError if ONNX Runtime cannot run it here."""
    where = f"opset {opset} with {precision}"
    sessions.open_session(graph.to_bytes(proto), providers, strict=providers is not None, where=where)


def _what_works(source: ModelSource, options: OnnxOptions, opset: int | None, providers: Sequence[str] | None) -> str:
    """Another opset or precision that can be run here, whichever is likelier to be the trouble first."""
    precisions: tuple[Precision, ...] = ("fp16", "fp32")
    lower = [(opset or OPSETS[0], precision) for precision in precisions if precision != options.precision]
    # Another opset in eight bits would have to be calibrated anew.
    may_be_older = opset is not None and options.precision != "int8"
    older = [(number, options.precision) for number in OPSETS if may_be_older and number != opset]
    others = older + lower if options.precision == "fp32" else lower + older
    for number, precision in others:
        try:
            proto = build_graph(source, dataclasses.replace(options, precision=precision), number)
            _open(proto, precision, number, providers)
        except UnrunnableError:
            continue
        return f"opset {number} with {precision} can be run"
    return "nothing else can be run either"


def newest_graph(source: ModelSource, options: OnnxOptions, providers: Sequence[str] | None = None) -> Built:
    """The graph in the newest opset that opens on a provider, and what was chosen. Raises as `export_onnx`."""

    def build(number: int) -> Built:
        return build_graph(source, options, number), [f"opset {number}"]

    return _runnable(build, source, options, None, providers)


def build_graph(source: ModelSource, options: OnnxOptions, opset: int) -> onnx.ModelProto:
    """The checked graph of a model, with its metadata.

    Raises:
        ExportError: if it cannot be built. SpecError: if the patch does not divide the image size.
    """
    info = _describe(source, options, opset)
    return _finished(_network(source, options, opset)[0], info)


def _int8(source: ModelSource, options: OnnxOptions, opset: int, calibration: Pictures | None) -> Built:
    """The same in eight bits; without calibration pictures, ranges are found at run time."""
    from .quantize import quantize_dynamically, quantize_statically

    info = _describe(source, options, opset)
    proto, form = _network(source, options, opset)
    if calibration is None:
        proto, notes = quantize_dynamically(proto)
    else:
        proto, notes = quantize_statically(proto, form, info, calibration)
    return _finished(proto, info), [f"opset {opset}", *notes]


def _describe(source: ModelSource, options: OnnxOptions, opset: int) -> ExportInfo:
    return source.describe(opset, options.precision, options.batch, options.image_size, options.preprocess)


def _network(source: ModelSource, options: OnnxOptions, opset: int) -> tuple[onnx.ModelProto, ExportForm]:
    """The graph from prepared images to logits, in float32 for int8, and what it was traced from."""
    info = _describe(source, options, opset)
    dtype = _DTYPES[options.precision]
    form = ExportForm(source.model, "operator" if opset >= 23 else "products", dtype, options.image_size)
    # numpy has no bfloat16, so that nobody could give or take it.
    images_dtype = torch.float32 if dtype == torch.bfloat16 else dtype
    images = torch.zeros((options.batch or 2, *info.input_size), dtype=images_dtype)
    return graph.clean(trace(form, images, info)), form


def _finished(proto: onnx.ModelProto, info: ExportInfo) -> onnx.ModelProto:
    """The network with the preprocessing in front, if it is to be there, and its metadata; checked."""
    if info.preprocess:
        element = proto.graph.input[0].type.tensor_type.elem_type
        graph.join(preprocessing_graph(info, element), proto, (PREPARED, INPUT))
    graph.set_metadata(proto, info.to_texts())
    graph.check(proto)
    return proto
