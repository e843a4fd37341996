"""The local part of the paper's ablation "Conv2d": like `local_conv`, with a 2-D kernel over the grid of patches.

Axes: B batch, N tokens, T = B * N, P prefix tokens, C channels, H/W height and width of the grid, K taps per side.
"""

from __future__ import annotations

from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .flat import first_token, split_linear
from .local_conv import GatedConv, GatedConvPart
from .part import BuildOptions, ExportOptions, TokenGrid, show_heads

__all__ = ["LocalConv2d", "LocalConv2dPart"]


@final
class LocalConv2dPart(GatedConvPart):
    """Depthwise 2-D convolution over the grid of patches between two pointwise layers.

    Source: GLiT (arXiv 2107.02960), ablation of the locality module.
    """

    kind: ClassVar[str] = "local_conv2d"
    slot: ClassVar[str] = "conv2d"
    color: ClassVar[str] = "#d1a126"

    @property
    def kernel(self) -> tuple[int, int]:
        """K x K patches."""
        return self.kernel_size, self.kernel_size

    def num_macs(self, tokens: TokenGrid) -> int:
        """Multiply-adds of the pointwise layers for all tokens, and of the convolution for the patches."""
        pointwise = tokens.num_tokens * (2 + 1) * self.channels * self.hidden
        return pointwise + tokens.num_patches * self.hidden * self.kernel_size**2

    def build(self, options: BuildOptions) -> nn.Module:
        """Build a `LocalConv2d`."""
        return LocalConv2d(self, options)

    @property
    def label(self) -> str:
        """Heads, kernel size, and ratio of hidden width to channels."""
        side = f"{self.kernel_size}x{self.kernel_size}"
        return f"{show_heads(self.num_heads)}\nconv {side}, x{self.hidden / self.channels:g}"

    def flatten(self, module: nn.Module, options: ExportOptions) -> nn.Module:
        """The flat form, with BatchNorm folded and the two halves of the GLU as separate layers."""
        assert isinstance(module, LocalConv2d)
        return _FlatLocalConv2d(module, options)

    def mixing(self, module: nn.Module, x: Tensor) -> Tensor:
        """See `GatedConv.mixing`; a prefix token attends only to itself."""
        assert isinstance(module, LocalConv2d)
        prefix = torch.eye(module.num_prefix, dtype=x.dtype, device=x.device)
        return torch.block_diag(prefix, module.mixing(module.height, module.width))[None, None]


@final
class LocalConv2d(GatedConv):
    """Pointwise layer, GLU, depthwise K x K convolution and BatchNorm of the patches, SiLU, pointwise layer.

    Prefix tokens are not in the grid: they skip the convolution and its BatchNorm.
    """

    def __init__(self, part: LocalConv2dPart, options: BuildOptions) -> None:
        super().__init__(part, options)
        self.set_tokens(options.tokens)

    @torch.jit.ignore
    def set_tokens(self, tokens: TokenGrid) -> None:
        """Set the grid of the following images."""
        self.height, self.width, self.num_prefix = tokens.height, tokens.width, tokens.num_prefix

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        x = F.glu(self.expand(x), dim=-1)
        patches = x[:, self.num_prefix :].unflatten(1, (self.height, self.width)).permute(0, 3, 1, 2)  # [B, C, H, W]
        patches = self.bn(self.dwconv(patches)).permute(0, 2, 3, 1).flatten(1, 2)
        x = torch.cat([x[:, : self.num_prefix], patches], dim=1) if self.num_prefix > 0 else patches
        return self.proj_drop(self.project(self.act(x)))


class _FlatLocalConv2d(nn.Module):
    """`LocalConv2d` with BatchNorm folded, [T, C] -> [T, C], or [B, C] for the first token only."""

    def __init__(self, source: LocalConv2d, options: ExportOptions) -> None:
        super().__init__()
        self.tokens, self.alone = options.tokens, options.first_token_alone
        self.expand, self.gate = split_linear(source.expand, 2)
        self.dwconv, self.act, self.project = source.dwconv, source.act, source.project

    def forward(self, x: Tensor, num_tokens: int) -> Tensor:
        if self.alone:
            x = first_token(x, num_tokens)
        x = self.expand(x) * self.gate(x).sigmoid()
        if not self.alone:  # the class token skips the convolution
            x = self._convolve(x.unflatten(0, (-1, num_tokens))).flatten(0, 1)
        return self.project(self.act(x))

    def _convolve(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        prefix, patches = x.split([self.tokens.num_prefix, self.tokens.num_patches], dim=1)
        image = patches.unflatten(1, (self.tokens.height, self.tokens.width)).permute(0, 3, 1, 2)  # [B, C, H, W]
        patches = self.dwconv(image).permute(0, 2, 3, 1).flatten(1, 2)
        return torch.cat([prefix, patches], dim=1) if self.tokens.num_prefix else patches
