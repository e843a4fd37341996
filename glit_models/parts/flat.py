"""Helpers for the flat forms of parts, where all tokens are in one axis, so that a linear layer is a single Gemm.

Axes: B batch, N tokens, M queries, T = B * N, C channels, H heads, E head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .part import ExportOptions

__all__ = ["FlatAttention", "attend", "first_token", "split_linear", "split_qkv"]

_FLOAT32 = 1  # the number of the type in ONNX


def split_linear(layer: nn.Linear, count: int) -> list[nn.Linear]:
    """Split a linear layer into `count` layers with equal numbers of outputs, without gradients."""
    layers = []
    for weight, bias in zip(layer.weight.chunk(count), layer.bias.chunk(count), strict=True):
        part = nn.Linear(layer.in_features, weight.shape[0], device="meta")
        part.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        part.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        layers.append(part)
    return layers


def split_qkv(layer: nn.Linear, scale: float) -> list[nn.Linear]:
    """Split a qkv layer into linear layers for queries, keys and values.

    Splitting its output instead would copy it. The scale of the scores is folded into the weights of the queries, which
    saves a pass over the attention weights.
    """
    q, k, v = split_linear(layer, 3)
    with torch.no_grad():
        q.weight.mul_(scale)
        q.bias.mul_(scale)
    return [q, k, v]


def first_token(x: Tensor, num_tokens: int) -> Tensor:
    """The first token of each image: [T, C] -> [B, C]."""
    return x.unflatten(0, (-1, num_tokens))[:, 0]


def attend(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, options: ExportOptions, visible: Tensor | None = None
) -> Tensor:
    """softmax(q k^T) v for each head, with softmax in float32 for any type of the operands.

    Args:
        q: scaled queries, [B, M, H * E]. k: [B, N, H * E]. v: [B, N, H * F].
        num_heads: H.
        options: choose the operators.
        visible: bool [M, N], which keys a query sees; None for all.

    Returns:
        [B, M, H * F].
    """
    float_softmax = options.dtype != torch.float32
    if options.attention == "operator":
        operator: Any = torch.onnx.ops.attention
        precision = _FLOAT32 if float_softmax else None
        heads = {"q_num_heads": num_heads, "kv_num_heads": num_heads}
        return operator(q, k, v, attn_mask=visible, **heads, scale=1.0, softmax_precision=precision)[0]
    q, k, v = (tensor.unflatten(2, (num_heads, -1)).transpose(1, 2) for tensor in (q, k, v))
    if options.attention == "fused":
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=1.0)
    else:
        scores = q @ k.transpose(-2, -1)
        if visible is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
        x = (scores.float().softmax(dim=-1).to(v.dtype) if float_softmax else scores.softmax(dim=-1)) @ v
    return x.transpose(1, 2).flatten(2)


class FlatAttention(nn.Module):
    """Multi-head self-attention, [T, C] -> [T, C], or [B, C] for the first token only. Final.

    Args:
        source: has linear layers `qkv` (queries, keys, values, each by head) and `proj`, `num_heads` and `scale`.
        options: options of the export.
        visible: bool [N, N], which tokens a token sees; None for all.
    """

    visible: Tensor | None

    def __init__(self, source: Any, options: ExportOptions, visible: Tensor | None = None) -> None:
        super().__init__()
        self.num_heads, self.options = source.num_heads, options
        self.q, self.k, self.v = split_qkv(source.qkv, source.scale)
        self.proj = source.proj
        self.register_buffer("visible", visible[:1] if visible is not None and options.first_token_alone else visible)

    def forward(self, x: Tensor, num_tokens: int) -> Tensor:
        """[T, C] -> [T, C] or [B, C]."""
        if self.options.first_token_alone:
            q = self.q(first_token(x, num_tokens)).unsqueeze(1)
        else:
            q = self.q(x).unflatten(0, (-1, num_tokens))
        k, v = (layer(x).unflatten(0, (-1, num_tokens)) for layer in (self.k, self.v))
        return self.proj(attend(q, k, v, self.num_heads, self.options, self.visible).flatten(0, 1))
