"""The linear layers of GLiT-Tiny in three forms: `F.linear`, channels-last convolutions of 1 x 1, oneDNN's operator.

The operator, which has no gradient, is called as `glit_models.cpu_inference` calls it.

Axes: B batch, N tokens, C channels.
"""

import itertools
from collections.abc import Callable
from functools import partial

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import glit_models  # noqa: F401 - registers the models

from . import report

TOKENS = 197
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    """Measure and print."""
    parser = report.parser(__doc__, rounds=11)
    report.add_clock(parser)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 16])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = timm.create_model("glit_tiny")
    layers = [layer for layer in model.blocks.modules() if isinstance(layer, nn.Linear)]
    rows: list[report.Row] = []
    for (name, dtype), batch in itertools.product(DTYPES.items(), options.batch_sizes):
        work = _operands(layers, batch, dtype)
        cases = {
            f"{form.__name__}{', backward' if backward else ''}": partial(_run, form, work, backward)
            for form, backward in itertools.product((linear, convolution), (False, True))
        }
        cases["oneDNN's operator"] = partial(_run, operator, work, False)
        seconds = report.interleaved(cases, options.rounds, options.clock)
        rows.append({"type": name, "batch": batch} | {f"{key}, ms": took * 1e3 for key, took in seconds.items()})
    report.show("pointwise", options, rows)


def _operands(layers: list[nn.Linear], batch: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Tokens [B, N, C], weight and bias of each layer."""
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(batch, TOKENS, layer.in_features, generator=generator).to(dtype).requires_grad_(),
            layer.weight.detach().to(dtype).requires_grad_(),
            layer.bias.detach().to(dtype).requires_grad_(),
        )
        for layer in layers
    ]


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[B, N, C] -> [B, N, out]"""
    return F.linear(x, weight, bias)


def convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same."""
    image = x.unsqueeze(0).permute(0, 3, 1, 2)  # [1, C, B, N]
    return F.conv2d(image, weight[:, :, None, None], bias).permute(0, 2, 3, 1).squeeze(0)


def operator(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _run(form: Callable[..., Tensor], work: list[tuple[Tensor, Tensor, Tensor]], backward: bool) -> None:
    for leaves in work:
        with torch.set_grad_enabled(backward):
            out = form(*leaves)
        if backward:
            torch.autograd.grad(out, leaves, out.detach())


if __name__ == "__main__":
    main()
