"""Measure the forms of the depthwise convolution in GLiT-Tiny's layers: `python -m benchmarks.depthwise --device`.

Builds the operands from the spec, measures each form alone and between its neighbours in the model, for inference
and for training, eager and compiled, and compares every result with float32, because a fast but wrong kernel would
otherwise win. `depthwise_forms` defines the forms.

Axes: B batch, N tokens, C channels, K taps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from glit_models import GLIT_TINY, GLiTSpec

from . import report
from .depthwise_forms import FORMS, Form, conv2d_contiguous, folded_chain

IMAGE_SIZE = 224
TOLERANCE = 2e-2  # relative to a result's norm; bfloat16 rounds to 0.4 per cent, twice in the chain

# Tensors of B * N * C that must cross the memory bus if everything except matrix products and reductions over the batch
# is one pass. In the chain the GLU reads two; BatchNorm's statistics end a pass forward and another one backward.
FLOORS = {"inference": 2, "inference in chain": 3, "training": 5, "training in chain": 13}
Row = dict[str, str | int | float]
Case = tuple[str, str]  # form and way
WAYS = {"eager": None, "compiled": "default", "max-autotune": "max-autotune-no-cudagraphs"}  # graphs would copy inputs


@dataclass(frozen=True)
class Layer:
    """Operands of one layer; `x` has 2 C channels if a GLU comes first; those of BatchNorm are float32."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    scale: Tensor
    shift: Tensor

    def leaves(self, use: str) -> list[Tensor]:
        """The tensors that need gradients in training."""
        return [self.x, self.weight, self.bias, *([self.scale, self.shift] if "chain" in use else [])]


