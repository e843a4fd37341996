"""Compare exported GLiT-Tiny in ONNX Runtime with eager PyTorch, in the authors' plain form and ours, and DeiT-Tiny.

With the shipped Fashion-MNIST weights, int8 calibrated on training images: speed at 224 pixels, in one interleaved run
with an untrained DeiT-Tiny; agreement and accuracy at 64 pixels on test images. File sizes are shown too.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from glit_models.export import ImageSource, OnnxArtifact, OnnxClassifier, export_onnx
from torch import nn

from glit_models import GLiT

from . import report
from .plain import plain_glit

SHIPPED = "glit_tiny.fashion_mnist"
BASELINE = "DeiT-Tiny, ONNX Runtime, fp32"
PRECISIONS = ("fp32", "fp16", "int8")


def main() -> None:
    """Measure and print."""
    parser = report.parser(__doc__.splitlines()[0] if __doc__ else None, rounds=15)
    report.add_clock(parser)
    parser.add_argument("--batch-sizes", default="1,16", help="numbers, separated by commas")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="of fp32, fp16, int8")
    parser.add_argument("--opsets", default="20", help="numbers, separated by commas")
    parser.add_argument("--images", type=int, default=2000, help="test images to compare on")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        report.show("export", options, _speed(Path(folder), options))
        if not options.json:
            print()
        report.show("export", options, _agreement(Path(folder), options))


def _speed(folder: Path, options: argparse.Namespace) -> list[report.Row]:
    model = timm.create_model(SHIPPED, pretrained=True, img_size=224).eval()
    calibration = ImageSource("fashion-mnist", training=True)
    baseline = timm.create_model("deit_tiny_patch16_224").eval()
    files = {BASELINE: export_onnx(baseline, folder / "deit.onnx", verify=0)}
    for opset in map(int, options.opsets.split(",")):
        for precision in options.precisions.split(","):
            name = f"ONNX Runtime, opset {opset}, {precision}"
            int8 = {"calibration": calibration} if precision == "int8" else {}
            path = folder / f"{opset}-{precision}.onnx"
            files[name] = export_onnx(model, path, opset=opset, precision=precision, verify=0, **int8)
    networks = {"PyTorch, plain form": plain_glit(model), "PyTorch, glit_models": model}
    sizes = [int(size) for size in options.batch_sizes.split(",")]
    seconds = {}
    for size in sizes:
        cases = _cases(networks, files, size, options.threads)
        seconds[size] = report.interleaved(cases, options.rounds, options.clock)
    rows: list[report.Row] = []
    for name in seconds[sizes[0]]:
        row: dict[str, str | int | float] = {"what": name, "MB": files[name].num_bytes / 1e6 if name in files else ""}
        for size in sizes:
            row[f"batch {size}, ms"] = seconds[size][name] * 1e3
            for other, seen in (("plain", "PyTorch, plain form"), ("DeiT", BASELINE)):
                row[f"times faster than {other}, batch {size}"] = seconds[size][seen] / seconds[size][name]
        rows.append(row)
    return rows


def random_glit(**keywords: Any) -> GLiT:
    """GLiT-Tiny with random parameters, so that none is a zero or one that an optimiser could remove."""
    torch.manual_seed(0)
    model: GLiT = timm.create_model("glit_tiny", **keywords).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


def noise(folder: Path) -> ImageSource:
    """A few noise images for calibration; the speed does not depend on them."""
    from PIL import Image

    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for index in range(16):
        Image.fromarray(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return ImageSource(str(folder))


def _cases(
    networks: dict[str, nn.Module], files: dict[str, OnnxArtifact], size: int, threads: int
) -> dict[str, Callable[[], object]]:
    images = torch.randn(size, 3, 224, 224)

    def eager(network: nn.Module) -> object:
        with torch.inference_mode():
            return network(images)

    cases: dict[str, Callable[[], object]] = {name: partial(eager, network) for name, network in networks.items()}
    for name, artifact in files.items():
        classifier = OnnxClassifier(artifact.path, ["cpu"], threads=threads)
        given = {"images": images.numpy().astype(classifier.input_dtype)}
        cases[name] = partial(classifier.session.run, None, given)
    return cases


def _agreement(folder: Path, options: argparse.Namespace) -> list[report.Row]:
    test, training = ImageSource("fashion-mnist"), ImageSource("fashion-mnist", training=True)
    rows: list[report.Row] = []
    for precision in options.precisions.split(","):
        int8 = {"calibration": training} if precision == "int8" else {}
        path = folder / f"fashion-{precision}.onnx"
        artifact = export_onnx(SHIPPED, path, precision=precision, verify=options.images, images=test, **int8)
        found = artifact.agreement
        assert found is not None
        assert found.accuracy is not None
        assert found.torch_accuracy is not None
        rows.append(
            {
                f"{SHIPPED} on {found.num_images} test images": precision,
                "MB": artifact.num_bytes / 1e6,
                "largest difference of a logit": f"{found.max_abs:.1e}",
                "same class as PyTorch": f"{found.top1_agreement:.2f} %",
                "top-1": f"{found.accuracy:.2f} %",
                "top-1 of PyTorch": f"{found.torch_accuracy:.2f} %",
            }
        )
    return rows


if __name__ == "__main__":
    main()
