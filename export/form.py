"""The form of a GLiT that becomes a clean graph: the same numbers from fewer and larger operators.

It swaps modules on a copy of a model and knows nothing of files; `onnx.py` and `program.py` export what it returns.
The swaps, each with its reason:

* BatchNorm is folded into the depthwise convolution (`timm.utils.reparameterize_model`).
* Queries, keys and values are split from one product with `chunk`, as 3-D operands of one `Attention` operator.
* A mixed block splits its channels once rather than slicing them twice.
* Where the head sees the class token alone, the last block computes that token alone: the other tokens' queries and
  feed-forward results would be thrown away.

Axes: B batch, N tokens, C channels, H heads, D head width, h/w grid height and width.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from timm.layers import Attention, Format
from timm.utils import reparameterize_model
from torch import Tensor, nn

from glit_models.layers import Block, GlobalLocalMixer
from glit_models.model import GLiT

__all__ = ["AttentionForm", "export_form"]

_FLOAT32 = 1  # ONNX's number of the type


def export_form(
    model: GLiT,
    *,
    attention: Literal["operator", "products", "fused"],
    dtype: torch.dtype = torch.float32,
    image_size: tuple[int, int] | Literal["dynamic"] | None = None,
) -> GLiT:
    """A copy of the model on the CPU, for inference, that gives the same logits and exports to a clean graph.

    Args:
        model: stays as it is.
        attention: 'operator' for ONNX's `Attention` (opset 23), 'products' for two matrix products and a softmax,
            'fused' for torch's own operator.
        dtype: of parameters and activations.
        image_size: height and width, to which the position embedding is resampled; 'dynamic' resamples it in the
            graph; None leaves the model's own.

    Raises:
        SpecError: if the patch does not divide the image size.
    """
    # Folded in float32: the product of two rounded factors would be rounded once more.
    form: GLiT = reparameterize_model(copy.deepcopy(model).cpu().float().eval())
    form.requires_grad_(False)
    form.set_grad_checkpointing(False)
    _set_image_size(form, image_size)
    for block in form.blocks:
        assert isinstance(block, Block)
        mixer = block.mixer
        if isinstance(mixer.attn, Attention):
            mixer.attn = AttentionForm(mixer.attn, attention, keep_softmax=dtype != torch.float32)
        if mixer.attn is not None and mixer.conv is not None:
            block.mixer = _MixedForm(mixer)  # type: ignore[assignment]
    if form.global_pool == "token":
        last = form.blocks[-1]
        assert isinstance(last, Block)
        form.blocks[-1] = _LastBlock(last)
    return form.to(dtype)


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


class AttentionForm(nn.Module):
    """timm's `Attention` of a GLiT over 3-D operands, with its own layers.

    Args:
        source: its `qkv` and `proj` are shared, not copied.
        kind: see `export_form`.
        keep_softmax: compute the softmax in float32 whatever the type of the operands.
    """

    def __init__(self, source: Attention, kind: str, keep_softmax: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim = source.num_heads, source.head_dim
        self.qkv, self.proj = source.qkv, source.proj
        self.kind = kind
        self.keep_softmax = keep_softmax
        if kind == "products":
            # The scale goes into the weights of the queries, which saves a pass over the attention weights.
            with torch.no_grad():
                self.qkv.weight[: source.attn_dim] *= source.scale
                self.qkv.bias[: source.attn_dim] *= source.scale

    def forward(self, x: Tensor, num_queries: int | None = None) -> Tensor:
        """[B, N, C] -> [B, N, C], or of the first `num_queries` tokens alone."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # [B, N, H * D] each
        if num_queries is not None:
            q = q[:, :num_queries]
        if self.kind == "operator":
            attend: Any = torch.onnx.ops.attention
            heads = self.num_heads
            precision = _FLOAT32 if self.keep_softmax else None
            x = attend(q, k, v, q_num_heads=heads, kv_num_heads=heads, softmax_precision=precision)[0]
            return self.proj(x)
        q, k, v = (tensor.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2) for tensor in (q, k, v))
        x = self._products(q, k, v) if self.kind == "products" else nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))

    def _products(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, H, N, D] each -> [B, H, N, D]."""
        scores = q @ k.transpose(-2, -1)
        if self.keep_softmax:
            return scores.float().softmax(dim=-1).to(v.dtype) @ v
        return scores.softmax(dim=-1) @ v


class _MixedForm(nn.Module):
    """A block's mixer with attention and convolution, its channels split once."""

    def __init__(self, source: GlobalLocalMixer) -> None:
        super().__init__()
        self.global_dim = source.global_dim
        self.attn, self.conv = source.attn, source.conv

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        assert self.attn is not None
        assert self.conv is not None
        for_attn, for_conv = x.split([self.global_dim, x.shape[-1] - self.global_dim], dim=-1)
        return torch.cat([self.attn(for_attn), self.conv(for_conv)], dim=-1)


class _LastBlock(nn.Module):
    """The last block where only the class token is looked at afterwards: [B, N, C] -> [B, 1, C]."""

    def __init__(self, source: Block) -> None:
        super().__init__()
        self.norm1, self.mixer, self.norm2, self.mlp = source.norm1, source.mixer, source.norm2, source.mlp
        mixer = source.mixer
        self.attends = isinstance(mixer, GlobalLocalMixer) and mixer.conv is None

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        if self.attends:
            assert self.mixer.attn is not None
            mixed = self.mixer.attn(normed, num_queries=1)
        else:
            mixed = self.mixer(normed)[:, :1]
        x = x[:, :1] + mixed
        return x + self.mlp(self.norm2(x))
