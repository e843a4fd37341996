"""Export to LiteRT (TensorFlow Lite): a `.tflite` file for Android, the web and small devices.

https://ai.google.dev/edge/litert
"""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path
from typing import final

import numpy as np

from glit_models.errors import ExportError, first_line

from .extras import require
from .form import export_form
from .metadata import ExportInfo
from .source import ModelSource
from .targets import Artifact, FixedOptions, Target, register_target, write_verified

__all__ = ["LiteRtModel", "LiteRtTarget"]


@final
class LiteRtModel:
    """A file that LiteRT runs on the CPU.

    Args:
        path: path of the `.tflite` file. info: its metadata, which are in the report next to it.

    Raises:
        ExportError: if LiteRT is missing or cannot read the file.
    """

    provider = "LiteRT CPU"
    input_dtype = np.dtype(np.float32)

    def __init__(self, path: str | os.PathLike[str], info: ExportInfo) -> None:
        self.info = info
        try:
            self._interpreter = require("ai_edge_litert.interpreter", "litert").Interpreter(str(path))
            self._interpreter.allocate_tensors()
        except (RuntimeError, ValueError) as error:
            raise ExportError(f"{path}: LiteRT cannot read it ({first_line(error)})") from None
        self._input = self._interpreter.get_input_details()[0]["index"]
        self._output = self._interpreter.get_output_details()[0]["index"]

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits [B, K] in float32 of preprocessed images [B, C, H, W] in float32; any B. Not thread-safe."""
        return self.info.run_in_batches(images, self._run)

    def _run(self, batch: np.ndarray) -> np.ndarray:
        self._interpreter.set_tensor(self._input, batch)
        self._interpreter.invoke()
        logits: np.ndarray = self._interpreter.get_tensor(self._output)
        return logits


@register_target
class LiteRtTarget(Target):
    """A LiteRT file (TensorFlow Lite) for Android and small devices, in float32."""

    name = "litert"
    suffix = ".tflite"
    options = FixedOptions
    packages = ("litert_torch", "ai_edge_litert")
    extra = "litert"

    def export(self, source: ModelSource, path: Path, options: FixedOptions) -> Artifact:
        """Write the file; `path` gets the suffix `.unverified` if it does not agree with PyTorch."""
        info = source.describe(0, "fp32", options.batch, options.image_size, False)
        form = export_form(source.model, "products", image_size=options.image_size).eval()
        images = options.images_for(form, info)

        def write(to: Path) -> None:
            try:
                with warnings.catch_warnings(), contextlib.redirect_stdout(None):  # its progress
                    warnings.simplefilter("ignore")
                    require("litert_torch", "litert").convert(form, (images,)).export(str(to))
            except Exception as error:  # its passes can raise anything
                raise ExportError(f"LiteRT cannot convert {source.name}: {first_line(error)}") from None

        def load(temporary: Path) -> LiteRtModel:
            return LiteRtModel(temporary, info)

        return write_verified(path, write, load, source, info, options)
