"""Compare forms of the depthwise convolution on CPU: channels-last and channels-first, our weight gradient and torch's.

With `--device cuda` (or any other), find the fastest form at GLiT-Tiny's layers, for each use.

Axes: B batch, N tokens, C channels, K taps.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from glit_models.depthwise import depthwise_conv, weight_grad

from . import depthwise_uses, report
from .depthwise_forms import FORMS

TAPS = 45
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    """Measure and print."""
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    if options.device is not None:
        depthwise_uses.measure(options)
        return
    cases: dict[tuple[str, str, str], Callable[[], object]] = {}
    for name, case in _forward_cases(16, 197, 768).items():
        cases["forward, 16 x 197 x 768", "float32", name] = case
    for dtype_name, dtype in DTYPES.items():
        for B, N in ((128, 17), (16, 197)):
            for name, case in _weight_gradient_cases(B, N, 768, dtype).items():
                cases[f"weight gradient, {B} x {N} x 768", dtype_name, name] = case
            for name, case in _training_cases(B, N, 768, dtype).items():
                cases[f"forward and backward, {B} x {N} x 768", dtype_name, name] = case
    seconds = report.interleaved({"|".join(key): case for key, case in cases.items()}, options.rounds)
    rows: list[dict[str, str | int | float]] = [
        {"what (B x N x C, 45 taps)": key[0], "type": key[1], "how": key[2], "ms": seconds["|".join(key)] * 1e3}
        for key in cases
    ]
    report.show("depthwise", options, rows)


def _parser() -> argparse.ArgumentParser:
    parser = report.parser(__doc__.splitlines()[0] if __doc__ else None, rounds=15)
    forms = parser.add_argument_group("the forms at GLiT-Tiny's layers")
    forms.add_argument(
        "--device", type=report.device, help="cuda, cuda:1 or cpu; default: only the measurements on CPU"
    )
    forms.add_argument("--batch-size", type=int, default=256)
    forms.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    forms.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), metavar="FORM", help=", ".join(FORMS))
    uses, ways = depthwise_uses.FLOORS, depthwise_uses.WAYS
    forms.add_argument("--uses", nargs="+", choices=uses, default=list(uses), metavar="USE", help=", ".join(uses))
    forms.add_argument("--ways", nargs="+", choices=ways, default=list(ways), metavar="WAY", help=", ".join(ways))
    forms.add_argument("--bandwidth", type=float, default=3.0, help="TB/s of the device's memory, for the floor")
    forms.set_defaults(compile=torch.compile)
    forms.add_argument("--seconds", type=float, default=300, help="time limit for all uses; no case starts after it")
    return parser


def _operands(B: int, N: int, C: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Input [1, C, B, N], stored channels-last, weight and bias."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, B, N, C, generator=generator).to(dtype).permute(0, 3, 1, 2)
    return x, torch.randn(C, 1, 1, TAPS, generator=generator).to(dtype), torch.zeros(C, dtype=dtype)


def _conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The best form in torch: its weight gradient takes many times longer over rows than over images."""
    return F.conv2d(_images(x), weight, bias, padding=(0, TAPS // 2), groups=weight.shape[0])


def _images(x: Tensor) -> Tensor:
    """[1, C, B, N] -> [B, C, 1, N], still channels-last in memory."""
    return x[0].transpose(0, 1).unsqueeze(2)


def _forward_cases(B: int, N: int, C: int) -> dict[str, Callable[[], object]]:
    x, weight, bias = _operands(B, N, C, torch.float32)
    flat, flat_weight = x[0].transpose(0, 1).contiguous(), weight.squeeze(2)

    def conv1d() -> None:
        with torch.inference_mode():
            F.conv1d(flat, flat_weight, bias, padding=TAPS // 2, groups=C)

    def conv2d() -> None:
        with torch.inference_mode():
            _conv2d(x, weight, bias)

    return {"conv1d, [B, C, N]": conv1d, "conv2d, channels-last": conv2d}


def _weight_gradient_cases(B: int, N: int, C: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    x, weight, bias = _operands(B, N, C, dtype)
    grad = _conv2d(x, weight, bias)
    x = _images(x)

    def stock() -> None:
        torch.ops.aten.convolution_backward(
            grad, x, weight, None, [1, 1], [0, TAPS // 2], [1, 1], False, [0, 0], C, [False, True, False]
        )

    return {"torch": stock, "glit_models": partial(weight_grad, x.squeeze(2), grad.squeeze(2), TAPS)}


def _training_cases(B: int, N: int, C: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    leaves = [tensor.requires_grad_() for tensor in _operands(B, N, C, dtype)]
    grad = torch.ones_like(leaves[0].detach())

    def step(function: Callable[..., Tensor], grad: Tensor) -> None:
        torch.autograd.grad(function(*leaves), leaves, grad)

    return {"torch": partial(step, _conv2d, _images(grad)), "glit_models": partial(step, depthwise_conv, grad)}


if __name__ == "__main__":
    main()
