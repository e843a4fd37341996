"""A custom export target: a TorchScript file, loaded by `torch.jit.load` without this package.

PYTHONPATH=tests/extensions glit export MODEL --format torchscript_target:TorchScriptTarget --out model.pt
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from glit_models.export import Artifact, ExportForm, ExportInfo, ModelSource, Target, TargetOptions, write_verified

from glit_models.errors import ExportError


@dataclass(frozen=True)
class TorchScriptOptions(TargetOptions):
    """`optimize` makes the weights constants of the program."""

    optimize: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.optimize, bool):
            raise ExportError(f"optimize must be true or false, got {self.optimize!r}")


class TorchScriptTarget(Target):
    """A traced program."""

    name = "torchscript"
    suffix = ".pt"
    options = TorchScriptOptions

    def export(self, source: ModelSource, path: Path, options: TorchScriptOptions) -> Artifact:
        """Trace the model and write it with what the file says of itself."""
        info = source.describe(opset=0, precision="fp32", batch=None, image_size=None, preprocess=False)
        form = ExportForm(source.model, "fused").eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes that become constants: they are fixed here
            program = torch.jit.trace(form, torch.zeros(2, *info.input_size), check_trace=False)
        if options.optimize:
            program = torch.jit.freeze(program)
        extra = {"glit.json": json.dumps(info.to_texts())}

        def write(to: Path) -> None:
            torch.jit.save(program, str(to), _extra_files=extra)

        return write_verified(path, write, TorchScriptFile, source, info, options)


class TorchScriptFile:
    """Such a file, loaded to be compared."""

    provider = "TorchScript"
    input_dtype = np.dtype(np.float32)

    def __init__(self, path: Path) -> None:
        extra = {"glit.json": ""}
        self.program = torch.jit.load(str(path), _extra_files=extra)
        self.info = ExportInfo.from_texts(json.loads(extra["glit.json"]), str(path))

    @torch.inference_mode()
    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits [B, K] of prepared images [B, C, H, W]."""
        logits: np.ndarray = self.program(torch.from_numpy(images)).numpy()
        return logits
