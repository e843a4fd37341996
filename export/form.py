"""The form of a GLiT that becomes a clean graph: the same numbers from fewer and larger operators.

It rebuilds a copy of a model from the model's own layers and knows nothing of files. What it does, each with its
reason:

* BatchNorm is folded into the depthwise convolution (`timm.utils.reparameterize_model`).
* Between attention and convolutions tokens lie in two dimensions, so that a linear layer is one `Gemm` with its bias.
* Queries, keys and values come from linear layers of their own, as do the two halves of the GLU: to split one product
  in parts would be a copy of it. They are 3-D operands of one `Attention` operator.
* A mixed block splits its channels once rather than slicing them twice.
* Where the head sees the class token alone, the last block computes that token alone: the other tokens' queries and
  feed-forward results would be thrown away.

Axes: B batch, N tokens, T = B * N, C channels, H heads, D head width, K classes.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from timm.layers import Attention, Format
from timm.utils import reparameterize_model
from torch import Tensor, nn

from glit_models.layers import Block, GlobalLocalMixer, LocalConv
from glit_models.model import GLiT

__all__ = ["AttentionKind", "ExportForm"]

AttentionKind = Literal["operator", "products", "fused"]
_FLOAT32 = 1  # ONNX's number of the type


class ExportForm(nn.Module):
    """A model for inference on the CPU that gives the same logits and exports to a clean graph. Final.

    Args:
        model: stays as it is.
        attention: 'operator' for ONNX's `Attention` (opset 23), 'products' for two matrix products and a softmax,
            'fused' for torch's own operator.
        dtype: of parameters and activations; the logits are float32.
        image_size: height and width, to which the position embedding is resampled; 'dynamic' resamples it in the
            graph; None leaves the model's own.

    Raises:
        SpecError: if the patch does not divide the image size.
    """

    def __init__(
        self,
        model: GLiT,
        attention: AttentionKind,
        dtype: torch.dtype = torch.float32,
        image_size: tuple[int, int] | Literal["dynamic"] | None = None,
    ) -> None:
        super().__init__()
        # Folded in float32: the product of two rounded factors would be rounded once more.
        form: GLiT = reparameterize_model(copy.deepcopy(model).cpu().float().eval())
        form.requires_grad_(False)
        form.set_grad_checkpointing(False)
        _set_image_size(form, image_size)
        self.pools_token = form.global_pool == "token"
        for index, block in enumerate(form.blocks):
            assert isinstance(block, Block)
            last = self.pools_token and index == len(form.blocks) - 1
            form.blocks[index] = _FlatBlock(block, attention, dtype, class_token_alone=last)
        self.form = form.to(dtype)
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> logits [B, K]."""
        form = self.form
        x = form._embed(images.to(self.dtype))
        num_tokens = x.shape[1]
        x = x.flatten(0, 1)  # [T, C]
        for block in form.blocks:
            x = block(x, num_tokens)
        x = form.norm(x)
        if not self.pools_token:  # else there is one token for each image already
            x = form.pool(x.unflatten(0, (-1, num_tokens)))
        return form.head(form.fc_norm(x)).float()


def _set_image_size(form: GLiT, image_size: tuple[int, int] | Literal["dynamic"] | None) -> None:
    if image_size == "dynamic":
        # What `GLiT(dynamic_img_size=True)` sets.
        form.dynamic_img_size = True  # type: ignore[misc]
        form.patch_embed.flatten = False
        form.patch_embed.output_fmt = Format.NHWC
        form.patch_embed.strict_img_size = False
        return
    if image_size is not None and tuple(image_size) != tuple(form.patch_embed.img_size):
        form.set_input_size(image_size)
    if form.dynamic_img_size:  # a fixed size from here on
        form.dynamic_img_size = False  # type: ignore[misc]
        form.patch_embed.flatten = True
        form.patch_embed.output_fmt = Format.NCHW
        form.patch_embed.strict_img_size = True


class _FlatBlock(nn.Module):
    """A block over [T, C]; with `class_token_alone` it gives the first token of each image, [B, C]."""

    def __init__(self, source: Block, kind: AttentionKind, dtype: torch.dtype, class_token_alone: bool) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = source.norm1, source.norm2, source.mlp
        self.mixer = _FlatMixer(source.mixer, kind, dtype, class_token_alone)
        self.class_token_alone = class_token_alone

    def forward(self, x: Tensor, num_tokens: int) -> Tensor:
        mixed = self.mixer(self.norm1(x), num_tokens)
        x = (_first(x, num_tokens) if self.class_token_alone else x) + mixed
        return x + self.mlp(self.norm2(x))


