"""GLiT's local part: Conformer's convolution module over the token sequence, and the code shared with `local_conv2d`.

Axes: B batch, N tokens, T = B * N, C channels, K taps. Tokens stay channels-last [B, N, C] throughout.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..depthwise import DepthwiseConv
from ..spec import check_int, check_odd
from .flat import first_token, split_linear
from .part import BuildOptions, ExportOptions, Part, Slice, TokenGrid, count_linear_params, show_heads

__all__ = ["GatedConv", "GatedConvPart", "LocalConv", "LocalConvPart"]


@dataclass(frozen=True)
class GatedConvPart(Part):
    """Base class of the convolution modules: two pointwise layers with a depthwise convolution between them.

    Attributes:
        num_heads: number of heads whose channels it takes.
        hidden: channels of the depthwise convolution.
        kernel_size: K, odd number of taps along each convolved axis.
    """

    genes: ClassVar[tuple[str, ...]] = ("kernel_size", "expand_ratio")
    has_running_statistics: ClassVar[bool] = True

    num_heads: int
    hidden: int
    kernel_size: int

    @classmethod
    def from_genes(cls, num_heads: int, head_width: int, genes: Mapping[str, Any]) -> Self:
        """The part with kernels of `kernel_size` on `expand_ratio` times the heads' channels."""
        check_odd("kernel_size", genes["kernel_size"])
        check_int("expand_ratio", genes["expand_ratio"], 1)
        channels = num_heads * head_width
        return cls(channels, num_heads, channels * genes["expand_ratio"], genes["kernel_size"])

    @property
    @abstractmethod
    def kernel(self) -> tuple[int, int]:
        """Height and width of the kernel."""

    @property
    def num_params(self) -> int:
        """Parameters of the pointwise layers, the convolution and BatchNorm."""
        pointwise = count_linear_params(self.channels, 2 * self.hidden)
        pointwise += count_linear_params(self.hidden, self.channels)
        return pointwise + self.hidden * (math.prod(self.kernel) + 1) + 2 * self.hidden

    def slices(self, whole: Self) -> dict[str, Slice]:
        """The last channels (the first ones belong to attention), the first hidden ones, the centre of the kernel."""
        C, M = self.channels, self.hidden
        last, hidden = (whole.channels - C, whole.channels), (0, M)
        taps = (((large - K) // 2, (large + K) // 2) for large, K in zip(whole.kernel, self.kernel, strict=True))
        vector = Slice.first((M,), (whole.hidden,))
        return {
            "expand.weight": Slice((2, whole.hidden, whole.channels), ((0, 2), hidden, last), (2 * M, C)),
            "expand.bias": Slice((2, whole.hidden), ((0, 2), hidden), (2 * M,)),
            "dwconv.weight": Slice((whole.hidden, *whole.kernel), (hidden, *taps), (M, 1, *self.kernel)),
            "dwconv.bias": vector,
            "bn.weight": vector,
            "bn.bias": vector,
            "bn.running_mean": vector,
            "bn.running_var": vector,
            "bn.num_batches_tracked": Slice((), (), ()),
            "project.weight": Slice((whole.channels, whole.hidden), (last, hidden), (C, M)),
            "project.bias": Slice((whole.channels,), (last,), (C,)),
        }


@final
class LocalConvPart(GatedConvPart):
    """Depthwise convolution over the token sequence between two pointwise layers."""

    kind: ClassVar[str] = "local_conv"
    slot: ClassVar[str] = "conv"
    color: ClassVar[str] = "#e8833a"

    @property
    def kernel(self) -> tuple[int, int]:
        """One row of `kernel_size` taps, along the sequence."""
        return 1, self.kernel_size

    def num_macs(self, tokens: TokenGrid) -> int:
        """Multiply-adds of the pointwise layers (the first one is twice as wide, for the gate) and the convolution."""
        return tokens.num_tokens * ((2 + 1) * self.channels * self.hidden + self.hidden * self.kernel_size)

    def build(self, options: BuildOptions) -> nn.Module:
        """Build a `LocalConv`."""
        return LocalConv(self, options)

    @property
    def label(self) -> str:
        """Heads, kernel size, and ratio of hidden width to channels."""
        return f"{show_heads(self.num_heads)}\nconv {self.kernel_size}, x{self.hidden / self.channels:g}"

    def flatten(self, module: nn.Module, options: ExportOptions) -> nn.Module:
        """The flat form, with BatchNorm folded and the two halves of the GLU as separate layers."""
        assert isinstance(module, LocalConv)
        return _FlatLocalConv(module, options.first_token_alone)

    def mixing(self, module: nn.Module, x: Tensor) -> Tensor:
        """See `GatedConv.mixing`; the tokens form one row that starts with the class token."""
        assert isinstance(module, LocalConv)
        return module.mixing(1, x.shape[1])[None, None]


class GatedConv(nn.Module):
    """Two pointwise layers, a depthwise convolution between them, and its BatchNorm. Abstract: has no `forward`."""

    def __init__(self, part: GatedConvPart, options: BuildOptions) -> None:
        super().__init__()
        hidden, kernel, dd = part.hidden, part.kernel, options.factory
        self.expand = nn.Linear(part.channels, 2 * hidden, **dd)
        self.dwconv = self._make_conv(hidden, kernel, **dd)
        self.bn: nn.Module = nn.BatchNorm2d(hidden, **dd)
        self.act = nn.SiLU()
        self.project = nn.Linear(hidden, part.channels, **dd)
        self.proj_drop = nn.Dropout(options.proj_drop)

    def _make_conv(self, channels: int, kernel: tuple[int, int], **factory: Any) -> nn.Conv2d:
        padding = (kernel[0] // 2, kernel[1] // 2)
        return nn.Conv2d(channels, channels, kernel, padding=padding, groups=channels, **factory)

    @torch.jit.ignore
    def fuse(self) -> Self:
        """Fold BatchNorm's running statistics into the depthwise convolution, in place; for inference only."""
        self.dwconv.weight, self.dwconv.bias = self._folded()
        self.bn = nn.Identity()
        return self

    @torch.jit.ignore
    def mixing(self, height: int, width: int) -> Tensor:
        """The convolution over a grid as a banded matrix [height * width, height * width] whose rows sum to 1.

        An entry is the mean over channels of the absolute value of a tap, after folding BatchNorm.
        """
        weight, _ = self._folded()
        taps = weight.detach().abs().mean((0, 1)).clamp(min=1e-12)  # a kernel of zeros gives uniform weights
        place = torch.arange(height * width, device=taps.device)
        indices, inside = [], torch.ones(len(place), len(place), dtype=torch.bool, device=taps.device)
        for coordinate, size in zip((place // width, place % width), taps.shape, strict=True):
            index = coordinate - coordinate[:, None] + size // 2
            inside &= (index >= 0) & (index < size)
            indices.append(index.clamp(0, size - 1))
        matrix = taps[indices[0], indices[1]] * inside
        return matrix / matrix.sum(1, keepdim=True)

    @torch.jit.ignore
    def _folded(self) -> tuple[Any, Any]:
        """Weight and bias of the convolution with BatchNorm folded."""
        bn = self.bn
        if not isinstance(bn, nn.BatchNorm2d):
            return self.dwconv.weight, self.dwconv.bias
        assert bn.running_mean is not None  # None only without track_running_stats
        assert bn.running_var is not None
        return fuse_conv_bn_weights(
            self.dwconv.weight, self.dwconv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
        )


class LocalConv(GatedConv):
    """Pointwise layer, GLU, depthwise convolution over the sequence, BatchNorm, SiLU, pointwise layer.

    The convolution module of Conformer (arXiv 2005.08100, section 2.2) without its LayerNorm. The depthwise
    convolution is a 2-D one of (1, K) over [1, C, B, N], one image whose rows are the sequences: channels-last tokens
    then need no copy, which is many times faster than the 1-D form on a CPU. ([B, C, 1, N] would be as fast, but torch
    chooses the algorithm by B, and `torch.compile` would recompile.)
    """

    def _make_conv(self, channels: int, kernel: tuple[int, int], **factory: Any) -> nn.Conv2d:
        return DepthwiseConv(channels, kernel[1], **factory)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        x = F.glu(self.expand(x), dim=-1)
        x = x.unsqueeze(0).permute(0, 3, 1, 2)  # [1, C, B, N], channels-last in memory
        x = self.act(self.bn(self.dwconv(x)))
        return self.proj_drop(self.project(x.permute(0, 2, 3, 1).squeeze(0)))


class _FlatLocalConv(nn.Module):
    """`LocalConv` with BatchNorm folded, [T, C] -> [T, C], or [B, C] for the first token only."""

    def __init__(self, source: LocalConv, alone: bool) -> None:
        super().__init__()
        self.alone = alone
        self.expand, self.gate = split_linear(source.expand, 2)
        assert isinstance(source.dwconv, DepthwiseConv)
        self.dwconv, self.act, self.project = source.dwconv.plain(), source.act, source.project

    def forward(self, x: Tensor, num_tokens: int) -> Tensor:
        x = self.expand(x) * self.gate(x).sigmoid()
        x = x.unflatten(0, (-1, 1, num_tokens)).permute(0, 3, 1, 2)  # [B, C, 1, N]
        x = self.act(self.dwconv(x)).permute(0, 2, 3, 1).flatten(0, 2)
        return self.project(first_token(x, num_tokens) if self.alone else x)
