"""A budget of measured latency: how long a network takes on this machine, measured once and cached.

This module builds and times networks; `budget` and `budget_sampler` apply budgets.
"""

from __future__ import annotations

import functools
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils import reparameterize_model

from glit_models import Spec, SpecTransformer
from glit_models.errors import SearchError, first_line
from glit_models.families import family_of
from glit_models.runs.files import write_text

from .budget import Budget

__all__ = ["Prepare", "latency_budget"]

# Prepares a network in evaluation mode: (network, batch size, threads, device) -> a function that runs one batch.
Prepare = Callable[[SpecTransformer, int, int, str], Callable[[], object]]

_WARM_UP = 3  # warm-up rounds, which are not counted
_Measured = dict[str, dict[str, float]]  # milliseconds, by the JSON of the conditions and of the spec


def latency_budget(
    low: float | None = None,
    high: float | None = None,
    *,
    img_size: int | tuple[int, int],
    num_classes: int,
    batch_size: int = 1,
    threads: int = 1,
    device: str | torch.device = "cpu",
    rounds: int = 20,
    runtime: str = "torch",
    prepare: Prepare | None = None,
    cache: Path,
) -> Budget:
    """A budget of milliseconds per batch: the median of `rounds`, after a warm-up, in float32 and evaluation mode.

    Measurements vary, but a search must get the same cost each time: each network is measured once and cached in
    `cache`, with the image size, batch size, threads, device, runtime and version of torch of the measurement. Nothing
    else should run on the machine in the meantime.

    Args:
        low: minimum allowed milliseconds.
        high: maximum allowed milliseconds.
        img_size: image size, in pixels.
        num_classes: number of classes of the head.
        batch_size: batch size.
        threads: number of torch's threads during measurements.
        device: device of the network.
        rounds: number of measurements of a network.
        runtime: name of the runtime.
        prepare: prepares a network for running; None runs it in PyTorch. `glit_models.export.onnx_runner` is one.
        cache: JSON file of the measurements; created if missing.

    Raises:
        SearchError: on a number below 1 or an unavailable device; when a cost is computed, if `cache` is damaged or
            cannot be written.
    """
    for name, value in (("batch_size", batch_size), ("threads", threads), ("rounds", rounds)):
        if type(value) is not int or value < 1:
            raise SearchError(f"{name} must be an integer of at least 1, got {value!r}")
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    conditions = {
        "img_size": [height, width],
        "num_classes": num_classes,
        "batch_size": batch_size,
        "threads": threads,
        "device": _device_name(device),
        "runtime": runtime,
        "torch": torch.__version__,
    }
    key = json.dumps(conditions, sort_keys=True)
    known: dict[str, float] = {}  # avoids reading the file again

    def cost(spec: Spec) -> float:
        name = _name(spec)
        if name not in known:
            measured = _read(cache)  # another search may have written to it
            known.update(measured.get(key, {}))
            if name not in known:
                model = _build(spec, (height, width), num_classes)
                with _torch_threads(threads):
                    known[name] = _milliseconds((prepare or _in_torch)(model, batch_size, threads, str(device)), rounds)
                _write(cache, {**measured, key: {**measured.get(key, {}), name: known[name]}})
        return known[name]

    return Budget("latency_ms", cost, low, high)


def _name(spec: Spec) -> str:
    """The spec's JSON, the same for equal specs: a ratio of 1.0 is written as 1."""

    def number(text: str) -> float:
        return int(value) if (value := float(text)).is_integer() else value

    return json.dumps(json.loads(spec.to_json(), parse_float=number))


def _device_name(device: str | torch.device) -> str:
    """The name of the accelerator or the CPU, which the measurements depend on."""
    try:
        parsed = torch.device(device)
        torch.empty(1, device=parsed)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        raise SearchError(f"device {device} cannot be used: {first_line(error)}") from None
    if parsed.type == "cuda":
        return torch.cuda.get_device_name(parsed)
    return f"{parsed.type}, {_processor()}"


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine()


def _build(spec: Spec, img_size: tuple[int, int], num_classes: int) -> SpecTransformer:
    """Create the network with random weights, without changing the caller's random state."""
    with torch.random.fork_rng(devices=[]):  # weights are initialised on the CPU
        model: SpecTransformer = timm.create_model(
            family_of(spec).architecture, spec=spec, img_size=img_size, num_classes=num_classes
        )
    return model.eval()


def _in_torch(model: SpecTransformer, batch_size: int, threads: int, device: str) -> Callable[[], object]:
    """Run the network eagerly."""
    fused = reparameterize_model(model).to(device)
    shape = (batch_size, model.in_chans, *model.patch_embed.img_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)

    def run() -> None:
        with torch.inference_mode():
            fused(images)
        if images.device.type != "cpu":
            torch.accelerator.synchronize()

    return run


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _milliseconds(run: Callable[[], object], rounds: int) -> float:
    seconds = []
    for _ in range(_WARM_UP + rounds):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds[_WARM_UP:])


def _read(cache: Path) -> _Measured:
    try:
        measured: Any = json.loads(cache.read_text(encoding="utf-8"))
        if all(_is_time(value) for times in measured.values() for value in times.values()):
            return measured
        reason = "not all of it is milliseconds"
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise SearchError(f"{cache} cannot be read: {error.strerror}") from None
    except (ValueError, AttributeError, RecursionError) as error:
        reason = first_line(error)
    raise SearchError(f"{cache} is damaged, remove it to measure again: {reason}")


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value > 0


def _write(cache: Path, measured: _Measured) -> None:
    write_text(cache, json.dumps(measured, indent=1) + "\n", parents=True)