class _FlatMixer(nn.Module):
    """Attention on the first channels, convolution on the last, over [T, C]."""

    def __init__(self, source: GlobalLocalMixer, kind: AttentionKind, dtype: torch.dtype, alone: bool) -> None:
        super().__init__()
        self.global_dim = source.global_dim
        self.attn = None if source.attn is None else _FlatAttention(source.attn, kind, dtype, alone)
        self.conv = None if source.conv is None else _FlatConv(source.conv, alone)

    def forward(self, x: Tensor, num_tokens: int) -> Tensor:
        if self.attn is None:
            assert self.conv is not None  # a block has at least one head
            return self.conv(x, num_tokens)
        if self.conv is None:
            return self.attn(x, num_tokens)
        for_attn, for_conv = x.split([self.global_dim, x.shape[-1] - self.global_dim], dim=-1)
        return torch.cat([self.attn(for_attn, num_tokens), self.conv(for_conv, num_tokens)], dim=-1)


class _FlatAttention(nn.Module):
    """timm's `Attention` of a GLiT, [T, C] -> [T, C], or [B, C] for the class token alone."""

    def __init__(self, source: Attention, kind: AttentionKind, dtype: torch.dtype, alone: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim = source.num_heads, source.head_dim
        self.kind, self.alone = kind, alone
        self.float_softmax = dtype != torch.float32  # whatever the type of the operands
        self.q, self.k, self.v = _parts(source.qkv, 3)
        self.proj = source.proj
        if kind == "products":
            # The scale goes into the weights of the queries, which saves a pass over the attention weights.
            with torch.no_grad():
                self.q.weight.mul_(source.scale)
                self.q.bias.mul_(source.scale)

    def forward(self, x: Tensor, num_tokens: int) -> Tensor:
        q = self.q(_first(x, num_tokens)).unsqueeze(1) if self.alone else self.q(x).unflatten(0, (-1, num_tokens))
        k, v = (layer(x).unflatten(0, (-1, num_tokens)) for layer in (self.k, self.v))  # [B, N, H * D]
        if self.kind == "operator":
            attend: Any = torch.onnx.ops.attention
            heads = self.num_heads
            precision = _FLOAT32 if self.float_softmax else None
            x = attend(q, k, v, q_num_heads=heads, kv_num_heads=heads, softmax_precision=precision)[0]
            return self.proj(x.flatten(0, 1))
        q, k, v = (tensor.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2) for tensor in (q, k, v))
        x = self._products(q, k, v) if self.kind == "products" else nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2).flatten(0, 1))

    def _products(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, H, N, D] each -> [B, H, N, D]."""
        scores = q @ k.transpose(-2, -1)
        if self.float_softmax:
            return scores.float().softmax(dim=-1).to(v.dtype) @ v
        return scores.softmax(dim=-1) @ v


class _FlatConv(nn.Module):
    """`LocalConv` with BatchNorm folded, [T, C] -> [T, C], or [B, C] for the class token alone."""

    def __init__(self, source: LocalConv, alone: bool) -> None:
        super().__init__()
        self.alone = alone
        self.expand, self.gate = _parts(source.expand, 2)
        self.dwconv, self.act, self.project = source.dwconv, source.act, source.project

    def forward(self, x: Tensor, num_tokens: int) -> Tensor:
        x = self.expand(x) * self.gate(x).sigmoid()
        x = x.unflatten(0, (-1, 1, num_tokens)).permute(0, 3, 1, 2)  # [B, C, 1, N]
        x = self.act(self.dwconv(x)).permute(0, 2, 3, 1).flatten(0, 2)
        return self.project(_first(x, num_tokens) if self.alone else x)


def _parts(layer: nn.Linear, count: int) -> list[nn.Linear]:
    """A linear layer cut into layers of equal numbers of outputs."""
    parts = []
    for weight, bias in zip(layer.weight.chunk(count), layer.bias.chunk(count), strict=True):
        part = nn.Linear(layer.in_features, weight.shape[0], device="meta")
        part.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        part.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        parts.append(part)
    return parts


def _first(x: Tensor, num_tokens: int) -> Tensor:
    """The first token of each image: [T, C] -> [B, C]."""
    return x.unflatten(0, (-1, num_tokens))[:, 0]
