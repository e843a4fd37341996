"""Depthwise convolution with `cudnn.ops.causal_conv1d_nwh` of NVIDIA's cudnn-frontend, channels-last.

The operator is causal: output n sees the K tokens up to n. Padding K // 2 tokens at the end and dropping the first
K // 2 outputs makes it a centred convolution. It needs the Python package nvidia-cudnn-frontend, a GPU, and a cuDNN
library with the kernel: 9.24 has it, 9.19, which comes with torch 2.11, does not.

Axes: B batch, N tokens, C channels, K taps (at most 128).
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from glit_models.errors import first_line

__all__ = ["depthwise", "depthwise_silu", "unavailable"]


@functools.cache
def unavailable() -> str | None:
    """Why the operator cannot be used on this machine, or None if it can; tested by calling it once."""
    if not torch.cuda.is_available():
        return "no GPU"
    try:
        x, weight = torch.ones(1, 4, 8, device="cuda"), torch.ones(8, 1, 1, 3, device="cuda")
        depthwise(x, weight, torch.zeros(8, device="cuda"))
        torch.cuda.synchronize()
    except Exception as error:  # a missing package, library or symbol, or a device that it does not support
        return first_line(error)
    return None


def depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The convolution with zero padding of K // 2: x [B, N, C], weight [C, 1, 1, K], bias [C] -> [B, N, C]."""
    return _centred(x, weight, bias, "identity")


def depthwise_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`silu(depthwise(...))` in one kernel."""
    return _centred(x, weight, bias, "silu")


def _centred(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    from cudnn import ops

    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    reach = weight.shape[3] // 2
    taps = weight.flatten(1).t().to(x.dtype).contiguous()  # [K, C]; the operator takes one type for all
    out = ops.causal_conv1d_nwh(F.pad(x, (0, 0, 0, reach)), taps, bias.to(x.dtype), activation)
    return out[:, reach:]
