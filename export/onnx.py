"""`export_onnx`: export a model to a stand-alone ONNX file, and compare it with PyTorch.

It combines the form (`form.py`), the graph (`graph.py`, `preprocessing.py`), int8 (`quantize.py`) and the comparison
(`verify.py`). `runtime.py` reads the files.

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
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from glit_models.activations import check_memory
from glit_models.errors import Argument, DataError, ExportError

from . import graph, sessions
from .form import export_form
from .images import ImageSource
from .metadata import INPUT, SMALLER_BATCH, ExportInfo, Precision, check_batch
from .preprocessing import PREPARED, preprocessing_graph
from .runtime import OnnxClassifier
from .sessions import UnrunnableError
from .source import ImageSize, ModelSource
from .targets import Artifact, Target, TargetOptions, export_model, register_target, write_verified
from .tracing import trace

if TYPE_CHECKING:
    import onnx

    Built = tuple[onnx.ModelProto, list[str]]  # with a description of what was chosen

__all__ = [
    "OPSETS",
    "OnnxArtifact",
    "OnnxOptions",
    "OnnxTarget",
    "build_graph",
    "checked_graph",
    "export_onnx",
    "hold_out",
]

OPSETS = (20, 23, 18)  # default first; Pillow's `Resize` needs 18, `Gelu` 20, `Attention` 23
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float32}


Options = TypeVar("Options", bound="OnnxOptions")


@dataclass(frozen=True)
class OnnxArtifact(Artifact):
    """An exported ONNX file; see `Artifact`. `num_nodes` is the number of nodes in its graph."""

    num_nodes: int = 0

    @property
    def facts(self) -> tuple[str, ...]:
        """The facts to print next to the path."""
        return (*super().facts, f"{self.num_nodes} nodes")


@dataclass(frozen=True)
class OnnxOptions(TargetOptions):
    """Options of the export; see `export_onnx`."""

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
        check_batch(self.batch)
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
        """The opset, or the default for the precision."""
        return self.opset or (23 if self.precision == "bf16" else OPSETS[0])


@register_target
class OnnxTarget(Target):
    """A single ONNX file."""

    name = "onnx"
    suffix = ".onnx"
    options = OnnxOptions
    packages = ("onnx", "onnxscript", "onnxruntime")

    def export(self, source: ModelSource, path: Path, options: Any) -> OnnxArtifact:
        """See `export_onnx`."""
        options = hold_out(options)
        # An unverified file may be meant for a machine with more features than this one.
        proto, notes = checked_graph(source, options) if options.verify else _build(source, options)
        content, num_nodes = graph.to_bytes(proto), len(proto.graph.node)
        info = ExportInfo.from_texts({item.key: item.value for item in proto.metadata_props}, str(path))

        def load(temporary: Path) -> OnnxClassifier:
            # Verify the named provider, not a fallback of ONNX Runtime.
            return OnnxClassifier(temporary, options.providers, strict=options.providers is not None)

        about = {"bytes": len(content), "nodes": num_nodes, "notes": notes}
        made = write_verified(path, lambda to: to.write_bytes(content), load, source, info, options, **about)
        return OnnxArtifact(made.path, info, made.num_bytes, made.agreement, tuple(notes), num_nodes)


def export_onnx(
    model: nn.Module | ModelSource | str | Path,
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
    """Export a model to one ONNX file, and compare its outputs with PyTorch's.

    Args:
        model: any timm classifier, which is not changed; 'model.tag', a weight folder, or a Hub repository.
        path: file to write.
        opset: 20, which common runtimes support; 23, where attention is one operator; or 18. None uses 20, or 23 for
            bf16.
        precision: 'fp32'; 'fp16' or 'bf16', which keep norms and softmax in float32; 'int8', for matrix products and
            convolutions.
        batch: batch size; None for any.
        image_size: height and width; 'dynamic' for any multiples of the patch size; None for the model's.
        preprocess: put resizing, cropping and normalising into the graph, from uint8 images [B, h, w, C].
        calibration: representative images for int8.
        dynamic_int8: compute the scales of activations at run time, without calibration.
        verify: number of images to compare on; 0 for none, which marks the file as `.unverified`.
        images: images to compare on. Default: generated ones; for int8, every fifth calibration image, which is then
            not used for calibration.
        providers: to verify with; only the first is used. None uses the fastest that works.
        input_name: name of the graph's input; transformers uses 'pixel_values'.
        force: replace an existing file.

    Returns:
        The artifact; if it does not agree with PyTorch, its file has the suffix `.unverified`.

    Raises:
        ExportError: on incompatible options, a path that exists or cannot be written, or a graph that the provider
            cannot run. WeightsError, SpecError, DataError: on an invalid model, size or image.
    """
    artifact = export_model(
        model, path, OnnxTarget.name, opset=opset, precision=precision, batch=batch, image_size=image_size,
        preprocess=preprocess, calibration=calibration, dynamic_int8=dynamic_int8, verify=verify, images=images,
        providers=providers, input_name=input_name, force=force,
    )  # fmt: skip
    assert isinstance(artifact, OnnxArtifact)
    return artifact


def hold_out(options: Options) -> Options:
    """Hold out every fifth calibration image for the comparison, if there are enough and no others were given.

    Generated images are often near a class boundary.
    """
    if not options.verify or options.calibration is None or options.images is not None:
        return options
    held_out = dataclasses.replace(options.calibration, fifth=True)
    with contextlib.suppress(DataError):  # too few
        held_out.pick(1)
        rest = dataclasses.replace(options.calibration, fifth=False)
        return dataclasses.replace(options, calibration=rest, images=held_out)
    return options


# ---- the graph ----


def checked_graph(source: ModelSource, options: OnnxOptions) -> Built:
    """The graph, after a test that ONNX Runtime can run it, and what was chosen. Raises as `export_onnx`."""
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
    """Raise UnrunnableError if ONNX Runtime cannot run it on this machine."""
    where, providers = f"opset {opset} with {options.precision}", options.providers
    sessions.open_session(graph.to_bytes(proto), providers, strict=providers is not None, where=where)


def _what_works(source: ModelSource, options: OnnxOptions) -> str:
    """Suggest another opset or precision that runs on this machine; tries the likelier cause first."""
    opset, precision = options.opset_number, options.precision
    lower: list[tuple[int, Any]] = [(opset, other) for other in ("fp16", "fp32") if other != precision]
    # Another opset for int8 would need calibration again, and bf16 has only one.
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
    """Build the checked graph of a model, with its metadata.

    Raises:
        ExportError: if it cannot be built. SpecError: if the image size is not a multiple of the patch size.
    """
    info = _describe(source, options, opset)
    return _finished(_network(source, options, opset)[0], info, options.input_name)


def _int8(source: ModelSource, options: OnnxOptions, opset: int) -> Built:
    """Quantise the graph to int8; without calibration images, ranges are computed at run time."""
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


def _network(source: ModelSource, options: OnnxOptions, opset: int) -> tuple[onnx.ModelProto, nn.Module]:
    """The graph from preprocessed images to logits, in float32 for int8, and the form that it was traced from."""
    info = _describe(source, options, opset)
    dtype = _DTYPES[options.precision]
    form = export_form(source.model, "operator" if opset >= 23 else "products", dtype, options.image_size)
    # numpy has no bfloat16, so inputs are float32.
    images_dtype = torch.float32 if dtype == torch.bfloat16 else dtype
    shape = (options.batch or 2, *info.input_size)
    check_memory(form, shape, torch.device("cpu"), *SMALLER_BATCH)
    images = torch.zeros(shape, dtype=images_dtype)
    return graph.clean(trace(form, images, info)), form


def _finished(proto: onnx.ModelProto, info: ExportInfo, input_name: str) -> onnx.ModelProto:
    """Add the preprocessing in front of the network, if requested, and the metadata; check the result."""
    if info.preprocess:
        element = proto.graph.input[0].type.tensor_type.elem_type
        graph.join(preprocessing_graph(info, element), proto, (PREPARED, INPUT))
    graph.rename_input(proto, input_name)
    graph.set_metadata(proto, info.to_texts())
    graph.check(proto)
    return proto
