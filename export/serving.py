"""Write a model repository for NVIDIA's Triton Inference Server: the exported file, its configuration and its labels.

Triton runs the file with its ONNX Runtime backend.
https://github.com/triton-inference-server/server/blob/main/docs/user_guide/model_configuration.md
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from glit_models.errors import Argument, ExportError, printable
from glit_models.runs.files import scratch_folder, whole_folder

from .metadata import OUTPUT, ExportInfo
from .onnx import OnnxArtifact, OnnxOptions, OnnxTarget
from .source import ModelSource
from .targets import Target, export_model, register_target

__all__ = ["TritonOptions", "TritonTarget", "export_triton", "served_name", "triton_config"]

CONFIG, LABELS, MODEL, VERSION = "config.pbtxt", "labels.txt", "model.onnx", "1"
_TYPES = {"fp32": "TYPE_FP32", "fp16": "TYPE_FP16", "bf16": "TYPE_FP32", "int8": "TYPE_FP32"}  # of the input
_WARM_IMAGE = (256, 256)  # for a model with preprocessing, which accepts any size


@dataclass(frozen=True)
class TritonOptions(OnnxOptions):
    """Options of the exported file, and how Triton runs it.

    Attributes:
        name: name of the model in the repository; default: that of its weights, in letters, digits and '_'; for a run's
            folder RUN/model, RUN.
        max_batch_size: maximum batch size of the server.
        max_delay_us: microseconds that a request waits for others to join it.
        instances: number of model instances on each GPU, or on the CPU.
        gpu: whether to run on GPUs; None lets the server use GPUs if it has any, else the CPU.
        tensorrt: let TensorRT compile the model for GPUs.
        engine_cache: folder on the server for TensorRT's engines; building them takes minutes at each start.
    """

    name: str | None = None
    max_batch_size: int = 64
    max_delay_us: int = 500
    instances: int = 1
    gpu: bool | None = None
    tensorrt: bool = True
    engine_cache: str = "/engines"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("max_batch_size", 1), ("max_delay_us", 0), ("instances", 1)):
            if getattr(self, name) < least:
                raise ExportError(Argument(name), f" must be at least {least}, got {getattr(self, name)}")
        if self.batch is not None:
            raise ExportError("Triton makes the batches itself; leave the batch dynamic")
        if self.image_size == "dynamic":
            raise ExportError("Triton joins images of one size into a batch; give one, or leave the size out")
        if self.name is not None and not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ExportError(f"{self.name!r} is not a name for a model; take letters, digits and '_'")


@register_target
class TritonTarget(Target):
    """A model in a repository of NVIDIA's Triton server.

    `path` is the repository.
    """

    name = "triton"
    suffix = ""
    options = TritonOptions
    packages = OnnxTarget.packages

    def check_path(self, path: Path, options: TritonOptions) -> None:
        """Raise ExportError if the repository is a file, or has a model of this name."""
        if path.exists() and not path.is_dir():
            raise ExportError(f"{path} is a file; give the folder of the repository")
        if options.name is not None:
            _check_place(path / options.name, options)

    def export(self, source: ModelSource, path: Path, options: TritonOptions) -> OnnxArtifact:
        """See `export_triton`."""
        name = options.name or served_name(source.name)
        target = path / name
        _check_place(target, options)
        with scratch_folder(target.with_name(f"{name}.export")) as workplace:  # next to it, on the same disk
            artifact = OnnxTarget().export(source, workplace / VERSION / MODEL, options)
            return _arranged(artifact, target, options)


def export_triton(
    model: nn.Module | ModelSource | str | Path, repository: str | os.PathLike[str], **options: Any
) -> OnnxArtifact:
    """Export a model to a Triton model repository.

    Args:
        model: as for `export_onnx`.
        repository: the folder, created if missing; other models in it are kept.
        options: those of `TritonOptions`, which include those of `export_onnx`; `force` replaces an existing model.

    Returns:
        The artifact. If it does not agree with PyTorch, it is stored as `REPOSITORY/NAME.unverified`, which Triton does
        not serve as `NAME`.

    Raises:
        ExportError: as `export_onnx`.
        WriteError: if the repository cannot be written.
    """
    artifact = export_model(model, repository, TritonTarget.name, **options)
    assert isinstance(artifact, OnnxArtifact)
    return artifact


def served_name(source: str) -> str:
    """The default name of a model at a server: that of its weights, in letters, digits and '_'."""
    path = Path(source)
    return re.sub(r"\W+", "_", path.parent.name if path.name == "model" and path.parent.name else path.name)


def _check_place(target: Path, options: TritonOptions) -> None:
    if target.exists() and not options.force:
        raise ExportError(
            f"{target} exists; ", Argument("force", True), " replaces it, ", Argument("name", ...), " names another"
        )  # fmt: skip


def _arranged(artifact: OnnxArtifact, target: Path, options: TritonOptions) -> OnnxArtifact:
    """Move the exported file into its folder, or into one whose name prevents it from being served."""
    holds = artifact.agreement is not None and artifact.agreement.holds
    final = target if holds else target.with_name(f"{target.name}.unverified")
    report = artifact.path.with_name(f"{artifact.path.name}.json")
    with whole_folder(final, replace=True) as folder:
        (folder / VERSION).mkdir()
        os.replace(artifact.path, folder / VERSION / MODEL)
        os.replace(report, folder / "report.json")  # a version's folder contains only the model
        (folder / CONFIG).write_text(triton_config(artifact.info, final.name, options), encoding="utf-8")
        labels = "".join(f"{printable(label)}\n" for label in artifact.info.labels)
        (folder / LABELS).write_text(labels, encoding="utf-8")
    return replace(artifact, path=final / VERSION / MODEL)


def triton_config(info: ExportInfo, name: str, options: TritonOptions) -> str:
    """The text of `config.pbtxt`.

    Args:
        info: of the exported file; a fixed batch or a dynamic size is not supported. name: name of the model.
    """
    channels = info.input_size[0]
    dims = (-1, -1, channels) if info.preprocess else info.input_size
    element = "TYPE_UINT8" if info.preprocess else _TYPES[info.precision]
    warm = (*_WARM_IMAGE, channels) if info.preprocess else info.input_size
    preferred = [size for size in (8, 16, 32, 64, 128) if size <= options.max_batch_size] or [options.max_batch_size]
    kind = {None: "KIND_AUTO", True: "KIND_GPU", False: "KIND_CPU"}[options.gpu]
    parts = [
        f"# {info.source}, sha256 {info.sha256}, glit-models {info.package_version}",
        f"name: {json.dumps(name)}",
        'backend: "onnxruntime"',
        f"default_model_filename: {json.dumps(MODEL)}",
        f"max_batch_size: {options.max_batch_size}",
        f'input [ {{ name: "{options.input_name}" data_type: {element} dims: {_list(dims)} }} ]',
        f'output [ {{ name: "{OUTPUT}" data_type: TYPE_FP32 dims: [ {info.num_classes} ] '
        f"label_filename: {json.dumps(LABELS)} }} ]",
        "dynamic_batching {",
        f"  preferred_batch_size: {_list(preferred)}",
        f"  max_queue_delay_microseconds: {options.max_delay_us}",
        "}",
        f"instance_group [ {{ count: {options.instances} kind: {kind} }} ]",
        *_accelerator(info, name, options),
        *_warm_up(options.input_name, element, warm, sorted({1, options.max_batch_size})),
    ]
    return "\n".join(parts) + "\n"


def _accelerator(info: ExportInfo, name: str, options: TritonOptions) -> list[str]:
    """TensorRT inside ONNX Runtime, with an engine cache, so that the next start need not build engines."""
    if options.gpu is False or not options.tensorrt:
        return []
    settings = {
        "precision_mode": "FP16" if info.precision == "fp16" else "FP32",
        "max_workspace_size_bytes": str(2**30),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": f"{options.engine_cache}/{name}",
    }
    lines = [f'        parameters {{ key: "{key}" value: {json.dumps(value)} }}' for key, value in settings.items()]
    return [
        "optimization {",
        "  execution_accelerators {",
        '    gpu_execution_accelerator [ { name: "tensorrt"',
        *lines,
        "    } ]",
        "  }",
        "}",
    ]


def _warm_up(name: str, element: str, dims: tuple[int, ...], sizes: list[int]) -> list[str]:
    """Requests that Triton runs before it reports that it is ready."""
    lines = []
    for size in sizes:
        value = f"data_type: {element} dims: {_list(dims)} zero_data: true"
        lines.append(
            f'model_warmup [ {{ name: "batch of {size}" batch_size: {size} '
            f'inputs {{ key: "{name}" value {{ {value} }} }} }} ]'
        )
    return lines


def _list(numbers: Any) -> str:
    return f"[ {', '.join(map(str, numbers))} ]"
