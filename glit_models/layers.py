"""The layers of GLiT: local convolution, global-local mixer, block. They know specs, not models or tasks.

Axes: B batch, N tokens, C channels. Tokens stay channels-last [B, N, C] throughout.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, DropPath, LayerNorm, Mlp
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from . import cpu_inference
from .depthwise import depthwise_conv, is_narrow
from .spec import BlockSpec

__all__ = ["Block", "GlobalLocalMixer", "LocalConv"]

torch.fx.wrap("depthwise_conv")  # a leaf for tracers: it looks at devices and shapes


class LocalConv(nn.Module):
    """The local sub-module: pointwise, GLU, depthwise convolution over the sequence, BatchNorm, SiLU, pointwise.

    The convolution module of Conformer (arXiv 2005.08100, section 2.2) without its LayerNorm. The depthwise
    convolution is a 2-D one of (1, K) over [1, C, B, N], a single picture whose rows are the sequences: tokens that lie
    channels-last in memory pass through it without a copy, which is many times faster than the 1-D form on CPU.
    (As [B, C, 1, N] it would be as fast, but torch chooses by B how to compute it: `torch.compile` would start anew.)

    Args:
        dim: C, channels in and out.
        kernel_size: odd number of taps; zero padding of `kernel_size // 2` on both sides.
        expand_ratio: hidden channels over `dim`.
        proj_drop: dropout probability after the last pointwise layer.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        expand_ratio: int,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        hidden = dim * expand_ratio
        self.expand = nn.Linear(dim, 2 * hidden, **dd)
        self.dwconv = nn.Conv2d(hidden, hidden, (1, kernel_size), padding=(0, kernel_size // 2), groups=hidden, **dd)
        self.bn: nn.Module = nn.BatchNorm2d(hidden, **dd)
        self.act = nn.SiLU()
        self.project = nn.Linear(hidden, dim, **dd)
        self.is_narrow = is_narrow(hidden, kernel_size)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        return self.proj_drop(self.project(self.convolve(self.expand(x))))

    def convolve(self, x: Tensor) -> Tensor:
        """What lies between the pointwise layers: [B, N, 2 * hidden] -> [B, N, hidden]."""
        x = F.glu(x, dim=-1)
        x = x.unsqueeze(0).permute(0, 3, 1, 2)  # [1, C, B, N], channels-last in memory
        if torch.is_grad_enabled() or self.is_narrow:
            x = depthwise_conv(x, self.dwconv.weight, self.dwconv.bias)
        else:
            x = self.dwconv(x)
        x = self.act(self.bn(x))
        return x.permute(0, 2, 3, 1).squeeze(0)

    @torch.jit.ignore
    def fuse(self) -> "LocalConv":
        """Fold BatchNorm's running statistics into the depthwise convolution, in place; for inference only."""
        bn = self.bn
        if isinstance(bn, nn.BatchNorm2d):
            assert bn.running_mean is not None  # only without track_running_stats
            assert bn.running_var is not None
            self.dwconv.weight, self.dwconv.bias = fuse_conv_bn_weights(
                self.dwconv.weight, self.dwconv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
            )
            self.bn = nn.Identity()
        return self


class GlobalLocalMixer(nn.Module):
    """The GL module: self-attention on the first channels, convolution on the last, results concatenated.

    The first C * G / H channels go to the attention of G heads, the last C * L / H to the convolution; a block may
    have only one of the two. Nothing mixes them here (GLiT, section 3.1).

    Args:
        dim: C, channels in and out.
        num_heads: heads of the model, G + L.
        block: the spec of the block.
        attn_drop, proj_drop: dropout probabilities.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        block: BlockSpec,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        head_width = dim // num_heads
        self.global_dim = block.num_global_heads * head_width
        self.attn: Attention | None = None
        self.conv: LocalConv | None = None
        if block.qkv_ratio is not None:
            self.attn = Attention(
                self.global_dim,
                num_heads=block.num_global_heads,
                attn_head_dim=int(block.qkv_ratio * head_width),
                qkv_bias=True,
                attn_drop=attn_drop,
                proj_drop=proj_drop,
                **dd,
            )
        if block.kernel_size is not None and block.expand_ratio is not None:
            local_dim = block.num_local_heads * head_width
            self.conv = LocalConv(local_dim, block.kernel_size, block.expand_ratio, proj_drop, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        if self.attn is None:
            assert self.conv is not None  # a block has at least one head
            return self.conv(x)
        if self.conv is None:
            return self.attn(x)
        # A linear layer adds its bias in a pass of its own unless its input is contiguous.
        global_out = self.attn(x[..., : self.global_dim].contiguous())
        local_out = self.conv(x[..., self.global_dim :].contiguous())
        return torch.cat([global_out, local_out], dim=-1)

    def infer(self, x: Tensor, residual: Tensor) -> Tensor:
        """`residual + forward(x)` where `cpu_inference.applies`."""
        if not cpu_inference.is_untouched(self, GlobalLocalMixer):
            return residual + self(x)
        if self.conv is None:
            assert self.attn is not None
            return cpu_inference.attend(self.attn, x, residual)
        if self.attn is None:
            return _infer_conv(self.conv, x, residual)
        global_out = cpu_inference.attend(self.attn, x[..., : self.global_dim].contiguous())
        local_out = _infer_conv(self.conv, x[..., self.global_dim :].contiguous())
        return residual + torch.cat([global_out, local_out], dim=-1)


def _infer_conv(conv: LocalConv, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """`conv(x)`, the residual added if given, where `cpu_inference.applies`: [B, N, C] -> [B, N, C]."""
    if not cpu_inference.is_untouched(conv, LocalConv):
        return conv(x) if residual is None else residual + conv(x)
    x = conv.convolve(cpu_inference.linear(conv.expand, x))
    return cpu_inference.linear(conv.project, x, residual)


class Block(nn.Module):
    """Pre-norm residual block: x + mixer(norm1(x)), then x + mlp(norm2(x)), each under stochastic depth.

    Args:
        dim: C, channels of a token.
        num_heads: heads of the model.
        block: the spec of this block.
        attn_drop, proj_drop, drop_path: dropout and stochastic-depth probabilities.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        block: BlockSpec,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = LayerNorm(dim, eps=1e-6, **dd)
        self.mixer = GlobalLocalMixer(dim, num_heads, block, attn_drop, proj_drop, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(dim * block.mlp_ratio), act_layer=nn.GELU, drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.is_fused = False

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        if torch.jit.is_scripting():
            return self._forward(x)
        else:  # noqa: RET505 - TorchScript leaves out a branch only as an `else`
            return self._infer(x) if self._infers(x) else self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.mixer(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))

    def _infers(self, x: Tensor) -> bool:
        return self.is_fused and not self.training and cpu_inference.applies(x)

    def _infer(self, x: Tensor) -> Tensor:
        x = self.mixer.infer(self.norm1(x), x)
        mlp, normed = self.mlp, self.norm2(x)
        if not cpu_inference.is_untouched(mlp, Mlp):
            return x + mlp(normed)
        return cpu_inference.linear(mlp.fc2, cpu_inference.linear(mlp.fc1, normed, gelu=True), x)

    @torch.jit.ignore
    def fuse(self) -> "Block":
        """Fold BatchNorm, and from now on use the fused operators of a CPU where they apply; in place.

        For inference only. `timm.utils.reparameterize_model` calls this.
        """
        if self.mixer.conv is not None:
            self.mixer.conv.fuse()
        self.is_fused = True
        return self
