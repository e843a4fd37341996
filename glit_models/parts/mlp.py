"""The feed-forward network of a block: timm's `Mlp` with GELU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from timm.layers import Mlp
from torch import Tensor, nn

from .part import BuildOptions, ExportOptions, Part, Slice, TokenGrid, count_linear_params

__all__ = ["MlpPart"]


@final
@dataclass(frozen=True)
class MlpPart(Part):
    """Linear, exact GELU, linear, for each token separately.

    Attributes:
        hidden: channels between the two layers.
    """

    kind: ClassVar[str] = "mlp"
    slot: ClassVar[str] = "mlp"
    color: ClassVar[str] = "#9aa3ad"

    hidden: int

    @property
    def num_params(self) -> int:
        """Parameters of both layers."""
        return count_linear_params(self.channels, self.hidden) + count_linear_params(self.hidden, self.channels)

    def num_macs(self, tokens: TokenGrid) -> int:
        """Multiply-adds of both layers."""
        return tokens.num_tokens * 2 * self.channels * self.hidden

    def build(self, options: BuildOptions) -> nn.Module:
        """Build timm's `Mlp`."""
        return Mlp(self.channels, self.hidden, act_layer=nn.GELU, drop=options.proj_drop, **options.factory)

    @property
    def label(self) -> str:
        """The ratio of hidden width to token width."""
        return f"x {self.hidden / self.channels:g}\nMLP"

    def slices(self, whole: MlpPart) -> dict[str, Slice]:
        """The first channels and the first hidden units (AutoFormer, arXiv 2107.00651, section 3.1)."""
        C, M = self.channels, self.hidden
        return {
            "fc1.weight": Slice.first((M, C), (whole.hidden, whole.channels)),
            "fc1.bias": Slice.first((M,), (whole.hidden,)),
            "fc2.weight": Slice.first((C, M), (whole.channels, whole.hidden)),
            "fc2.bias": Slice.first((C,), (whole.channels,)),
        }

    def flatten(self, module: nn.Module, options: ExportOptions) -> nn.Module:
        """The same layers, which take tokens in any number of axes."""
        assert isinstance(module, Mlp)
        return _FlatMlp(module)


class _FlatMlp(nn.Module):
    def __init__(self, source: Mlp) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = source.fc1, source.act, source.fc2

    def forward(self, x: Tensor, num_tokens: int) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))
