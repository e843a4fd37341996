"""Export to Core ML: an `.mlpackage` for iOS 16, macOS 13 and later.

coremltools converts on any system, but only macOS can run the result and so compare it with PyTorch.
https://apple.github.io/coremltools
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch

from glit_models.errors import Argument, ExportError, first_line

from .extras import require
from .form import export_form
from .metadata import INPUT, OUTPUT, ExportInfo
from .source import ModelSource
from .targets import Artifact, FixedOptions, Target, register_target, write_verified

__all__ = ["CoreMlModel", "CoreMlOptions", "CoreMlTarget"]

_PRECISIONS = {"fp32": "FLOAT32", "fp16": "FLOAT16"}
_DEBUG_FILE = "executorch_debug_handle_mapping.json"  # for ExecuTorch's debugger; not listed in the package's manifest


def _runs_here() -> bool:
    return sys.platform == "darwin"


@dataclass(frozen=True)
class CoreMlOptions(FixedOptions):
    """Options of the export. `precision` is fp32, or fp16, which Apple's Neural Engine needs."""

    precision: Literal["fp32", "fp16"] = "fp32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision not in _PRECISIONS:
            raise ExportError(
                Argument("precision"), f" must be one of {', '.join(_PRECISIONS)}, got {self.precision!r}"
            )


@final
class CoreMlModel:
    """A package that Core ML runs, on macOS only.

    Args:
        path: path of the `.mlpackage`.

    Raises:
        ExportError: if coremltools is missing or cannot read it.
    """

    provider = "Core ML"
    input_dtype = np.dtype(np.float32)

    def __init__(self, path: str | os.PathLike[str]) -> None:
        _silence()
        coremltools = require("coremltools", "coreml")
        try:
            self._model = coremltools.models.MLModel(str(path))
        except Exception as error:  # of the package, and of Core ML
            raise ExportError(f"{path}: Core ML cannot read it ({first_line(error)})") from None
        self.info = ExportInfo.from_texts(dict(self._model.user_defined_metadata), str(path))

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits [B, K] in float32 of preprocessed images [B, C, H, W] in float32; any B.

        Raises:
            ExportError: elsewhere than on macOS.
        """
        if not _runs_here():
            raise ExportError("Core ML runs on macOS only")
        return self.info.run_in_batches(images, self._run)

    def _run(self, batch: np.ndarray) -> np.ndarray:
        logits: np.ndarray = self._model.predict({INPUT: batch})[OUTPUT]
        return logits


@register_target
class CoreMlTarget(Target):
    """A Core ML package for Apple's devices; compared with PyTorch on macOS only."""

    name = "coreml"
    suffix = ".mlpackage"
    is_folder = True
    options = CoreMlOptions
    packages = ("coremltools",)
    extra = "coreml"

    def __init__(self) -> None:
        _silence()  # before the first import

    def check_path(self, path: Path, options: CoreMlOptions) -> None:
        """Also raises ExportError on another suffix, which Core ML does not read."""
        if path.suffix != self.suffix:
            raise ExportError(f"{path} must end in {self.suffix}")
        super().check_path(path, options)

    def export(self, source: ModelSource, path: Path, options: CoreMlOptions) -> Artifact:
        """Write the package; `path` gets the suffix `.unverified` if it was not compared or does not agree."""
        info = source.describe(0, options.precision, options.batch, options.image_size, False)
        package = _converted(source, info, options)
        notes = [] if _runs_here() else ["converted, not run: Core ML runs on macOS only"]
        if not _runs_here():
            options = dataclasses.replace(options, verify=0)

        def write(to: Path) -> None:
            package.save(str(to))
            (to / _DEBUG_FILE).unlink(missing_ok=True)

        artifact = write_verified(path, write, CoreMlModel, source, info, options, notes=notes)
        return dataclasses.replace(artifact, notes=tuple(notes))


def _converted(source: ModelSource, info: ExportInfo, options: CoreMlOptions) -> Any:
    """The package in memory. Raises ExportError if coremltools cannot convert the model."""
    form = export_form(source.model, "products", image_size=options.image_size).eval()
    images = options.images_for(form, info)
    coremltools = require("coremltools", "coreml")
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # its progress
            warnings.simplefilter("ignore")
            program = torch.export.export(form, (images,)).run_decompositions({})
            package = coremltools.convert(
                program,
                inputs=[coremltools.TensorType(INPUT, shape=tuple(images.shape))],
                outputs=[coremltools.TensorType(OUTPUT)],
                convert_to="mlprogram",
                compute_precision=getattr(coremltools.precision, _PRECISIONS[options.precision]),
                minimum_deployment_target=coremltools.target.iOS16,
                skip_model_load=not _runs_here(),
            )
    except Exception as error:  # its passes can raise anything
        raise ExportError(f"coremltools cannot convert {source.name}: {first_line(error)}") from None
    package.user_defined_metadata.update(info.to_texts())
    return package


def _silence() -> None:
    """Silence the warnings of coremltools' import: of parts that only macOS has, and of newer versions of torch."""
    logging.getLogger("coremltools").setLevel(logging.ERROR)