def layers(spec: GLiTSpec, use: str, B: int, device: str, dtype: torch.dtype) -> list[Layer]:
    """The spec's depthwise layers, first to last, with random operands."""
    generator = torch.Generator(device).manual_seed(0)
    N = (IMAGE_SIZE // spec.patch_size) ** 2 + 1
    made = []
    for block in spec.blocks:
        if block.kernel_size is None or block.expand_ratio is None:
            continue
        C = block.num_local_heads * (spec.embed_dim // spec.num_heads) * block.expand_ratio
        draw = partial(torch.randn, generator=generator, device=device)
        x = draw(B, N, 2 * C if "chain" in use else C).to(dtype)
        weight, bias = (draw(C, 1, 1, block.kernel_size) * block.kernel_size**-0.5).to(dtype), draw(C).to(dtype)
        made.append(Layer(x, weight, bias, draw(C) * 0.1 + 1, draw(C)))
    for layer in made:
        for leaf in layer.leaves(use):
            leaf.requires_grad_("training" in use)
    return made


def function_of(form: Form, use: str) -> Callable[[Layer], Tensor]:
    """Forward of one layer."""

    def alone(layer: Layer) -> Tensor:
        return form.convolve(layer.x, layer.weight, layer.bias)

    def inference_chain(layer: Layer) -> Tensor:
        return folded_chain(form, layer.x, layer.weight, layer.bias)

    def training_chain(layer: Layer) -> Tensor:
        x = form.convolve(F.glu(layer.x, dim=-1), layer.weight, layer.bias)
        x = F.batch_norm(x.mT.unsqueeze(2), None, None, layer.scale, layer.shift, training=True)
        return F.silu(x.squeeze(2).mT)

    return {"inference in chain": inference_chain, "training in chain": training_chain}.get(use, alone)


def run_layer(function: Callable[[Layer], Tensor], use: str, layer: Layer, grad: Tensor) -> list[Tensor]:
    """The output, and when training the gradients of all leaves."""
    if "training" not in use:
        with torch.inference_mode():
            return [function(layer)]
    output = function(layer)
    return [output.detach(), *torch.autograd.grad(output, layer.leaves(use), grad)]


def measure(options: argparse.Namespace) -> None:
    """Run the requested measurements, print one row per case, and the fastest form."""
    rows = list(measured(options))
    report.show("depthwise", options, rows)
    if not options.json:
        print()
        for use in options.uses:
            done = [row for row in rows if row["use"] == use and row["way"] and isinstance(row["ms"], float)]
            if done:
                best = min(done, key=lambda row: row["ms"])
                print(f"{use}: {best['form']}, {best['way']}, {best['ms']:.3g} ms on {best['device']}")


def measured(options: argparse.Namespace, spec: GLiTSpec | None = None) -> Iterator[Row]:
    """Yield each row as soon as it is measured, so that finished ones are kept if a later one fails or takes too long.

    Args:
        options: those of `python -m benchmarks.depthwise --device`.
        spec: the network whose depthwise layers are measured; GLiT-Tiny if None.
    """
    start = time.monotonic()
    torch._dynamo.config.recompile_limit = 1000  # all forms are compiled through the same few functions
    for i, use in enumerate(options.uses, start=1):
        yield from _measure_use(use, spec or GLIT_TINY, options, start + options.seconds * i / len(options.uses))


def _measure_use(use: str, spec: GLiTSpec, options: argparse.Namespace, deadline: float) -> Iterator[Row]:
    torch._dynamo.reset()
    dtype = getattr(torch, options.dtype)
    work = layers(spec, use, options.batch_size, options.device, dtype)
    grads = [torch.randn_like(layer.x[..., : len(layer.bias)]) for layer in work]
    exact = _exact(use, work[0], grads[0])
    clock = _gpu_seconds if options.device.startswith("cuda") else _cpu_seconds
    values = sum(layer.x.shape[:2].numel() * len(layer.bias) for layer in work)
    floor = FLOORS[use] * values * dtype.itemsize / (options.bandwidth * 1e12)
    about = {"use": use, "device": report.device_name(options.device)}
    for name, way in _cases(options):
        print(f"{use}: {name}, {way}", file=sys.stderr)
        outcome: Row
        try:
            if time.monotonic() > deadline:
                raise TimeoutError("left out, for its share of the seconds was up")
            function = function_of(FORMS[name], use)
            if WAYS[way] is not None:
                function = options.compile(function, dynamic=False, mode=WAYS[way])
            error = _error(use, run_layer(function, use, work[0], grads[0]), exact)
            if not error < TOLERANCE:
                raise ArithmeticError(f"wrong by {error:.2g} of its norm")
            _run_all(function, use, work, grads)  # compiles for the other layers' shapes
            took = clock(partial(_run_all, function, use, work, grads), options.rounds)
            outcome = {"ms": took * 1e3, "x floor": took / floor, "error": error}
        except Exception as problem:  # compilers and devices can raise anything; it is the result of this case
            text = f"{type(problem).__name__}: {problem}".splitlines()[0][:100]
            outcome = {"ms": text, "x floor": "", "error": ""}
        yield {**about, "form": name, "way": way, **outcome}
    yield {**about, "form": "memory traffic", "way": "", "ms": floor * 1e3, "x floor": 1.0, "error": ""}


def _cases(options: argparse.Namespace) -> list[Case]:
    """The Triton forms come last: their kernels take longest to compile, and can break the device for those after."""
    cases = [
        (name, way)
        for way in options.ways
        for name in options.forms
        if way != "max-autotune" or FORMS[name].max_autotune
    ]
    return sorted(cases, key=lambda case: case[0].startswith("Triton"))


def _run_all(function: Callable[[Layer], Tensor], use: str, work: list[Layer], grads: list[Tensor]) -> None:
    for layer, grad in zip(work, grads, strict=True):
        run_layer(function, use, layer, grad)


def _exact(use: str, layer: Layer, grad: Tensor) -> list[Tensor]:
    """The first layer's results in float32, with torch's convolution."""
    wide = Layer(*(t.detach().float().requires_grad_("training" in use) for t in vars(layer).values()))
    with torch.backends.cudnn.flags(allow_tf32=False):
        return run_layer(function_of(Form(conv2d_contiguous), use), use, wide, grad.float())


def _error(use: str, actual: list[Tensor], exact: list[Tensor]) -> float:
    """The largest distance to the exact results, relative to their norms."""
    pairs = list(zip(actual, exact, strict=True))
    if use == "training in chain":
        del pairs[3]  # the bias's gradient, which BatchNorm makes zero, but for rounding
    return max(((ours.float() - theirs).norm() / theirs.norm()).item() for ours, theirs in pairs)


def _cpu_seconds(case: Callable[[], None], rounds: int) -> float:
    return report.interleaved({"": case}, rounds)[""]


def _gpu_seconds(case: Callable[[], None], rounds: int) -> float:
    """Median seconds on the GPU.

    The GPU sleeps before each measurement, so that the launches are queued when it begins. This measures the work of
    the GPU, as in a large model, not Python's overhead.
    """
    seconds = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(10_000_000)  # cycles: about 5 ms
        begin.record()
        case()
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(seconds)
