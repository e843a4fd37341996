"""Stage environment: describe the machine, and measure memory bandwidth and the rate of matrix products."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from glit_models.errors import first_line

from .. import cudnn_depthwise, report
from ..depthwise_forms import has_conv1d_template
from .context import Context, Result

CUDA_ONLY = {"environment": ("driver, clocks and power that nvidia-smi reads", "times from CUDA events")}

_SHARED_MEMORY = Path("/dev/shm")
_PACKAGES = (
    "torch", "torchvision", "triton", "timm", "accelerate", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu",
    "nvidia-cudnn-cu13", "nvidia-cudnn-frontend",
)  # fmt: skip
_QUERY = (
    "name", "driver_version", "memory.total", "memory.used", "clocks.sm", "clocks.mem", "clocks.max.sm",
    "clocks_event_reasons.active", "power.draw", "power.limit", "temperature.gpu", "utilization.gpu",
)  # fmt: skip


def run_environment(context: Context) -> Result:
    """Record the facts, then measure; the facts are kept if the measurements fail."""
    torch.zeros(1, device=context.device)  # raises where there is no such device
    result: Result = {"device": report.device_name(context.device)}
    context.save(result)  # tells the driver that the device works
    result |= {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "cudnn_causal_convolution": cudnn_depthwise.unavailable() or "works",
        "inductor_conv1d_template": has_conv1d_template(),
        "shared_memory_gib": shared_memory_gib(),
        "idle": _nvidia_smi(),
    }
    context.save(result)
    result["memory_tb_s"] = _copy_rate(context)
    context.save(result)
    result["bf16_tflops"] = _product_rate(context, torch.bfloat16)
    result["fp32_tflops"] = _product_rate(context, torch.float32)
    return result | {"busy": _nvidia_smi()}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia_smi() -> dict[str, str] | str:
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi"
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {first_line(error)}"[:200]
    values = done.stdout.strip().splitlines()[0].split(", ") if done.returncode == 0 and done.stdout.strip() else []
    if len(values) != len(_QUERY):
        return (done.stderr or done.stdout).strip()[:200]
    return dict(zip(_QUERY, values, strict=True))


def shared_memory_gib() -> float | None:
    """The size of the file system through which a loader's processes pass images."""
    return shutil.disk_usage(_SHARED_MEMORY).total / 2**30 if _SHARED_MEMORY.is_dir() else None


def _copy_rate(context: Context) -> float:
    """TB/s of a copy on the device, bytes read and written."""
    count = (16 if context.rehearse else 2048) * 2**20
    source = torch.randint(256, (count,), dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    return 2 * count / _seconds(lambda: target.copy_(source), context) / 1e12


def _product_rate(context: Context, dtype: torch.dtype) -> float:
    """TFLOP/s of a square matrix product of random numbers."""
    size = 256 if context.rehearse else 8192
    a, b = (torch.randn(size, size, device=context.device).to(dtype) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: a @ b, context) / 1e12


def _seconds(function: Callable[[], object], context: Context, rounds: int = 10) -> float:
    """The median over some rounds, by the device's clock if it has one."""
    for _ in range(3):
        function()
    if not context.device.startswith("cuda"):
        return report.interleaved({"": function}, rounds)[""]
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)
