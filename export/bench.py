"""`glit bench`: measure latency and throughput of a model in PyTorch and as exported files, in one interleaved run.

This module measures and tabulates; the command line prints. The report names the machine, because speeds depend on it.

Axes: B batch, C channels, H/W height and width.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.utils import reparameterize_model

from glit_models.activations import check_memory
from glit_models.errors import Argument, ExportError, WriteError, first_line
from glit_models.runs.figures import new_figure
from glit_models.runs.files import temporary_folder, whole_file

from .extras import runtime_build
from .metadata import ExportInfo
from .onnx import export_onnx
from .openvino import OpenVinoModel
from .products import products_runner
from .runtime import OnnxClassifier
from .source import open_source

__all__ = ["BASELINE", "PRODUCTS", "BenchRow", "bench", "draw_bench"]

BASELINE = "deit_tiny_patch16_224"
PRODUCTS = "its matrix products alone, fp32"
_CPU = "CPUExecutionProvider"
_MOST = 100_000  # maximum number of rounds, threads and images per batch


@dataclass(frozen=True)
class BenchRow:
    """One way to run a model at one batch size: milliseconds per batch, and images per second at the median."""

    what: str
    provider: str
    batch: int
    median_ms: float
    p95_ms: float

    @property
    def images_per_second(self) -> float:
        """Images per second at the median."""
        return 1e3 * self.batch / self.median_ms


def bench(
    model: str,
    *,
    files: Sequence[str | os.PathLike[str]] = (),
    openvino: Sequence[str | os.PathLike[str]] = (),
    batches: Sequence[int] = (1, 16),
    providers: Sequence[str] | None = None,
    rounds: int = 30,
    threads: int | None = None,
    device: torch.device | None = None,
    compiled: bool = True,
    baseline: bool = True,
) -> tuple[list[BenchRow], list[str]]:
    """Measure a model eagerly, compiled, and in ONNX Runtime, with an untrained DeiT-Tiny for comparison.

    The row `PRODUCTS` has only the matrix products of the model, in float32 in ONNX Runtime on the CPU: a limit for its
    graphs there.

    Args:
        model: any timm classifier: 'model.tag', a weight folder, or a Hub repository.
        files: exported ONNX files of it; without any, it is exported in float32 for this run.
        openvino: exported OpenVINO folders of it, which run on the CPU in the precision that OpenVINO chooses.
        batches: batch sizes. providers: of ONNX Runtime; None uses the fastest that works.
        rounds: number of measurements; every round runs all cases, so that a slow minute affects all of them.
        threads: CPU threads; None leaves the choice to torch and ONNX Runtime.
        device: PyTorch device. compiled: also measure `torch.compile`. baseline: also `deit_tiny_patch16_224`, in
            PyTorch and exported in float32.

    Returns:
        The rows, and a text about the cases that could not be measured.

    Raises:
        GlitError: on a bad model, file or provider.
    """
    _check_numbers(batches, rounds, threads)
    device = device or torch.device("cpu")
    if threads is not None:
        torch.set_num_threads(threads)
    source = open_source(model)
    channels, *sides = source.describe(0, "fp32", None, None, False).input_size
    size = (sides[0], sides[1])

    def open_files(paths: Iterable[str | os.PathLike[str]]) -> list[OnnxClassifier]:
        return [
            OnnxClassifier(path, chosen, strict=chosen is not None, threads=threads)
            for path in paths
            for chosen in ([[name] for name in providers] if providers else [None])
        ]

    classifiers = open_files(files)
    folders = {where: OpenVinoModel(where / "model.xml", exact=False, threads=threads) for where in map(Path, openvino)}
    for path, info in [
        *((c.path, c.info) for c in classifiers),
        *((where, run.info) for where, run in folders.items()),
    ]:
        _check_size(path, info, size)
    networks = _networks(source.model, channels, size, device, compiled, baseline)
    cases: dict[tuple[str, str, int], Callable[[], object]] = {}
    left_out: list[str] = []
    with temporary_folder() as folder:
        if not files:
            classifiers += open_files([export_onnx(source, folder / "exported.onnx", verify=1).path])
        if baseline:
            file = export_onnx(_baseline(channels, size), folder / f"{BASELINE}.onnx", verify=1).path
            classifiers += open_files([file])
        for batch in batches:
            shape = (batch, channels, *size)
            check_memory(source.model, shape, device, "take a smaller ", Argument("batch"))
            for name, network in networks.items():
                case = partial(_eager, network, torch.randn(shape, device=device))
                try:
                    case()  # compiles
                except Exception as error:  # the compiler can raise anything
                    left_out.append(f"{name} at batch {batch}: {first_line(error)}")
                    continue
                cases[name, f"torch {device}", batch] = case
            for classifier in classifiers:
                if classifier.info.batch in (None, batch):
                    title = _title(classifier).removeprefix(f"{folder}{os.sep}")
                    cases[title, classifier.provider, batch] = _onnx_case(classifier, batch)
            for where, run in folders.items():
                if run.info.batch in (None, batch):
                    key = f"{where}{os.sep}, {run.info.precision}", f"{run.provider}, {run.computes_in}", batch
                    cases[key] = partial(run.logits, np.random.default_rng(0).normal(size=shape).astype(np.float32))
            if any(classifier.provider == _CPU for classifier in classifiers):
                try:
                    cases[PRODUCTS, _CPU, batch] = products_runner(source, batch, threads)
                except ExportError as error:
                    left_out.append(f"{PRODUCTS} at batch {batch}: {error}")
        return _rows(cases, rounds), left_out


def _check_numbers(batches: Sequence[int], rounds: int, threads: int | None) -> None:
    if rounds < 1 or not batches or min(batches) < 1:
        raise ExportError("rounds and batches must be at least 1")
    for name, value in (("rounds", rounds), ("threads", threads or 1), ("batch", max(batches))):
        if value > _MOST:
            raise ExportError(Argument(name), f" must be at most {_MOST}, got {value}")
    if threads is not None and threads < 1:
        raise ExportError(Argument("threads"), f" must be at least 1, got {threads}")


def _baseline(channels: int, size: tuple[int, int]) -> Any:
    """DeiT-Tiny for images of this size."""
    return timm.create_model(BASELINE, img_size=size, in_chans=channels).eval()


def _check_size(path: Path, info: ExportInfo, size: tuple[int, ...]) -> None:
    own = info.input_size[1:]
    if own != size and not info.dynamic_size:
        raise ExportError(
            f"{path} is of {own[0]} x {own[1]} pixels and the model of {size[0]} x {size[1]}, which is no "
            f"fair comparison; export it with ",
            Argument("image_size", size),
        )


def _networks(
    model: Any, channels: int, size: tuple[int, int], device: torch.device, compiled: bool, baseline: bool
) -> dict[str, torch.nn.Module]:
    """The networks to run in PyTorch, all on images of the model's size."""
    eager = reparameterize_model(model).to(device)
    networks: dict[str, torch.nn.Module] = {"eager": eager}
    if compiled:
        networks["compiled"] = torch.compile(eager)  # type: ignore[assignment]
    if baseline:
        networks[f"{BASELINE}, eager, {size[0]} x {size[1]}"] = _baseline(channels, size).to(device)
    return networks


