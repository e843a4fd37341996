"""Linear layers and attention on a CPU without gradients, in fewer steps.

Knows tensors and the layers of torch and timm only. In eager mode dropouts and identities that do nothing still take
time to call, and in bfloat16 `F.linear` writes the bias first and adds the product to it, where oneDNN's operator,
which `torch.compile` uses too, takes bias, GELU and residual along. In float32 that operator costs more to call than it
saves where there are few tokens, so `F.linear` stays (`python -m benchmarks.performance`, `benchmarks.pointwise`).

Axes: B batch, N tokens, C channels.
"""

import functools

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

__all__ = ["applies", "attend", "is_untouched", "linear"]


def applies(x: Tensor) -> bool:
    """Whether the functions here can and should take x: else the layers' own forward passes must."""
    return (
        not torch.compiler.is_compiling()  # compilers and exporters choose operators themselves
        and type(x) is Tensor  # neither a tracer's proxy nor a subclass with operators of its own
        and not torch.is_grad_enabled()  # oneDNN's operator has no gradient
        and x.device.type == "cpu"
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0  # nobody counts or records operators
    )


@functools.cache
def _has_bfloat16() -> bool:
    """Whether oneDNN multiplies matrices of bfloat16 here; measured on x86 alone."""
    on_x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return on_x86 and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module may be passed by: it is of this very class (no adapter, not quantized) and without hooks."""
    return type(module) is kind and not module._forward_hooks and not module._forward_pre_hooks


def linear(layer: nn.Linear, x: Tensor, residual: Tensor | None = None, gelu: bool = False) -> Tensor:
    """`layer(x)`, with a GELU after it or a residual added to it if so asked: [..., in] -> [..., out]."""
    if not is_untouched(layer, nn.Linear):
        x = layer(x)
    else:
        weight, bias = layer.weight, layer.bias
        if _fits_onednn(x, weight):
            if gelu:
                return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "gelu", [], "none")
            if residual is not None:
                return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")
            return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
        x = F.linear(x, weight, bias)
    x = F.gelu(x) if gelu else x
    return x if residual is None else residual + x


def _fits_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype == weight.dtype == torch.bfloat16
        and type(weight) is nn.Parameter
        and _has_bfloat16()
        and bool(torch.backends.mkldnn.enabled)
    )


def attend(attn: Attention, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """`attn(x)` without dropout and norms of queries and keys, residual added if given: [B, N, C] -> [B, N, C]."""
    if not is_untouched(attn, Attention):
        return attn(x) if residual is None else residual + attn(x)
    B, N, _ = x.shape
    q, k, v = linear(attn.qkv, x).view(B, N, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, -1)
    return linear(attn.proj, x, residual)
