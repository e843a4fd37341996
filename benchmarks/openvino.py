"""Compare precisions of OpenVINO and of ONNX Runtime, and our int8 with NNCF's, on the shipped Fashion-MNIST weights.

Size, agreement with PyTorch on test images, and speed in one interleaved run. int8 is calibrated on training images.
The rows of NNCF need `pip install nncf`.

    python -m benchmarks.openvino --threads 1 --clock cpu
"""

import argparse
import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from glit_models.export import ImageSource, OnnxClassifier, export_model, export_onnx
from glit_models.export.images import prepare
from glit_models.export.metadata import ExportInfo
from glit_models.export.source import open_source
from glit_models.export.verify import torch_logits

from . import report

MODEL = "glit_tiny.fashion_mnist"
CALIBRATION_IMAGES = 256
BATCHES = (1, 16)
Run = Callable[[np.ndarray], np.ndarray]  # images [B, C, H, W] to logits [B, K]


@dataclass(frozen=True)
class Form:
    """A file in a runtime: its size, and a function that runs one batch."""

    num_bytes: int
    run: Run


def main() -> None:
    """Export, measure and print."""
    parser = report.parser(__doc__.splitlines()[0] if __doc__ else None, rounds=15)
    report.add_clock(parser)
    parser.add_argument("--images", type=int, default=2000, help="test images to compare on")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        report.show("openvino", options, _rows(Path(folder), options))


def _rows(folder: Path, options: argparse.Namespace) -> list[report.Row]:
    source = open_source(MODEL)
    info = source.describe(20, "fp32", None, None, False)
    shown = ImageSource("fashion-mnist").pick(options.images)
    labels, images = np.array([label for _, label in shown]), prepare(info, shown.images())
    expected = torch_logits(source.model, images)
    forms = _forms(folder, info, options.threads)
    seconds = {
        batch: report.interleaved(
            {name: partial(form.run, images[:batch]) for name, form in forms.items()}, options.rounds, options.clock
        )
        for batch in BATCHES
    }
    rows: list[report.Row] = []
    for name, form in forms.items():
        logits = np.concatenate([form.run(images[start : start + 16]) for start in range(0, len(images), 16)])
        row: dict[str, str | int | float] = {
            f"{MODEL} on {len(images)} test images": name,
            "MB": f"{form.num_bytes / 1e6:.2f}",
            "same class as PyTorch": f"{100 * (logits.argmax(1) == expected.argmax(1)).mean():.2f} %",
            "rms difference of a logit": f"{np.sqrt(((logits - expected) ** 2).mean()):.1e}",
            "top-1": f"{100 * (logits.argmax(1) == labels).mean():.2f} %",
        }
        rows.append(row | {f"batch {batch}, ms": 1e3 * seconds[batch][name] for batch in BATCHES})
    return rows


def _forms(folder: Path, info: ExportInfo, threads: int) -> dict[str, Form]:
    training = ImageSource("fashion-mnist", training=True)
    forms: dict[str, Form] = {}
    for precision in ("fp32", "int8"):
        common: dict[str, Any] = {"precision": precision, "verify": 1}
        common |= {"calibration": training} if precision == "int8" else {}
        onnx = export_onnx(MODEL, folder / f"{precision}.onnx", **common)
        classifier = OnnxClassifier(onnx.path, ["cpu"], threads=threads)
        forms[f"ONNX Runtime, {precision}"] = Form(onnx.num_bytes, classifier.run_batch)
        xml = export_model(MODEL, folder / precision, "openvino", **common).path / "model.xml"
        forms[f"OpenVINO, {precision}"] = _openvino(xml, "f32", threads)
        if precision == "fp32":
            forms["OpenVINO, fp32 file computed in bf16"] = _openvino(xml, "bf16", threads)
    if importlib.util.find_spec("nncf"):
        calibration = prepare(info, training.pick(CALIBRATION_IMAGES).images())
        forms["OpenVINO, int8 by NNCF"] = _openvino(_nncf(folder, calibration, None), "f32", threads)
        forms["OpenVINO, int8 by NNCF for transformers"] = _openvino(
            _nncf(folder, calibration, "transformer"), "f32", threads
        )
    return forms


def _openvino(path: Path, precision: str, threads: int) -> Form:
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": precision}
    model = openvino.Core().compile_model(str(path), "CPU", settings)

    def run(images: np.ndarray) -> np.ndarray:
        logits: np.ndarray = model(images)[0]
        return logits

    return Form(sum(path.with_suffix(suffix).stat().st_size for suffix in (".xml", ".bin")), run)


def _nncf(folder: Path, images: np.ndarray, kind: str | None) -> Path:
    """The float32 file quantised by NNCF; `kind` is its name for a type of model."""
    import nncf

    quantised = nncf.quantize(
        openvino.Core().read_model(str(folder / "fp32" / "model.xml")),
        nncf.Dataset([image[None] for image in images]),
        model_type=nncf.ModelType(kind) if kind else None,
        subset_size=len(images),
    )
    path = folder / f"nncf-{kind}.xml"
    openvino.save_model(quantised, str(path), compress_to_fp16=False)
    return path


if __name__ == "__main__":
    main()
