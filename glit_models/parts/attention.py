"""Multi-head self-attention: the base class of its kinds, and attention over all tokens as timm's `Attention`.

Axes: N tokens, C channels, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

from timm.layers import Attention
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import SpecError
from ..spec import check_ratio
from .flat import FlatAttention
from .part import BuildOptions, ExportOptions, Part, Slice, TokenGrid, count_linear_params, show_heads

__all__ = ["AttentionPart", "MultiHeadPart"]


@dataclass(frozen=True)
class MultiHeadPart(Part):
    """Base class of multi-head self-attention, with projections to query, key and value, and an output projection.

    Attributes:
        num_heads: H.
        head_dim: D, width of a head's query, key and value; H * D may differ from C.
    """

    num_heads: int
    head_dim: int

    @property
    def num_params(self) -> int:
        """Parameters of qkv and output projection."""
        inner = self.num_heads * self.head_dim
        return count_linear_params(self.channels, 3 * inner) + count_linear_params(inner, self.channels)

    def num_macs(self, tokens: TokenGrid) -> int:
        """Multiply-adds of qkv, query @ key and weights @ value over all tokens, and output projection."""
        inner, N = self.num_heads * self.head_dim, tokens.num_tokens
        return N * ((3 + 1) * self.channels * inner + 2 * N * inner)

    @property
    def label(self) -> str:
        """The number of heads and their width."""
        return f"{show_heads(self.num_heads)}\nwidth {self.head_dim}"

    @classmethod
    def covering_private_qk(cls, parts: Sequence[Self]) -> Self:
        """Only `relative_attention` has such a store."""
        raise NotImplementedError(f"{cls.kind} has no private queries and keys; relative_attention has")

    def slices_from(self, channel: int, whole: MultiHeadPart) -> dict[str, Slice]:
        """Slices of the channels from `start` on, the first heads, and the first part of each head's width."""
        C, H, D = self.channels, self.num_heads, self.head_dim
        three, heads, width, channels = (0, 3), (0, H), (0, D), (channel, channel + C)
        inner = (whole.num_heads, whole.head_dim)
        return {
            "qkv.weight": Slice((3, *inner, whole.channels), (three, heads, width, channels), (3 * H * D, C)),
            "qkv.bias": Slice((3, *inner), (three, heads, width), (3 * H * D,)),
            "proj.weight": Slice((whole.channels, *inner), (channels, heads, width), (C, H * D)),
            "proj.bias": Slice((whole.channels,), (channels,), (C,)),
        }

    def mixing(self, module: Any, x: Tensor) -> Tensor:
        """The attention weights of each head; `module.visible`, if present, masks the tokens that a token sees."""
        q, k, _ = module.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * module.scale) @ k.transpose(-2, -1)
        visible = getattr(module, "visible", None)
        return (scores if visible is None else scores.masked_fill(~visible, float("-inf"))).softmax(dim=-1)


@final
class AttentionPart(MultiHeadPart):
    """Self-attention on C channels."""

    kind: ClassVar[str] = "attention"
    slot: ClassVar[str] = "attn"
    genes: ClassVar[tuple[str, ...]] = ("qkv_ratio",)
    color: ClassVar[str] = "#2f6db5"

    @classmethod
    def from_genes(cls, num_heads: int, head_width: int, genes: Mapping[str, Any]) -> AttentionPart:
        """Attention whose heads are `qkv_ratio` times as wide as their channels."""
        ratio = genes["qkv_ratio"]
        check_ratio("qkv_ratio", ratio)
        if ratio * head_width < 1 or ratio * head_width % 1:
            raise SpecError(
                f"qkv_ratio must give a whole number of channels: {ratio} * {head_width} is {ratio * head_width:g}"
            )
        return cls(num_heads * head_width, num_heads, int(ratio * head_width))

    def build(self, options: BuildOptions) -> nn.Module:
        """Build timm's `Attention`."""
        attention = Attention(
            self.channels, num_heads=self.num_heads, attn_head_dim=self.head_dim, qkv_bias=True,
            attn_drop=options.attn_drop, proj_drop=options.proj_drop, **options.factory,
        )  # fmt: skip
        attention.attn_drop = _WeightsDropout(attention)
        return attention

    def slices(self, whole: AttentionPart) -> dict[str, Slice]:
        """The first channels (GLiT's layout)."""
        return self.slices_from(0, whole)

    def flatten(self, module: nn.Module, options: ExportOptions) -> nn.Module:
        """See `FlatAttention`."""
        assert isinstance(module, Attention)
        return FlatAttention(module, options)


@final
class _WeightsDropout(nn.Dropout):
    """Dropout of the attention weights. A hook on it disables the fused operator, which does not compute them.

    `timm.utils.AttentionExtract` uses such hooks. The operator stays disabled after a hook is removed.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__(attention.attn_drop.p)
        self.owner = (attention,)  # in a tuple, because it is not a submodule

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """See `torch.nn.Module`."""
        self.owner[0].fused_attn = False
        return super().register_forward_hook(*args, **kwargs)

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """See `torch.nn.Module`."""
        self.owner[0].fused_attn = False
        return super().register_forward_pre_hook(*args, **kwargs)
