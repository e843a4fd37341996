"""`export_onnx`: a model as one ONNX file that runs without this repository, compared with PyTorch.

It puts the steps together: the form (`form.py`), the graph (`graph.py`, `preprocessing.py`), int8 (`quantize.py`) and
the comparison (`verify.py`). `runtime.py` reads such files.

Axes: B batch, C channels, H/W image height and width, K classes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from glit_models import SpecTransformer
from glit_models.errors import Argument, DataError, ExportError

from . import graph, sessions
from .form import ExportForm
from .images import ImageSource
from .metadata import INPUT, ExportInfo, Precision
from .preprocessing import PREPARED, preprocessing_graph
from .runtime import OnnxClassifier
from .sessions import UnrunnableError
from .source import ImageSize, ModelSource
from .targets import Artifact, Target, TargetOptions, export_model, register_target, write_verified
from .tracing import trace

if TYPE_CHECKING:
    import onnx

    Built = tuple[onnx.ModelProto, list[str]]  # and what was chosen, in words

__all__ = ["OPSETS", "OnnxArtifact", "OnnxOptions", "OnnxTarget", "build_graph", "checked_graph", "export_onnx"]

OPSETS = (20, 23, 18)  # the default first. `Resize` as Pillow does it came with 18, `Gelu` with 20, `Attention` with 23
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float32}


@dataclass(frozen=True)
class OnnxArtifact(Artifact):
    """An exported ONNX file; see `Artifact`. `num_nodes` is of its graph."""

    num_nodes: int = 0

    @property
    def facts(self) -> tuple[str, ...]:
        """What to print beside the path."""
        return (*super().facts, f"{self.num_nodes} nodes")


@dataclass(frozen=True)
class OnnxOptions(TargetOptions):
    """How to export; see `export_onnx`."""

    opset: int | None = None
    precision: Precision = "fp32"
    batch: int | None = None
    image_size: ImageSize = None
    preprocess: bool = False
    calibration: ImageSource | None = None
    dynamic_int8: bool = False
    providers: Sequence[str] | None = None
    input_name: str = INPUT

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.opset not in (None, *OPSETS):
            raise ExportError(Argument("opset"), f" must be one of {', '.join(map(str, OPSETS))}, got {self.opset}")
        if self.precision not in _DTYPES:
            raise ExportError(Argument("precision"), f" must be one of {', '.join(_DTYPES)}, got {self.precision!r}")
        if self.precision == "bf16" and self.opset not in (None, 23):
            raise ExportError(f"bf16 needs opset 23; {self.opset} has no convolution of it")
        if not re.fullmatch(r"[A-Za-z_]\w*", self.input_name):
            raise ExportError(Argument("input_name"), f" must be letters, digits and '_', got {self.input_name!r}")
        if self.batch is not None and self.batch < 1:
            raise ExportError(Argument("batch"), f" must be at least 1, or None for any number, got {self.batch}")
        if self.preprocess and self.image_size == "dynamic":
            raise ExportError("with preprocessing in the graph the network sees one size; give it, or leave it out")
        is_calibrated = self.calibration is not None
        if self.precision == "int8" and not is_calibrated and not self.dynamic_int8:
            raise ExportError(
                "int8 needs images to calibrate with; or ", Argument("dynamic_int8", True), ", which takes none"
            )
        if is_calibrated and self.dynamic_int8:
            raise ExportError(Argument("calibration"), " and ", Argument("dynamic_int8"), " exclude each other")
        if self.precision != "int8" and (is_calibrated or self.dynamic_int8):
            raise ExportError(f"calibration is for int8, not for {self.precision}")

    @property
    def opset_number(self) -> int:
        """The opset, chosen where none was given."""
        return self.opset or (23 if self.precision == "bf16" else OPSETS[0])


@register_target
class OnnxTarget(Target):
    """One ONNX file."""

    name = "onnx"
    suffix = ".onnx"
    options = OnnxOptions
    packages = ("onnx", "onnxscript", "onnxruntime")

    def export(self, source: ModelSource, path: Path, options: Any) -> OnnxArtifact:
        """See `export_onnx`."""
        if options.verify and options.calibration is not None and options.images is None:
            options = _hold_out(options)

        # An unverified file may be for a machine that can do more than this one.
        proto, notes = checked_graph(source, options) if options.verify else _build(source, options)
        content, num_nodes = graph.to_bytes(proto), len(proto.graph.node)
        info = ExportInfo.from_texts({item.key: item.value for item in proto.metadata_props}, str(path))

        def load(temporary: Path) -> OnnxClassifier:
            # A provider that was named is the one to be judged, not what ONNX Runtime falls back to.
            return OnnxClassifier(temporary, options.providers, strict=options.providers is not None)

        about = {"bytes": len(content), "nodes": num_nodes, "notes": notes}
        made = write_verified(path, lambda to: to.write_bytes(content), load, source, info, options, **about)
        return OnnxArtifact(made.path, info, made.num_bytes, made.agreement, tuple(notes), num_nodes)


def export_onnx(
    model: SpecTransformer | ModelSource | str | Path,
    path: str | os.PathLike[str],
    *,
    opset: int | None = None,
    precision: Precision = "fp32",
    batch: int | None = None,
    image_size: ImageSize = None,
    preprocess: bool = False,
    calibration: ImageSource | None = None,
    dynamic_int8: bool = False,
    verify: int = 64,
    images: ImageSource | None = None,
    providers: Sequence[str] | None = None,
    input_name: str = INPUT,
    force: bool = False,
) -> OnnxArtifact:
    """Export a model to one ONNX file, and compare what it computes with PyTorch.

    Args:
        model: a model of any family, which is not changed; 'model.tag', a weight folder, or a Hub repository.
        path: of the file.
        opset: 20, which runtimes of the last years take; 23, whose attention is one operator; or 18. None takes 20, or
            23 for bf16.
        precision: 'fp32'; 'fp16' or 'bf16', where norms and softmax stay in float32; 'int8', of matrix products and
            convolutions.
        batch: images at a time; None for any number.
        image_size: height and width; 'dynamic' for any that the patch divides; None for the model's own.
        preprocess: put resizing, cropping and normalising into the graph, from uint8 images [B, h, w, C].
        calibration: images like those that an int8 network will see.
        dynamic_int8: choose the scales of activations at run time, without calibration.
        verify: on how many images to compare; 0 for none, which leaves the file marked `.unverified`.
        images: to compare on, rather than generated ones; of int8, rather than every fifth calibration image, which the
            calibration then does without.
        providers: to verify with, the first of them and no other; None takes the fastest that works.
        input_name: of the graph's input; transformers calls it 'pixel_values'.
        force: replace an existing file.

    Returns:
        The artifact; if it does not agree with PyTorch, its file has the suffix `.unverified`.

    Raises:
        ExportError: on options that do not go together, a path that exists or cannot be written, or a graph that the
            provider cannot run. WeightsError, SpecError, DataError: on a bad model, size or image.
    """
    artifact = export_model(
        model, path, OnnxTarget.name, opset=opset, precision=precision, batch=batch, image_size=image_size,
        preprocess=preprocess, calibration=calibration, dynamic_int8=dynamic_int8, verify=verify, images=images,
        providers=providers, input_name=input_name, force=force,
    )  # fmt: skip
    assert isinstance(artifact, OnnxArtifact)
    return artifact


def _hold_out(options: OnnxOptions) -> OnnxOptions:
    """Compare on every fifth of the calibration images, if they are that many: generated ones lie between classes."""
    assert options.calibration is not None
    held_out = dataclasses.replace(options.calibration, fifth=True)
    with contextlib.suppress(DataError):  # too few
        held_out.pick(1)
        rest = dataclasses.replace(options.calibration, fifth=False)
        return dataclasses.replace(options, calibration=rest, images=held_out)
    return options


# ---- the graph ----


def checked_graph(source: ModelSource, options: OnnxOptions) -> Built:
    """The graph, which ONNX Runtime can run here, and what was chosen. Raises as `export_onnx`."""
    try:
        proto, notes = _build(source, options)
        _open(proto, options, options.opset_number)
    except UnrunnableError as error:
        raise ExportError(f"{error}; {_what_works(source, options)}; verify 0 exports it unverified") from None
    return proto, notes


def _build(source: ModelSource, options: OnnxOptions) -> Built:
    if options.precision == "int8":
        return _int8(source, options, options.opset_number)
    return build_graph(source, options, options.opset_number), [f"opset {options.opset_number}"]


def _open(proto: onnx.ModelProto, options: OnnxOptions, opset: int) -> None:
    """Raises UnrunnableError if ONNX Runtime cannot run it here."""
    where, providers = f"opset {opset} with {options.precision}", options.providers
    sessions.open_session(graph.to_bytes(proto), providers, strict=providers is not None, where=where)


def _what_works(source: ModelSource, options: OnnxOptions) -> str:
    """Another opset or precision that can be run here, whichever is likelier to be the trouble first."""
    opset, precision = options.opset_number, options.precision
    lower: list[tuple[int, Any]] = [(opset, other) for other in ("fp16", "fp32") if other != precision]
    # Another opset in eight bits would have to be calibrated anew, and bf16 has but one.
    others: list[tuple[int, Any]] = [(n, precision) for n in OPSETS if precision in ("fp32", "fp16") and n != opset]
    for number, lesser in others + lower if precision == "fp32" else lower + others:
        other = dataclasses.replace(options, precision=lesser, calibration=None, dynamic_int8=False)
        try:
            _open(build_graph(source, other, number), other, number)
        except UnrunnableError:
            continue
        return f"opset {number} with {lesser} can be run"
    return "nothing else can be run either"


def build_graph(source: ModelSource, options: OnnxOptions, opset: int) -> onnx.ModelProto:
    """The checked graph of a model, with its metadata.

    Raises:
        ExportError: if it cannot be built. SpecError: if the patch does not divide the image size.
    """
    info = _describe(source, options, opset)
    return _finished(_network(source, options, opset)[0], info, options.input_name)


def _int8(source: ModelSource, options: OnnxOptions, opset: int) -> Built:
    """The same in eight bits; without calibration images, ranges are found at run time."""
    from .quantize import quantize_dynamically, quantize_statically

    info = _describe(source, options, opset)
    proto, form = _network(source, options, opset)
    if options.calibration is None:
        proto, notes = quantize_dynamically(proto)
    else:
        proto, notes = quantize_statically(proto, form, info, options.calibration)
    return _finished(proto, info, options.input_name), [f"opset {opset}", *notes]


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


def _finished(proto: onnx.ModelProto, info: ExportInfo, input_name: str) -> onnx.ModelProto:
    """The network with the preprocessing in front, if it is to be there, and its metadata; checked."""
    if info.preprocess:
        element = proto.graph.input[0].type.tensor_type.elem_type
        graph.join(preprocessing_graph(info, element), proto, (PREPARED, INPUT))
    graph.rename_input(proto, input_name)
    graph.set_metadata(proto, info.to_texts())
    graph.check(proto)
    return proto
