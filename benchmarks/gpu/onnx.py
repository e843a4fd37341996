"""Stage onnx: compare GLiT-Tiny in ONNX Runtime on a GPU with PyTorch. Needs an importable onnxruntime-gpu.

Axes: B batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from glit_models.export import OnnxClassifier, export_onnx

from glit_models import GLiT
from glit_models.errors import first_line

from .. import performance, report
from ..export import noise, random_glit
from .context import Context, Result

CUDA_ONLY = {"onnx": ("the CUDA and TensorRT providers of ONNX Runtime", "buffers on the GPU")}

_PRECISIONS = ("fp32", "fp16", "bf16", "int8")
_TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def run_onnx(context: Context) -> Result:
    """Export in every precision, then time each file at each batch size on inputs that stay on the device."""
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # the CUDA libraries that torch came with
    providers = onnxruntime.get_available_providers()
    result: Result = {"onnxruntime": onnxruntime.__version__, "providers": providers, "rows": []}
    wanted = "CPUExecutionProvider" if context.rehearse else "CUDAExecutionProvider"
    if wanted not in providers:
        return result | {"error": f"no {wanted}: is onnxruntime-gpu the first onnxruntime on the module path?"}
    for row in _rows(context, [name for name in (wanted, "TensorrtExecutionProvider") if name in providers]):
        result["rows"].append(row)
        context.save(result)
    return result


def _rows(context: Context, providers: list[str]) -> Iterator[dict[str, Any]]:
    """CUDA first, then PyTorch, and TensorRT last, because it builds an engine for each file before it runs."""
    batches = (1,) if context.rehearse else (1, 32, 256)
    files: dict[str, Path] = {}
    for precision, file in _exported(context):
        if isinstance(file, str):
            yield {"precision": precision, "error": file}
            continue
        files[precision] = file
        for batch in batches:
            yield _session_row(precision, file, providers[0], batch, context)
    precisions = ("fp32",) if context.rehearse else tuple(_TORCH)
    for precision, batch, way in itertools.product(precisions, batches, ("eager", "compiled")):
        make = partial(_torch_case, precision, way, batch, context)
        yield {"precision": precision, "how": f"PyTorch, {way}", "batch": batch} | _measured(make, batch, context)
    for provider, (precision, file), batch in itertools.product(providers[1:], files.items(), batches):
        yield _session_row(precision, file, provider, batch, context)


def _exported(context: Context) -> Iterator[tuple[str, Path | str]]:
    """The file of each precision, which is not compared with PyTorch; or why there is none."""
    folder = context.work / "onnx"
    folder.mkdir(exist_ok=True)
    calibration = noise(folder / "noise")
    for precision in ("fp32", "int8") if context.rehearse else _PRECISIONS:
        more = {"calibration": calibration} if precision == "int8" else {}
        path = folder / f"{precision}.onnx"
        try:
            yield precision, export_onnx(_glit(context), path, precision=precision, verify=0, force=True, **more).path
        except Exception as error:  # of one precision; the others are still measured
            yield precision, f"{type(error).__name__}: {first_line(error)}"[:300]


def _session_row(precision: str, file: Path, provider: str, batch: int, context: Context) -> dict[str, Any]:
    make = partial(_session_case, file, provider, batch, context)
    return {"precision": precision, "how": provider, "batch": batch} | _measured(make, batch, context)


def _size(context: Context) -> int:
    return 32 if context.rehearse else performance.SIZE


def _glit(context: Context) -> GLiT:
    return random_glit(spec=context.spec(), img_size=_size(context))


def _torch_case(precision: str, way: str, B: int, context: Context) -> Callable[[], object]:
    """A PyTorch pass over images [B, 3, H, W] on the device, including synchronisation."""
    compiled = partial(context.compile, dynamic=False) if way == "compiled" else None
    dtype, network = _TORCH[precision], _glit(context).fuse()
    return performance.make_case(network, "inference", dtype, B, context.device, _size(context), compiled)


def _measured(make: Callable[[], Callable[[], object]], batch: int, context: Context) -> dict[str, Any]:
    """Milliseconds and images per second of a case, or why there are none."""
    if context.seconds_left < 3:
        return {"error": "no time left"}
    try:
        run = make()
        for _ in range(1 if context.rehearse else 5):
            run()
        seconds = report.interleaved({"": run}, 1 if context.rehearse else 30)[""]
    except Exception as error:  # providers and devices can raise anything; it is the result of this case
        return {"error": f"{type(error).__name__}: {first_line(error)}"[:300]}
    finally:
        torch.compiler.reset()
    return {"ms": 1e3 * seconds, "images/s": batch / seconds}


def _session_case(path: Path, provider: str, B: int, context: Context) -> Callable[[], object]:
    """A pass of a file over images [B, 3, H, W] on the device, including synchronisation."""
    classifier = OnnxClassifier(path, [provider], strict=True)  # raises instead of a fallback to the CPU
    session = classifier.session
    shape = (B, *session.get_inputs()[0].shape[1:])
    images = np.random.default_rng(0).standard_normal(shape).astype(classifier.input_dtype)
    device = "cuda" if context.device.startswith("cuda") else "cpu"
    value = onnxruntime.OrtValue.ortvalue_from_numpy(images, device, 0)
    binding = session.io_binding()
    binding.bind_ortvalue_input(session.get_inputs()[0].name, value)
    binding.bind_output(session.get_outputs()[0].name, device)

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return run
