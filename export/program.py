"""`export_torch`: export a model as a `torch.export` program, or compiled by AOTInductor; loads without this package.

The counterpart of `onnx.py` for users of torch.

Axes: B batch, C channels, H/W image height and width, K classes.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from glit_models.activations import check_memory
from glit_models.errors import Argument, ExportError, first_line

from .form import export_form
from .images import ImageSource
from .metadata import SMALLER_BATCH, ExportInfo, Precision, check_batch
from .source import ModelSource
from .targets import Artifact, Target, TargetOptions, export_model, register_target, write_verified

__all__ = ["CompiledTarget", "Program", "TorchOptions", "TorchTarget", "export_torch"]

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_INFO = "glit.json"
# Where in torch's and this package's source each node came from, with paths of this machine.
_TRACES = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "torch_fn")


@dataclass(frozen=True)
class TorchOptions(TargetOptions):
    """Options of the export; see `export_torch`."""

    precision: Precision = "fp32"
    batch: int | None = None
    image_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision not in _DTYPES:
            raise ExportError(
                Argument("precision"),
                f" of a torch program must be one of {', '.join(_DTYPES)}, got {self.precision!r}",
            )
        check_batch(self.batch)
        if self.image_size is not None and not isinstance(self.image_size, tuple):
            raise ExportError(
                Argument("image_size"), f" of a torch program must be a height and width, got {self.image_size!r}"
            )


@register_target
class TorchTarget(Target):
    """A `torch.export` program that any torch can load."""

    name = "torch"
    suffix = ".pt2"
    options = TorchOptions

    def check_path(self, path: Path, options: TorchOptions) -> None:
        """Also raises ExportError unless the path ends in .pt2."""
        if path.suffix != self.suffix:
            raise ExportError(f"{path}: torch loads such programs only from files that end in {self.suffix}")
        super().check_path(path, options)

    def export(self, source: ModelSource, path: Path, options: TorchOptions) -> Artifact:
        """See `export_torch`."""
        info = source.describe(0, options.precision, options.batch, options.image_size, False)
        program = _traced(export_form(source.model, "fused", _DTYPES[options.precision], options.image_size), info)
        return write_verified(path, self._writer(program, info), Program, source, info, options)

    def _writer(self, program: torch.export.ExportedProgram, info: ExportInfo) -> Callable[[Path], None]:
        extra = {_INFO: json.dumps(info.to_texts())}
        return _in_memory(lambda file: torch.export.save(program, file, extra_files=extra))


def _in_memory(save: Callable[[BytesIO], object]) -> Callable[[Path], None]:
    """Let torch save into memory, then write the bytes: on a full disk, torch's writer would abort the process."""

    def write(path: Path) -> None:
        file = BytesIO()
        save(file)
        path.write_bytes(file.getbuffer())

    return write


@register_target
class CompiledTarget(TorchTarget):
    """A program compiled for this type of machine by AOTInductor; needs a C++ compiler."""

    name = "aoti"

    def check_path(self, path: Path, options: TorchOptions) -> None:
        """Also raises ExportError if there is no C++ compiler."""
        if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
            raise ExportError("a compiled package needs a C++ compiler; install g++, or leave the program uncompiled")
        super().check_path(path, options)

    def _writer(self, program: torch.export.ExportedProgram, info: ExportInfo) -> Callable[[Path], None]:
        return _compile(program, info)


def export_torch(
    model: nn.Module | ModelSource | str | Path,
    path: str | os.PathLike[str],
    *,
    compiled: bool = False,
    precision: Precision = "fp32",
    batch: int | None = None,
    image_size: tuple[int, int] | None = None,
    verify: int = 64,
    images: ImageSource | None = None,
    force: bool = False,
) -> Artifact:
    """Export a model to a `.pt2` file, and compare its outputs with the model's.

    Args:
        model: any timm classifier, which is not changed; 'model.tag', a weight folder, or a Hub repository.
        path: file to write, which must end in `.pt2`.
        compiled: compile it for this type of machine (AOTInductor; needs a C++ compiler) instead of writing a program
            that any torch can load.
        precision: 'fp32', 'fp16' or 'bf16'.
        batch: batch size; None for any.
        image_size: height and width; None for the model's.
        verify: number of images to compare on; 0 for none.
        images: images to compare on; None generates some.
        force: replace an existing file.

    Raises:
        ExportError: on incompatible options, a path that exists or cannot be written, or a missing compiler.
            WeightsError, SpecError, DataError: on an invalid model, size or image.
    """
    target = CompiledTarget.name if compiled else TorchTarget.name
    return export_model(
        model, path, target, precision=precision, batch=batch, image_size=image_size, verify=verify, images=images,
        force=force,
    )  # fmt: skip


def _traced(form: nn.Module, info: ExportInfo) -> torch.export.ExportedProgram:
    shape = (info.batch or 2, *info.input_size)
    check_memory(form, shape, torch.device("cpu"), *SMALLER_BATCH)
    images = torch.zeros(shape)
    dims = None if info.batch else ({0: torch.export.Dim("batch", min=1, max=2**16)},)
    program = torch.export.export(form.eval(), (images,), dynamic_shapes=dims)
    for module in program.graph_module.modules():
        for node in getattr(module, "graph", torch.fx.Graph()).nodes:
            for key in _TRACES:
                node.meta.pop(key, None)
    return program


def _compile(program: torch.export.ExportedProgram, info: ExportInfo) -> Callable[[Path], None]:
    from torch._inductor import aoti_compile_and_package

    def save(file: BytesIO) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # from the compiler, about its choices
                configs = {"aot_inductor.metadata": info.to_texts()}
                aoti_compile_and_package(program, package_path=file, inductor_configs=configs)
        except (RuntimeError, OSError, ImportError) as error:
            raise ExportError(f"the program cannot be compiled here: {first_line(error)}") from None

    return _in_memory(save)


class Program:
    """A file written by `export_torch`, loaded to run on the CPU. Final.

    Attributes:
        info: metadata of the file. provider: 'torch' or 'AOTInductor'. input_dtype: type of the input of `logits`.

    Raises:
        ExportError: if the program is incomplete, or was not written by this package.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.input_dtype = np.dtype(np.float32)
        if not self.path.is_file():
            raise ExportError(f"{self.path}: no such file")
        self.provider: str
        self._call: Callable[[Tensor], Tensor]
        try:
            texts = self._load()
        except Exception as error:  # torch's readers can raise anything on a damaged file
            raise ExportError(f"{self.path}: not a whole torch program ({first_line(error)})") from None
        self.info = ExportInfo.from_texts(texts, str(self.path))

    def _load(self) -> dict[str, str]:
        extra: dict[str, Any] = {_INFO: ""}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # from torch 2.11, about its buffers
                program = torch.export.load(self.path, extra_files=extra)
        except Exception:
            from torch._inductor import aoti_load_package

            package = aoti_load_package(str(self.path))
            self.provider, self._call = "AOTInductor", package
            return dict(package.get_metadata())
        self.provider, self._call = "torch", program.module()
        texts: dict[str, str] = json.loads(extra[_INFO] or "{}")
        return texts

    @torch.inference_mode()
    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits [B, K] in float32 of preprocessed images [B, C, H, W] in float32; any B."""
        return self.info.run_in_batches(
            images, lambda batch: self._call(torch.from_numpy(np.ascontiguousarray(batch))).numpy()
        )