@torch.inference_mode()
def _eager(network: Any, images: torch.Tensor) -> object:
    logits = network(images)
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
    return logits


def _title(classifier: OnnxClassifier) -> str:
    info = classifier.info
    return f"{classifier.path}, {info.precision}, opset {info.opset}{', preprocessing' if info.preprocess else ''}"


def _onnx_case(classifier: OnnxClassifier, batch: int) -> Callable[[], object]:
    channels, height, width = classifier.info.input_size
    rng = np.random.default_rng(0)
    if classifier.info.preprocess:
        images = rng.integers(0, 256, (batch, height, width, channels), dtype=np.uint8)
    else:
        images = rng.normal(size=(batch, channels, height, width)).astype(classifier.input_dtype)
    return partial(classifier.run_batch, images)


def _rows(cases: Mapping[tuple[str, str, int], Callable[[], object]], rounds: int) -> list[BenchRow]:
    seconds: dict[tuple[str, str, int], list[float]] = {key: [] for key in cases}
    for case in cases.values():
        case()  # warm caches and allocators
    for _ in range(rounds):
        for key, case in cases.items():
            start = time.perf_counter()
            case()
            seconds[key].append(time.perf_counter() - start)
    return [
        BenchRow(*key, 1e3 * statistics.median(times), 1e3 * float(np.quantile(times, 0.95)))
        for key, times in seconds.items()
    ]


def machine() -> dict[str, str]:
    """The hardware and software of the measurement."""
    about = {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__}
    about |= {"runtime": runtime_build(), "threads": str(torch.get_num_threads())}
    return about | {"machine": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()}


def draw_bench(rows: Sequence[BenchRow], title: str, path: Path) -> None:
    """Draw images per second as bars, one panel per batch size. Raises GlitError if the file cannot be written."""
    batches = sorted({row.batch for row in rows})
    figure = new_figure(figsize=(8, 1.2 + 0.4 * len(rows)))
    figure.suptitle(title)
    for axes, batch in zip(figure.subplots(len(batches), 1, squeeze=False)[:, 0], batches, strict=True):
        chosen = [row for row in rows if row.batch == batch]
        bars = axes.barh([f"{row.what}\n{row.provider}" for row in chosen], [row.images_per_second for row in chosen])
        axes.bar_label(bars, fmt="%.0f", padding=3)
        axes.invert_yaxis()
        axes.set_xlabel(f"images a second at batch {batch}")
        axes.margins(x=0.12)
    try:
        with whole_file(path, parents=True) as temporary:
            figure.savefig(temporary, dpi=120, format=path.suffix.lstrip(".") or "png")
    except ValueError as error:  # matplotlib does not know the format
        raise WriteError(f"{path} cannot be written: {first_line(error)}") from None
