"""`export_torch`: a GLiT as a `torch.export` program, or compiled into an AOTInductor package; loaded without our code.

The counterpart of `onnx.py` for those who stay with torch, proven equal by the same comparison.

Axes: B batch, C channels, H/W image height and width, K classes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glit_models.errors import ExportError, first_line
from glit_models.model import GLiT

from .form import ExportForm
from .metadata import ExportInfo, Precision
from .pictures import Pictures
from .source import open_source
from .verify import Agreement, compare
from .writing import check_target, write_and_judge

__all__ = ["Program", "TorchArtifact", "export_torch"]

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_INFO = "glit.json"
# Where in torch's sources and ours each node came from, with paths of this machine.
_TRACES = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "torch_fn")


@dataclass(frozen=True)
class TorchArtifact:
    """An exported program; see `OnnxArtifact`. `compiled` says whether it is an AOTInductor package."""

    path: Path
    info: ExportInfo
    num_bytes: int
    compiled: bool
    agreement: Agreement | None


def export_torch(
    model: GLiT | str | Path,
    path: str | os.PathLike[str],
    *,
    compiled: bool = False,
    precision: Precision = "fp32",
    batch: int | None = None,
    image_size: tuple[int, int] | None = None,
    verify: int = 64,
    pictures: Pictures | None = None,
    force: bool = False,
) -> TorchArtifact:
    """Export a GLiT to a `.pt2` file, and compare what it computes with the model.

    Args:
        model: a GLiT, which stays as it is; 'model.tag', a weight folder, or a Hub repository.
        path: of the file, which must end in `.pt2`.
        compiled: compile it for this machine's kind (AOTInductor; needs a C++ compiler) instead of writing a program
            that any torch can load.
        precision: 'fp32', 'fp16' or 'bf16'. batch: images at a time; None for any number.
        image_size: height and width; None for the model's own.
        verify, pictures, force: see `export_onnx`.

    Raises:
        ExportError: on options that do not go together, a target that exists or cannot be written, or a missing
            compiler. WeightsError, SpecError, DataError: on a bad model, size or picture.
    """
    path = Path(path)
    if precision not in _DTYPES:
        raise ExportError(f"a torch program is of {', '.join(_DTYPES)}, not {precision!r}; ONNX has that")
    if path.suffix != ".pt2":
        raise ExportError(f"{path}: torch loads such programs only from files that end in .pt2")
    if verify < 0 or (batch is not None and batch < 1):
        raise ExportError("verify must be 0 or more pictures, and batch at least 1")
    if compiled and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        raise ExportError("a compiled package needs a C++ compiler; install g++, or leave the program uncompiled")
    check_target(path, force)
    source = open_source(model)
    if pictures is not None:
        pictures.pick(1)  # a wrong folder is said now, not when the work is done
    info = source.describe(0, precision, batch, image_size, False)
    program = _traced(ExportForm(source.model, "fused", _DTYPES[precision], image_size), info)
    write = _compile(program, info) if compiled else _save(program, info)

    def judge(temporary: Path) -> Agreement | None:
        return compare(Program(temporary), source, verify, pictures) if verify else None

    about = {"compiled": compiled, "info": dataclasses.asdict(info)}
    final, agreement = write_and_judge(path, write, judge, about)
    return TorchArtifact(final, info, final.stat().st_size, compiled, agreement)


def _traced(form: ExportForm, info: ExportInfo) -> torch.export.ExportedProgram:
    images = torch.zeros((info.batch or 2, *info.input_size))
    dims = None if info.batch else ({0: torch.export.Dim("batch", min=1, max=2**16)},)
    program = torch.export.export(form.eval(), (images,), dynamic_shapes=dims)
    for module in program.graph_module.modules():
        for node in getattr(module, "graph", torch.fx.Graph()).nodes:
            for key in _TRACES:
                node.meta.pop(key, None)
    return program


def _save(program: torch.export.ExportedProgram, info: ExportInfo) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        torch.export.save(program, path, extra_files={_INFO: json.dumps(info.to_texts())})

    return write


def _compile(program: torch.export.ExportedProgram, info: ExportInfo) -> Callable[[Path], None]:
    from torch._inductor import aoti_compile_and_package

    def write(path: Path) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler's, of what it chose
                configs = {"aot_inductor.metadata": info.to_texts()}
                aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)
        except (RuntimeError, OSError, ImportError) as error:
            raise ExportError(f"the program cannot be compiled here: {first_line(error)}") from None

    return write


class Program:
    """A file that `export_torch` wrote, loaded to be run on the CPU. Final.

    Attributes:
        info: what the file says of itself. provider: 'torch' or 'AOTInductor'. input_dtype: of what `logits` takes.

    Raises:
        ExportError: if it is no whole program, or none of ours.
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
        except Exception as error:  # torch's readers raise what they like on a damaged file
            raise ExportError(f"{self.path}: not a whole torch program ({first_line(error)})") from None
        self.info = ExportInfo.from_texts(texts, str(self.path))

    def _load(self) -> dict[str, str]:
        extra: dict[str, Any] = {_INFO: ""}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch 2.11's, of its own buffers
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
        """Logits [B, K] in float32 of prepared images [B, C, H, W] in float32; any B."""
        size = self.info.batch or 32
        found = [np.zeros((0, self.info.num_classes), np.float32)]
        for start in range(0, len(images), size):
            part = images[start : start + size]
            padded = np.resize(part, (size, *part.shape[1:])) if self.info.batch else part
            found.append(self._call(torch.from_numpy(np.ascontiguousarray(padded)))[: len(part)].numpy())
        return np.concatenate(found)
