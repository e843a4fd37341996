"""A custom part: average pooling over the patches around each patch, as a local part of GLiT blocks."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glit_models import SpecError
from glit_models.parts import BuildOptions, Part, Slice, TokenGrid, count_linear_params, register_part


@register_part
@dataclass(frozen=True)
class PoolingPart(Part):
    """The mean of `pool_size` x `pool_size` patches, then a linear layer."""

    kind: ClassVar[str] = "pooling"
    slot: ClassVar[str] = "pool"
    genes: ClassVar[tuple[str, ...]] = ("pool_size",)
    color: ClassVar[str] = "#8e5aa8"

    num_heads: int
    pool_size: int

    @classmethod
    def from_genes(cls, num_heads: int, head_width: int, genes: dict[str, int]) -> "PoolingPart":
        if genes["pool_size"] < 1 or genes["pool_size"] % 2 == 0:
            raise SpecError(f"pool_size must be odd and positive, got {genes['pool_size']}")
        return cls(num_heads * head_width, num_heads, genes["pool_size"])

    @property
    def num_params(self) -> int:
        return count_linear_params(self.channels, self.channels)

    def num_macs(self, tokens: TokenGrid) -> int:
        return tokens.num_tokens * self.channels**2

    def build(self, options: BuildOptions) -> nn.Module:
        return Pooling(self, options)

    @property
    def label(self) -> str:
        return f"{self.num_heads} heads\npool {self.pool_size}"

    def slices(self, whole: "PoolingPart") -> dict[str, Slice]:
        last, C = (whole.channels - self.channels, whole.channels), self.channels
        return {
            "linear.weight": Slice((whole.channels, whole.channels), (last, last), (C, C)),
            "linear.bias": Slice((whole.channels,), (last,), (C,)),
        }


class Pooling(nn.Module):
    """[B, N, C] -> [B, N, C]; prefix tokens are not pooled."""

    def __init__(self, part: PoolingPart, options: BuildOptions) -> None:
        super().__init__()
        self.pool_size = part.pool_size
        self.linear = nn.Linear(part.channels, part.channels, **options.factory)
        self.set_tokens(options.tokens)

    def set_tokens(self, tokens: TokenGrid) -> None:
        self.tokens = tokens

    def forward(self, x: Tensor) -> Tensor:
        prefix, patches = x.tensor_split([self.tokens.num_prefix], dim=1)
        grid = patches.transpose(1, 2).unflatten(2, (self.tokens.height, self.tokens.width))
        pooled = F.avg_pool2d(grid, self.pool_size, 1, self.pool_size // 2, count_include_pad=False)
        return self.linear(torch.cat([prefix, pooled.flatten(2).transpose(1, 2)], dim=1))
