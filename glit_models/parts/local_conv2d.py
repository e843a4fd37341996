"""The local part of the paper's ablation "Conv2d": as `local_conv`, with a 2-D kernel over the grid of patches.

Axes: B batch, N tokens, T = B * N, P prefix tokens, C channels, H/W height and width of the grid, K taps on a side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..spec import check_int, check_odd
from .flat import first_token, split_linear
from .part import BuildOptions, ExportOptions, Part, Slice, TokenGrid, count_linear_params

__all__ = ["LocalConv2d", "LocalConv2dPart"]


@final
@dataclass(frozen=True)
class LocalConv2dPart(Part):
    """Depthwise 2-D convolution over the grid of patches between two pointwise layers.

    Attributes:
        num_heads: heads whose channels it takes.
        hidden: channels of the depthwise convolution.
        kernel_size: K, odd side of the kernel.

    Source: GLiT (arXiv 2107.02960), ablation of the locality module.
    """

    kind: ClassVar[str] = "local_conv2d"
    slot: ClassVar[str] = "conv2d"
    genes: ClassVar[tuple[str, ...]] = ("kernel_size", "expand_ratio")
    has_running_statistics: ClassVar[bool] = True
    color: ClassVar[str] = "#d1a126"

    num_heads: int
    hidden: int
    kernel_size: int

    @classmethod
    def from_genes(cls, num_heads: int, head_width: int, genes: Mapping[str, Any]) -> LocalConv2dPart:
        """A kernel of `kernel_size` x `kernel_size` patches on `expand_ratio` times the heads' channels."""
        check_odd("kernel_size", genes["kernel_size"])
        check_int("expand_ratio", genes["expand_ratio"], 1)
        channels = num_heads * head_width
        return cls(channels, num_heads, channels * genes["expand_ratio"], genes["kernel_size"])

    @property
    def num_params(self) -> int:
        """Of the pointwise layers, the convolution and BatchNorm."""
        pointwise = count_linear_params(self.channels, 2 * self.hidden)
        pointwise += count_linear_params(self.hidden, self.channels)
        return pointwise + self.hidden * (self.kernel_size**2 + 1) + 2 * self.hidden

    def num_macs(self, tokens: TokenGrid) -> int:
        """Of the pointwise layers for all tokens, and the convolution for the patches."""
        pointwise = tokens.num_tokens * (2 + 1) * self.channels * self.hidden
        return pointwise + tokens.num_patches * self.hidden * self.kernel_size**2

    def build(self, options: BuildOptions) -> nn.Module:
        """See `LocalConv2d`."""
        return LocalConv2d(self, options)

    @property
    def label(self) -> str:
        """Heads, kernel size and hidden width over the channels."""
        side = f"{self.kernel_size}x{self.kernel_size}"
        return f"{self.num_heads} heads\nconv {side}, x{self.hidden / self.channels:g}"

    def slices(self, whole: LocalConv2dPart) -> dict[str, Slice]:
        """The last channels, the first hidden ones, the middle of the kernel."""
        C, M, K = self.channels, self.hidden, self.kernel_size
        last, hidden = (whole.channels - C, whole.channels), (0, M)
        taps = ((whole.kernel_size - K) // 2, (whole.kernel_size + K) // 2)
        kernel = (whole.hidden, whole.kernel_size, whole.kernel_size)
        vector = Slice.first((M,), (whole.hidden,))
        return {
            "expand.weight": Slice((2, whole.hidden, whole.channels), ((0, 2), hidden, last), (2 * M, C)),
            "expand.bias": Slice((2, whole.hidden), ((0, 2), hidden), (2 * M,)),
            "dwconv.weight": Slice(kernel, (hidden, taps, taps), (M, 1, K, K)),
            "dwconv.bias": vector,
            "bn.weight": vector,
            "bn.bias": vector,
            "bn.running_mean": vector,
            "bn.running_var": vector,
            "bn.num_batches_tracked": Slice((), (), ()),
            "project.weight": Slice((whole.channels, whole.hidden), (last, hidden), (C, M)),
            "project.bias": Slice((whole.channels,), (last,), (C,)),
        }

    def flatten(self, module: nn.Module, options: ExportOptions) -> nn.Module:
        """With BatchNorm folded and the two halves of the GLU as layers of their own."""
        assert isinstance(module, LocalConv2d)
        return _FlatLocalConv2d(module, options)


@final
class LocalConv2d(nn.Module):
    """Pointwise layer, GLU, depthwise K x K convolution and BatchNorm of the patches, SiLU, pointwise layer.

    Prefix tokens have no place in the grid: they skip the convolution and its BatchNorm.
    """

    def __init__(self, part: LocalConv2dPart, options: BuildOptions) -> None:
        super().__init__()
        hidden, size, dd = part.hidden, part.kernel_size, options.factory
        self.expand = nn.Linear(part.channels, 2 * hidden, **dd)
        self.dwconv = nn.Conv2d(hidden, hidden, size, padding=size // 2, groups=hidden, **dd)
        self.bn: nn.Module = nn.BatchNorm2d(hidden, **dd)
        self.act = nn.SiLU()
        self.project = nn.Linear(hidden, part.channels, **dd)
        self.proj_drop = nn.Dropout(options.proj_drop)
        self.set_tokens(options.tokens)

    @torch.jit.ignore
    def set_tokens(self, tokens: TokenGrid) -> None:
        """The grid of the images from now on."""
        self.height, self.width, self.num_prefix = tokens.height, tokens.width, tokens.num_prefix

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        x = F.glu(self.expand(x), dim=-1)
        patches = x[:, self.num_prefix :].unflatten(1, (self.height, self.width)).permute(0, 3, 1, 2)  # [B, C, H, W]
        patches = self.bn(self.dwconv(patches)).permute(0, 2, 3, 1).flatten(1, 2)
        x = torch.cat([x[:, : self.num_prefix], patches], dim=1) if self.num_prefix > 0 else patches
        return self.proj_drop(self.project(self.act(x)))

    @torch.jit.ignore
    def fuse(self) -> LocalConv2d:
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


class _FlatLocalConv2d(nn.Module):
    """`LocalConv2d` with BatchNorm folded, [T, C] -> [T, C], or [B, C] for the first token alone."""

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
