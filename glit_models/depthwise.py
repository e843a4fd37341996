"""Depthwise convolution with a faster weight gradient on CPU.

oneDNN quickly computes the output and the input gradient of a channels-last depthwise convolution, but takes far longer
for the weight gradient; batched matrix products are faster there (`python -m benchmarks.depthwise`).

Axes: B batch, N tokens, C channels, K taps, T tokens of a tile.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor, nn

__all__ = ["DepthwiseConv", "depthwise_conv"]

_MAX_TILE = 40  # tokens; about the fastest of 16 to 100 at GLiT-Tiny's sizes
_MAX_WHOLE = 32  # tokens of a single tile without padding; with many channels, more would fill the cache


def _is_narrow(channels: int, taps: int) -> bool:
    """Whether to avoid oneDNN's bfloat16 kernel, which never returns with too few channels and many taps.

    Seen with torch 2.15 on a CPU with AMX; with one channel more or two taps fewer, it returns.
    """
    return channels <= 16 and taps >= 15


@register_notrace_function
def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.conv2d(x, weight, bias, padding=(0, K // 2), groups=C)`: [1, C, B, N], [C, 1, 1, K], [C] -> [1, C, B, N].

    Equal to the stock operator except for the rounding of the weight's gradient.
    """
    if torch.jit.is_scripting():
        return F.conv2d(x, weight, bias, padding=(0, weight.shape[3] // 2), groups=weight.shape[0])
    else:  # noqa: RET505 - TorchScript leaves out a branch only as an `else`
        autocast = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
        if x.device.type == "cpu" and dtype == torch.bfloat16 and _is_narrow(weight.shape[0], weight.shape[3]):
            with torch.autocast("cpu", enabled=False):
                args = (x.float(), weight.float(), None if bias is None else bias.float())
                return F.conv2d(*args, padding=(0, weight.shape[3] // 2), groups=weight.shape[0]).to(dtype)
        if x.device.type != "cpu" or not torch.is_grad_enabled() or torch.jit.is_tracing():
            return F.conv2d(x, weight, bias, padding=(0, weight.shape[3] // 2), groups=weight.shape[0])
        if autocast:
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        return _Depthwise.apply(x, weight, bias)


torch.fx.wrap("depthwise_conv")  # a leaf for tracers, because it branches on devices and shapes


class DepthwiseConv(nn.Conv2d):
    """A depthwise `Conv2d` with a kernel of (1, K) that trains by `depthwise_conv`: [1, C, B, N] -> [1, C, B, N].

    It is called like any module, so hooks, pruning, adapters and tracing see it.
    """

    def __init__(self, channels: int, taps: int, **factory: Any) -> None:
        super().__init__(channels, channels, (1, taps), padding=(0, taps // 2), groups=channels, **factory)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return depthwise_conv(input, weight, bias)

    @torch.jit.ignore
    def plain(self) -> nn.Conv2d:
        """A `Conv2d` with the same parameters, which also takes other shapes than [1, C, B, N] with gradients."""
        conv = nn.Conv2d(
            self.in_channels, self.in_channels, (1, self.weight.shape[3]), padding=(0, self.weight.shape[3] // 2),
            groups=self.in_channels, device="meta",
        )  # fmt: skip
        conv.weight, conv.bias = self.weight, self.bias
        return conv


class _Depthwise(torch.autograd.Function):
    generate_vmap_rule = True  # gradients of single images: torch.func.vmap of torch.func.grad

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, padding=(0, weight.shape[3] // 2), groups=weight.shape[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        padding = [0, weight.shape[3] // 2]
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.convolution_backward(
                grad, x, weight, None, [1, 1], padding, [1, 1], False, [0, 0], weight.shape[0], [True, False, False]
            )[0]
        if ctx.needs_input_grad[1]:
            grad_weight = weight_grad(x[0].transpose(0, 1), grad[0].transpose(0, 1), weight.shape[3])
        if ctx.needs_input_grad[2]:  # not from the operator above, which would compute the slow part
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_weight, grad_bias


def weight_grad(x: Tensor, grad: Tensor, taps: int) -> Tensor:
    """The sum over b and n of grad[b, c, n] * x[b, c, n + k - K // 2]: [B, C, N], [B, C, N] -> [C, 1, 1, K].

    A matrix product per channel holds all products of two tokens that are at most a tile and K apart; tap k sums one of
    its diagonals. Its operands are contiguous, because torch would otherwise copy them matrix by matrix.
    """
    diagonals = _whole(x, grad, taps) if x.shape[2] <= _MAX_WHOLE else _tiled(x, grad, taps)
    return diagonals.view(x.shape[1], 1, 1, taps)


def _whole(x: Tensor, grad: Tensor, taps: int) -> Tensor:
    channels, tokens = x.shape[1], x.shape[2]
    # [C, N, N], [c, i, j] = grad at i times x at j
    products = torch.bmm(grad.permute(1, 2, 0).contiguous(), x.permute(1, 0, 2).contiguous())
    # The diagonal j - i = k - K // 2: rows of width 2N read with stride 2N + 1 put diagonals in columns.
    flat = F.pad(F.pad(products, (tokens - 1, 1)).reshape(channels, -1), (0, tokens))
    diagonals = flat.as_strided((channels, tokens, 2 * tokens - 1), (flat.stride(0), 2 * tokens + 1, 1)).sum(1)
    excess = taps // 2 - (tokens - 1)  # taps that reach beyond the sequence, or (negative) diagonals beyond the taps
    return F.pad(diagonals, (excess, excess))


def _tiled(x: Tensor, grad: Tensor, taps: int) -> Tensor:
    batch, channels, tokens = x.shape
    tiles = -(-tokens // _MAX_TILE)
    tile = -(-tokens // tiles)
    window = tile + taps - 1  # of x, for one tile of the gradient
    missing = tiles * tile - tokens
    windows = F.pad(x, (taps // 2, taps // 2 + missing)).unfold(2, window, tile)  # [B, C, tiles, window]
    windows = windows.permute(1, 0, 2, 3).reshape(channels, -1, window).contiguous()
    tiled = F.pad(grad, (0, missing)).view(batch, channels, tiles, tile)
    tiled = tiled.permute(1, 3, 0, 2).reshape(channels, tile, -1).contiguous()
    products = torch.bmm(tiled, windows)  # [C, T, window]
    # Token t of a tile uses tap k at t + k of the window.
    return products.as_strided((channels, tile, taps), (products.stride(0), window + 1, 1)).sum(1)
