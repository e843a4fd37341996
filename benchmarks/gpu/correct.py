"""Stage correct: compare the GPU's results with those of the CPU and the authors' code, with bounds on the errors."""

from __future__ import annotations

import gzip
import random
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from glit_models.search import NAMED_SPACES, Supernet
from glit_models.search.supernets.scoring import Evaluator, Images
from safetensors.torch import load
from torch import Tensor, nn

from glit_models import GLIT_TINY, GLiT
from glit_models.data import FractalConfig, Fractals
from glit_models.errors import first_line
from glit_models.training import Trainer, load_recipe

from ..depthwise_forms import FORMS, Form, conv2d_contiguous
from .context import Context, Result

CUDA_ONLY = {
    "correct": (
        "cuDNN, cuBLAS and the fused attention kernels in float32, float16 and bfloat16",
        "the Triton kernels as machine code, cuDNN's causal convolution, Inductor's code for the GPU",
        "fractals drawn on the GPU",
    )
}

_FIXTURES = Path(__file__).resolve().parents[2] / "tests" / "fixtures"
_BOUNDS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}  # relative to the norm, for a whole network
_FORM_BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # for one convolution
_SIZES = ((3, 7, 40, 3), (2, 17, 64, 17), (5, 197, 768, 31), (17, 197, 768, 45))  # B, N, C, K
Rows = Iterator[dict[str, Any]]


def run_correct(context: Context) -> Result:
    """Run all checks; one that raises is recorded and does not stop the others."""
    rows: list[dict[str, Any]] = []
    began = time.time()
    shutil.rmtree(context.work / "correct", ignore_errors=True)
    # What has to be compiled comes last: it takes longest, and a faulty kernel can break the device for later checks.
    for check in (
        _reference, _forms, _sizes_in_turns, _fractals, _resumed, _supernet, _evaluation, _triton_forms, _compiled,
    ):  # fmt: skip
        name = check.__name__.strip("_")
        try:
            with _exact_arithmetic():
                for row in check(context):
                    rows.append({"check": name, **row, "ok": row["error"] <= row["bound"]})
                    context.save(_result(rows, context))
        except Exception as error:  # devices can raise anything; it is the result of this check
            rows.append({"check": name, "what": f"{type(error).__name__}: {first_line(error)}"[:300], "ok": False})
        print(f"{name}: {time.time() - began:.1f} s", flush=True)
        context.save(_result(rows, context))
    return _result(rows, context)


def _result(rows: list[dict[str, Any]], context: Context) -> Result:
    """The rows, with the forms that passed all cases and those that failed one; a form can be in neither list yet."""
    found = {name: [row["ok"] for row in rows if row.get("form") == name] for name in FORMS}
    return {
        "failed": [row for row in rows if not row["ok"]],
        "right_forms": [name for name, ok in found.items() if len(ok) == len(_form_cases(context)) and all(ok)],
        "wrong_forms": [name for name, ok in found.items() if not all(ok)],
        "rows": rows,
    }


@contextmanager
def _exact_arithmetic() -> Iterator[None]:
    """Float32 products without TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _row(what: str, actual: Tensor, expected: Tensor, bound: float, **more: Any) -> dict[str, Any]:
    """The distance to the expected result, relative to its norm; infinite for a result that is not finite."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    error = ((actual - expected).norm() / expected.norm()).item()
    return {"what": what, "error": error if np.isfinite(error) else inf, "bound": bound, **more}


# ---- the model ----


def _reference(context: Context) -> Rows:
    """The tensors that the authors' code computed."""
    for dtype in _BOUNDS:
        for way in ("eager", "fused", "with gradients"):
            if not (context.rehearse and dtype == torch.float16):  # slow on a CPU
                yield _beside_official(way, dtype, context)


def _compiled(context: Context) -> Rows:
    for dtype in () if context.rehearse else _BOUNDS:
        yield _beside_official("compiled", dtype, context)


