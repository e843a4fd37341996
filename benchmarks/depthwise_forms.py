"""Equivalent forms of the depthwise convolution, and a way to use one of them in a GLiT.

All take x [B, N, C], weight [C, 1, 1, K] and bias [C], pad with K // 2 zeros, return [B, N, C], are differentiable and
follow autocast. The fastest one depends on the device, the compiler and whether gradients are needed; measure it with
`python -m benchmarks.depthwise --device cuda`.

Axes: B batch, N tokens, C channels, K taps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glit_models.block import Mixer
from glit_models.depthwise import weight_grad
from glit_models.parts import LocalConv

from . import cudnn_depthwise, triton_depthwise

__all__ = ["FORMS", "Convolve", "Form", "folded_chain", "has_conv1d_template", "use_form"]

Convolve = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Form:
    """One form of the convolution.

    Attributes:
        convolve: the convolution.
        convolve_silu: the convolution followed by a SiLU, if the form fuses both.
        glu_convolve_silu: the same with a GLU before it, whose input is [B, N, 2 C].
        max_autotune: whether the compiler has a template for the form that only this mode tries.
        stock: whether it is a single call of torch's convolution, without custom code to maintain.
    """

    convolve: Convolve
    convolve_silu: Convolve | None = None
    glu_convolve_silu: Convolve | None = None
    max_autotune: bool = False
    stock: bool = False


def conv2d_rows(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 2-D convolution of (1, K) over [1, C, B, N], stored channels-last, without a copy; used by the model."""
    image = x.unsqueeze(0).permute(0, 3, 1, 2)
    out = F.conv2d(image, weight, bias, padding=(0, weight.shape[3] // 2), groups=len(weight))
    return out.permute(0, 2, 3, 1).squeeze(0)


def conv2d_channels_last(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same over B images of one row, [B, C, 1, N]."""
    image = x.transpose(1, 2).unsqueeze(2)
    return F.conv2d(image, weight, bias, padding=(0, weight.shape[3] // 2), groups=len(weight)).squeeze(2).mT


def conv2d_contiguous(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same over a contiguous copy of them."""
    image = x.transpose(1, 2).unsqueeze(2).contiguous()
    return F.conv2d(image, weight, bias, padding=(0, weight.shape[3] // 2), groups=len(weight)).squeeze(2).mT


def conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 1-D convolution over [B, C, N]; the operator or the compiler decides whether to copy x."""
    return F.conv1d(x.mT, weight.squeeze(2), bias, padding=weight.shape[3] // 2, groups=len(weight)).mT


def shifted_sum(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The sum over k of x, shifted by k - K // 2, times weight k: K products that a compiler can fuse."""
    return _ShiftedSum.apply(*_autocast(x, weight, bias))


def toeplitz(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A matrix product per channel with the banded N x N matrix of its taps, over [C, N, B]."""
    return _Toeplitz.apply(*_autocast(x, weight, bias))


def has_conv1d_template() -> bool:
    """Whether the installed Inductor has a Triton template for depthwise conv1d (torch 2.11 does not yet)."""
    templates = Path(torch.__file__).parent / "_inductor" / "kernel" / "templates"
    return any(templates.glob("triton_depthwise_conv*"))  # importing Inductor to ask it takes seconds


FORMS: dict[str, Form] = {
    "conv2d, rows": Form(conv2d_rows, stock=True),
    "conv2d, channels-last": Form(conv2d_channels_last, stock=True),
    "conv2d, contiguous": Form(conv2d_contiguous, stock=True),
    "conv1d": Form(conv1d, max_autotune=has_conv1d_template(), stock=True),
    "shifted sum": Form(shifted_sum),
    "Toeplitz": Form(toeplitz),
    "Triton": Form(triton_depthwise.depthwise, triton_depthwise.depthwise_silu),
    "Triton, tensor cores": Form(
        partial(triton_depthwise.depthwise, tensor_cores=True),
        partial(triton_depthwise.depthwise_silu, tensor_cores=True),
        triton_depthwise.glu_depthwise_silu,
    ),
}
if cudnn_depthwise.unavailable() is None:
    FORMS["cuDNN, causal"] = Form(cudnn_depthwise.depthwise, cudnn_depthwise.depthwise_silu)


def folded_chain(form: Form, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GLU, convolution with folded BatchNorm, SiLU: [B, N, 2 C] -> [B, N, C], fused where the form supports it."""
    if form.glu_convolve_silu is not None:
        return form.glu_convolve_silu(x, weight, bias)
    x = F.glu(x, dim=-1)
    if form.convolve_silu is not None:
        return form.convolve_silu(x, weight, bias)
    return F.silu(form.convolve(x, weight, bias))


def _autocast(*tensors: Tensor) -> Iterator[Tensor]:
    device = tensors[0].device.type
    enabled = torch.is_autocast_enabled(device)
    return (tensor.to(torch.get_autocast_dtype(device)) if enabled else tensor for tensor in tensors)


class _ShiftedSum(torch.autograd.Function):
    """Has an explicit gradient, because autograd would scatter each of the K slices into a tensor of zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _shifted_sum(x, weight.flatten(1).t(), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        taps = weight.shape[3]
        grad_x = _shifted_sum(grad, weight.flatten(1).t().flip(0), None)
        wide, windows = grad.to(_wide(grad)), _padded(x, taps).unfold(1, taps, 1)  # [B, N, C, K]
        grad_weight = (wide.unsqueeze(3) * windows).sum((0, 1))  # one sum: of K sums a compiler makes many kernels
        return grad_x, grad_weight.view_as(weight).to(weight.dtype), wide.sum((0, 1)).to(weight.dtype)


def _shifted_sum(x: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    """Computes in float32 at least, because it is rounded K times if no compiler keeps the sum in registers."""
    padded = _padded(x, len(taps))
    wide = taps.to(padded.dtype)
    total = padded[:, : x.shape[1]] * wide[0]
    for k in range(1, len(taps)):
        total = total + padded[:, k : k + x.shape[1]] * wide[k]
    return (total if bias is None else total + bias).to(x.dtype)


def _padded(x: Tensor, taps: int) -> Tensor:
    return F.pad(x, (0, 0, taps // 2, taps // 2)).to(_wide(x))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _Toeplitz(torch.autograd.Function):
    """Has an explicit gradient, because autograd would sum the weight's gradient over a gather's indices."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        columns = x.permute(2, 1, 0).contiguous()  # [C, N, B]
        ctx.save_for_backward(columns, weight)
        product = torch.bmm(_banded(weight.flatten(1), x.shape[1]), columns)
        return product.permute(2, 1, 0) + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        columns, weight = ctx.saved_tensors
        matrix = _banded(weight.flatten(1), grad.shape[1])
        grad_x = torch.bmm(matrix.mT, grad.permute(2, 1, 0).contiguous()).permute(2, 1, 0)
        grad_weight = weight_grad(columns.permute(2, 0, 1), grad.mT, weight.shape[3])
        return grad_x, grad_weight, grad.sum((0, 1))


def _banded(taps: Tensor, N: int) -> Tensor:
    """[C, K] -> [C, N, N], whose element [c, i, j] is tap j - i + K // 2, or zero."""
    excess = N - 1 - taps.shape[1] // 2  # zeros up to the farthest token, or (negative) taps beyond it
    return F.pad(taps, (excess, excess)).unfold(1, N, 1).flip(1)  # windows that begin one tap earlier row by row


class _FormConv(nn.Module):
    """A `LocalConv` with the same parameters and names, whose convolution is replaced by a form."""

    def __init__(self, conv: LocalConv, form: Form) -> None:
        super().__init__()
        for name, child in conv.named_children():
            self.add_module(name, child)
        self.form = form
        self.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        x, weight, bias = self.expand(x), self.dwconv.weight, self.dwconv.bias
        if isinstance(self.bn, nn.Identity):
            return self.proj_drop(self.project(folded_chain(self.form, x, weight, bias)))
        x = self.form.convolve(F.glu(x, dim=-1), weight, bias)
        x = self.bn(x.mT.unsqueeze(2)).squeeze(2).mT
        return self.proj_drop(self.project(self.act(x)))


@contextmanager
def use_form(model: nn.Module, form: Form) -> Iterator[nn.Module]:
    """Context manager in which the local sub-modules of a GLiT use a form; parameters do not change.

    Reparameterize a model before, not inside: then the form also computes GLU and SiLU, if it can.
    """
    mixers = [m for m in model.modules() if isinstance(m, Mixer) and "conv" in m]
    originals = [mixer["conv"] for mixer in mixers]
    try:
        for mixer in mixers:
            mixer["conv"] = _FormConv(mixer["conv"], form)
        yield model
    finally:
        for mixer, original in zip(mixers, originals, strict=True):
            mixer["conv"] = original.train(mixer.training)
