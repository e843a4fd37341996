"""Export to OpenVINO's format: `model.xml` and `model.bin` in a folder, for Intel's CPUs and GPUs.

OpenVINO converts the ONNX graph of `onnx.py`. https://docs.openvino.ai
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from glit_models.errors import Argument, ExportError, first_line
from glit_models.reading import parse_json
from glit_models.runs.files import scratch_folder, whole_folder
from glit_models.weights.folder import to_json

from .extras import require
from .graph import to_bytes
from .metadata import ExportInfo
from .onnx import OnnxOptions, OnnxTarget, checked_graph, hold_out
from .source import ModelSource
from .targets import Artifact, Target, register_target
from .verify import compare
from .writing import UNVERIFIED

__all__ = ["OpenVinoModel", "OpenVinoOptions", "OpenVinoTarget"]

_PRECISIONS = ("fp32", "fp16", "int8")
_INFO = "glit"  # key of our metadata in `model.xml`


@dataclass(frozen=True)
class OpenVinoOptions(OnnxOptions):
    """Options of the export; see `OnnxOptions`. With fp16 the weights are stored in half precision."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision not in _PRECISIONS:
            raise ExportError(
                Argument("precision"),
                f" must be one of {', '.join(_PRECISIONS)}, got {self.precision!r}; OpenVINO computes in bfloat16 by "
                "itself where the processor can",
            )
        if self.preprocess or self.image_size == "dynamic":
            raise ExportError("this format takes prepared images of one size; leave the preprocessing to the program")


@final
class OpenVinoModel:
    """A model that OpenVINO runs on the CPU.

    Args:
        path: path of `model.xml`.
        exact: compute in float32 unless the file is in int8; otherwise OpenVINO chooses the precision.
        threads: CPU threads; None leaves the choice to OpenVINO.

    Raises:
        ExportError: if OpenVINO is missing or cannot read it.
    """

    provider = "OpenVINO CPU"
    input_dtype = np.dtype(np.float32)

    def __init__(self, path: str | os.PathLike[str], *, exact: bool = True, threads: int | None = None) -> None:
        openvino = require("openvino", "openvino")
        if not Path(path).is_file():
            raise ExportError(f"{path}: no such file")
        core = openvino.Core()
        # Otherwise CPUs with bfloat16 instructions compute in it.
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"} if exact else {}
        settings |= {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
        try:
            model = core.read_model(str(path))
            self.info = ExportInfo.from_texts(_texts(model), str(path))
            self._compiled = core.compile_model(model, "CPU", settings)
        except RuntimeError as error:
            raise ExportError(f"{path}: OpenVINO cannot read it ({first_line(error)})") from None

    @property
    def computes_in(self) -> str:
        """The type that OpenVINO computes in, where the file is not in int8: 'f32' or 'bf16'."""
        return str(self._compiled.get_property("INFERENCE_PRECISION_HINT").to_string())

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits [B, K] in float32 of preprocessed images [B, C, H, W] in float32; any B."""
        return self.info.run_in_batches(images, lambda batch: self._compiled(batch)[0])


def _texts(model: Any) -> dict[str, str]:
    """The metadata strings of the file; empty if it was not written by this package."""
    if not model.has_rt_info([_INFO]):
        return {}
    texts = parse_json(model.get_rt_info([_INFO]).astype(str))
    return texts if isinstance(texts, dict) else {}


@register_target
class OpenVinoTarget(Target):
    """A folder with `model.xml`, `model.bin` and `report.json`."""

    name = "openvino"
    suffix = ""
    is_folder = True
    options = OpenVinoOptions
    packages = (*OnnxTarget.packages, "openvino")
    extra = "openvino"

    def export(self, source: ModelSource, path: Path, options: OpenVinoOptions) -> Artifact:
        """Write the folder; if it does not agree with PyTorch, it is named `PATH.unverified`."""
        options = hold_out(options)
        stored_as_half = options.precision == "fp16"
        built = dataclasses.replace(options, precision="fp32") if stored_as_half else options
        graph, notes = checked_graph(source, built)
        texts = {item.key: item.value for item in graph.metadata_props}
        if stored_as_half:
            texts |= dataclasses.replace(ExportInfo.from_texts(texts, str(path)), precision="fp16").to_texts()
        with scratch_folder(path.with_name(f"{path.name}.export")) as workplace:
            _convert(to_bytes(graph), workplace, texts, stored_as_half)
            runner = OpenVinoModel(workplace / "model.xml")
            agreement = compare(runner, source, options.verify, options.images) if options.verify else None
            holds = agreement is not None and agreement.holds
            final = path if holds else path.with_name(f"{path.name}{UNVERIFIED}")
            found = None if agreement is None else dataclasses.asdict(agreement)
            report = {"verified": holds, "notes": notes, "info": dataclasses.asdict(runner.info), "agreement": found}
            with whole_folder(final, replace=True) as folder:
                for name in ("model.xml", "model.bin"):
                    os.replace(workplace / name, folder / name)
                (folder / "report.json").write_text(to_json(report), encoding="utf-8")
        num_bytes = sum(file.stat().st_size for file in final.iterdir())
        return Artifact(final, runner.info, num_bytes, agreement, tuple(notes))


def _convert(onnx_file: bytes, folder: Path, texts: dict[str, str], stored_as_half: bool) -> None:
    """Convert an ONNX graph to `model.xml` and `model.bin`. Raises ExportError if OpenVINO cannot read it."""
    openvino = require("openvino", "openvino")
    (folder / "model.onnx").write_bytes(onnx_file)
    try:
        model = openvino.Core().read_model(str(folder / "model.onnx"))
    except RuntimeError as error:
        raise ExportError(f"OpenVINO cannot read the graph ({first_line(error)})") from None
    model.set_rt_info(json.dumps(texts), [_INFO])
    openvino.save_model(model, str(folder / "model.xml"), compress_to_fp16=stored_as_half)