def _beside_official(way: str, dtype: torch.dtype, context: Context) -> dict[str, Any]:
    official, tensors = (
        load(gzip.decompress((_FIXTURES / f"official_w48_{name}.safetensors.gz").read_bytes()))
        for name in ("state", "io")
    )
    model = GLiT(spec=GLIT_TINY.scaled(48, 3), img_size=64, num_classes=10)
    model.load_state_dict(official)
    model = model.eval().fuse() if way == "fused" else model.eval()
    model = model.to(context.device, dtype)
    run = context.compile(model) if way == "compiled" else model
    with torch.set_grad_enabled(way == "with gradients"):
        logits = run(tensors["input"].to(context.device, dtype))
    return _row(f"{way}, {dtype}", logits, tensors["logits"], _BOUNDS[dtype])


def _sizes_in_turns(context: Context) -> Rows:
    """Run several image sizes in one process: cuDNN before 9.24 had wrong depthwise results in this case."""
    torch.manual_seed(0)
    sizes = (32, 64, 32) if context.rehearse else (64, 224, 64, 112, 224, 64)
    model = timm.create_model("glit_tiny", dynamic_img_size=True).train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    images = {size: torch.randn(2, 3, size, size) for size in sizes}
    expected = {size: _logits_and_gradient(model, images[size], state) for size in dict.fromkeys(sizes)}
    model.to(context.device)
    for number, size in enumerate(sizes):
        actual = _logits_and_gradient(model, images[size].to(context.device), state)
        for name, ours, theirs in zip(("logits", "gradient"), actual, expected[size], strict=True):
            yield _row(f"image size {size}, number {number}, {name}", ours, theirs, 2e-3)


