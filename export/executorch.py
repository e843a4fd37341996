"""Export to ExecuTorch: a `.pte` program for phones and other devices, whose layers run in XNNPACK.

https://docs.pytorch.org/executorch
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import final

import numpy as np
import torch

from glit_models.errors import ExportError, first_line

from .extras import require
from .form import export_form
from .metadata import ExportInfo
from .source import ModelSource
from .targets import Artifact, FixedOptions, Target, register_target, write_verified

__all__ = ["ExecutorchModel", "ExecutorchTarget"]


@final
class ExecutorchModel:
    """A program that ExecuTorch runs on the CPU.

    Args:
        path: path of the `.pte` file. info: its metadata, which are in the report next to it.

    Raises:
        ExportError: if ExecuTorch is missing or cannot read the file.
    """

    provider = "ExecuTorch XNNPACK"
    input_dtype = np.dtype(np.float32)

    def __init__(self, path: str | os.PathLike[str], info: ExportInfo) -> None:
        runtime = require("executorch.runtime", "executorch")
        self.info = info
        try:
            self._program = runtime.Runtime.get().load_program(str(path))  # the method needs it to stay alive
            self._forward = self._program.load_method("forward")
        except (RuntimeError, ValueError, OSError) as error:
            raise ExportError(f"{path}: ExecuTorch cannot read it ({first_line(error)})") from None

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits [B, K] in float32 of preprocessed images [B, C, H, W] in float32; any B."""
        return self.info.run_in_batches(images, self._run)

    def _run(self, batch: np.ndarray) -> np.ndarray:
        logits: np.ndarray = self._forward.execute([torch.from_numpy(np.ascontiguousarray(batch))])[0].numpy()
        return logits


@register_target
class ExecutorchTarget(Target):
    """An ExecuTorch program for phones, in float32 with XNNPACK."""

    name = "executorch"
    suffix = ".pte"
    options = FixedOptions
    packages = ("executorch",)
    extra = "executorch"

    def export(self, source: ModelSource, path: Path, options: FixedOptions) -> Artifact:
        """Write the program; `path` gets the suffix `.unverified` if it does not agree with PyTorch."""
        info = source.describe(0, "fp32", options.batch, options.image_size, False)
        content = _lowered(source, info, options)

        def load(temporary: Path) -> ExecutorchModel:
            return ExecutorchModel(temporary, info)

        return write_verified(path, lambda to: to.write_bytes(content), load, source, info, options)


def _lowered(source: ModelSource, info: ExportInfo, options: FixedOptions) -> bytes:
    """The content of the program. Raises ExportError if ExecuTorch cannot convert the model."""
    form = export_form(source.model, "products", image_size=options.image_size).eval()
    images = options.images_for(form, info)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from ExecuTorch, about its own deprecated calls
        exir = require("executorch.exir", "executorch")
        xnnpack = require("executorch.backends.xnnpack.partition.xnnpack_partitioner", "executorch")
        try:
            program = torch.export.export(form, (images,))
            edge = exir.to_edge_transform_and_lower(program, partitioner=[xnnpack.XnnpackPartitioner()])
            return bytes(edge.to_executorch().buffer)
        except Exception as error:  # its passes can raise anything
            raise ExportError(f"ExecuTorch cannot convert {source.name}: {first_line(error)}") from None
