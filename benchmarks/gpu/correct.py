"""Stage correct: compare the GPU's results with those of the CPU and the authors' code, with bounds on the errors."""

from __future__ import annotations

import gzip
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
    # The forms come last, because their kernels take longest to compile.
    for check in (_reference, _sizes_in_turns, _fractals, _resumed, _supernet, _evaluation, _forms):
        name = check.__name__.strip("_")
        try:
            with _exact_arithmetic():
                for row in check(context):
                    rows.append({"check": name, **row, "ok": row["error"] <= row["bound"]})
                    context.save(_result(rows))
        except Exception as error:  # devices can raise anything; it is the result of this check
            rows.append({"check": name, "what": f"{type(error).__name__}: {first_line(error)}"[:300], "ok": False})
        print(f"{name}: {time.time() - began:.1f} s", flush=True)
        context.save(_result(rows))
    return _result(rows)


def _result(rows: list[dict[str, Any]]) -> Result:
    wrong = {row["form"] for row in rows if "form" in row and not row["ok"]}
    return {"failed": [row for row in rows if not row["ok"]], "wrong_forms": sorted(wrong), "rows": rows}


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
    return {"what": what, "error": error if np.isfinite(error) else float("inf"), "bound": bound, **more}


# ---- the model ----


def _reference(context: Context) -> Rows:
    """The tensors that the authors' code computed."""
    official, tensors = (
        load(gzip.decompress((_FIXTURES / f"official_w48_{name}.safetensors.gz").read_bytes()))
        for name in ("state", "io")
    )
    for dtype, bound in _BOUNDS.items():
        for way in ("eager", "fused", "compiled", "with gradients"):
            if context.rehearse and (way == "compiled" or dtype == torch.float16):
                continue  # slow on a CPU
            model = GLiT(spec=GLIT_TINY.scaled(48, 3), img_size=64, num_classes=10)
            model.load_state_dict(official)
            model = model.eval().fuse() if way == "fused" else model.eval()
            model = model.to(context.device, dtype)
            run = context.compile(model) if way == "compiled" else model
            with torch.set_grad_enabled(way == "with gradients"):
                logits = run(tensors["input"].to(context.device, dtype))
            yield _row(f"{way}, {dtype}", logits, tensors["logits"], bound)


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
    exact = Form(conv2d_contiguous)
    for name, form in FORMS.items():
        for dtype, bound in _FORM_BOUNDS.items():
            if context.rehearse and dtype == torch.float16:
                continue
            for size in _SIZES[:2] if dtype != torch.bfloat16 or context.rehearse else _SIZES:
                about = {"form": name, "what": f"{name}, {dtype}, B, N, C, K = {size}", "bound": bound}
                try:
                    error = _form_error(form, exact, size, dtype, context.device)
                except Exception as problem:  # of one form; the others are still checked
                    what = f"{about['what']}: {type(problem).__name__}: {first_line(problem)}"
                    yield about | {"what": what[:300], "error": float("inf")}
                    break
                yield about | {"error": error}


def _form_error(form: Form, exact: Form, size: tuple[int, ...], dtype: torch.dtype, device: str) -> float:
    """The largest error of output, gradients and, if the form supports it, output with SiLU."""
    B, N, C, K = size
    generator = torch.Generator().manual_seed(N * 100 + K)
    shapes = ((B, N, C), (C, 1, 1, K), (C,), (B, N, C))
    *leaves, grad = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    results = []
    for one, place, kind in ((form, device, dtype), (exact, "cpu", torch.float64)):
        own = [leaf.to(place, kind).requires_grad_() for leaf in leaves]
        out = one.convolve(*own)
        tensors = [out, *torch.autograd.grad(out, own, grad.to(place, kind))]
        with torch.no_grad():
            fused = form.convolve_silu is not None and one is form
            tensors.append(form.convolve_silu(*own) if fused else F.silu(one.convolve(*own)))
        results.append(tensors)
    errors = [_row("", ours, theirs, 0)["error"] for ours, theirs in zip(*results, strict=True)]
    return max(errors)


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