def _logits_and_gradient(model: nn.Module, images: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The logits, and the gradient of all depthwise weights as one vector; BatchNorm's statistics are reset first."""
    model.load_state_dict(state)
    weights = [p for name, p in model.named_parameters() if name.endswith("dwconv.weight")]
    logits = model(images)
    return logits, torch.cat([grad.flatten() for grad in torch.autograd.grad(logits.square().mean(), weights)])


# ---- the convolution ----


def _forms(context: Context) -> Rows:
    """Compare every form with float64 on the CPU, forward and backward."""
    return _compared((name for name in FORMS if not name.startswith("Triton")), context)


def _triton_forms(context: Context) -> Rows:
    return _compared((name for name in FORMS if name.startswith("Triton")), context)


def _compared(names: Iterable[str], context: Context) -> Rows:
    for name in names:
        for dtype, size in _form_cases(context):
            what = f"{name}, {dtype}, B, N, C, K = {size}"
            about = {"form": name, "what": what, "bound": _FORM_BOUNDS[dtype]}
            try:
                actual = _form_results(FORMS[name], size, dtype, context.device, dtype)
                pairs = zip(actual, _exact_results(size, dtype), strict=True)
                yield about | {"error": max(_row("", ours, theirs, 0)["error"] for ours, theirs in pairs)}
            except Exception as problem:  # of one form; the others are still checked
                yield about | {"what": f"{what}: {type(problem).__name__}: {first_line(problem)}"[:300], "error": inf}
                break


def _form_cases(context: Context) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    if context.rehearse:
        return [(dtype, size) for dtype in (torch.float32, torch.bfloat16) for size in _SIZES[:2]]
    return [(dtype, size) for dtype in _FORM_BOUNDS for size in _SIZES[: None if dtype == torch.bfloat16 else 2]]


@cache
def _exact_results(size: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """The results in float64 for operands that are rounded to `dtype`."""
    return _form_results(Form(conv2d_contiguous), size, dtype, "cpu", torch.float64)


def _form_results(
    form: Form, size: tuple[int, ...], rounded: torch.dtype, device: str, dtype: torch.dtype
) -> list[Tensor]:
    """Output, gradients, and the output with SiLU, which some forms fuse."""
    B, N, C, K = size
    generator = torch.Generator().manual_seed(N * 100 + K)
    shapes = ((B, N, C), (C, 1, 1, K), (C,), (B, N, C))
    drawn = (torch.randn(shape, generator=generator).to(rounded) for shape in shapes)
    *leaves, grad = (tensor.to(device, dtype).requires_grad_() for tensor in drawn)
    out = form.convolve(*leaves)
    results = [out.detach(), *torch.autograd.grad(out, leaves, grad.detach())]
    with torch.no_grad():
        silu = form.convolve_silu(*leaves) if form.convolve_silu is not None else F.silu(form.convolve(*leaves))
    return [*results, silu]


# ---- data, training, search ----


def _fractals(context: Context) -> Rows:
    """Compare the bytes on both devices, for each way to draw."""
    for color, render in (("gray", "point"), ("color", "patch")):
        config = FractalConfig(num_classes=8, color=color, render=render, perturbation=0.1, zoom_max=2.0)  # type: ignore[arg-type]
        fractals = Fractals(config)
        for size in (64,) if context.rehearse else (64, 112, 224):
            labels, indices = torch.arange(32) % 8, torch.arange(32)
            ours = fractals.batch(labels, indices, size, context.device).cpu()
            unlike = (ours != fractals.batch(labels, indices, size)).sum().item()
            yield {"what": f"bytes that differ, {color}, {render}, {size} pixels", "error": unlike, "bound": 0}


def _resumed(context: Context) -> Rows:
    """Compare a training that is stopped and resumed with one that is not: equal weights, up to the order of sums."""
    weights = []
    for name, minutes in (("whole", (None,)), ("parts", (0.0, 0.0, None))):
        overrides = ["optim.epochs=1", "optim.warmup_epochs=0", "data.fractals.instances=32"]
        overrides.append(f"precision={'fp32' if context.rehearse else 'bf16'}")  # few CPUs are fast in bf16
        for limit in minutes:  # a limit of 0 minutes stops after the first step, or the second on a GPU
            folder = context.work / "correct" / name
            trainer = Trainer(load_recipe("smoke", overrides), folder, context.device, max_minutes=limit)
            trainer.run()
        weights.append(torch.cat([p.detach().flatten().cpu() for p in trainer.model.parameters()]))
    yield _row("weights of a resumed training", weights[1], weights[0], 2e-2)


def _supernet(context: Context) -> Rows:
    """Compare a step of the supernet: loss and gradients of an active network."""
    torch.manual_seed(0)
    space = NAMED_SPACES["glit"]()
    supernet = Supernet(space, img_size=64, num_classes=10)
    supernet.activate(space.sample(random.Random(0)))
    images, labels = torch.randn(8, 3, 64, 64), torch.arange(8)
    found = []
    for device in ("cpu", context.device):
        supernet.to(device).train().zero_grad()
        loss = F.cross_entropy(supernet(images.to(device)), labels.to(device))
        loss.backward()
        grads = [p.grad.flatten().cpu().clone() for p in supernet.parameters() if p.grad is not None]
        found.append((loss.detach().cpu(), torch.cat(grads)))
    (loss, grad), (our_loss, our_grad) = found
    yield _row("loss of a path", our_loss, loss, 1e-4)
    yield _row("gradients of a path", our_grad, grad, 2e-3)


def _evaluation(context: Context) -> Rows:
    """Compare scores of networks of a supernet, on noise."""
    torch.manual_seed(0)
    space, rng = NAMED_SPACES["glit"](), random.Random(0)
    supernet = Supernet(space, img_size=64, num_classes=10)
    specs = [space.sample(rng) for _ in range(2)]
    batches = [(torch.randn(32, 3, 64, 64), torch.arange(32) % 10) for _ in range(2)]
    images = Images(lambda wanted: batches, 2)
    ours, theirs = (
        Evaluator(supernet.to(device), images, images).evaluate(specs) for device in (context.device, "cpu")
    )
    for name, bound in (("loss", 2e-3), ("accuracy", 3.5)):  # 3.5 %: two of 64 images
        errors = [abs(getattr(ours[spec], name) - getattr(theirs[spec], name)) for spec in specs]
        yield {"what": f"{name} under inherited weights", "error": max(errors), "bound": bound}
