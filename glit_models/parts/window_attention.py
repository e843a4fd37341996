"""The local part of the paper's ablation "local attention": self-attention of each patch within a window around it.

Axes: B batch, N tokens, C channels, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..spec import check_odd
from .attention import MultiHeadPart
from .flat import FlatAttention
from .part import BuildOptions, ExportOptions, Slice, TokenGrid, show_heads

__all__ = ["WindowAttention", "WindowAttentionPart"]


@final
@dataclass(frozen=True)
class WindowAttentionPart(MultiHeadPart):
    """Self-attention of each patch to the patches at most `window_size // 2` rows and columns away.

    It is computed as masked attention over all tokens, so it costs as much as attention over all tokens.

    Attributes:
        window_size: odd side length of the window, in patches.

    Source: GLiT (arXiv 2107.02960), ablation of the locality module.
    """

    kind: ClassVar[str] = "window_attention"
    slot: ClassVar[str] = "window_attn"
    genes: ClassVar[tuple[str, ...]] = ("window_size",)
    color: ClassVar[str] = "#2a9d8f"

    window_size: int

    @classmethod
    def from_genes(cls, num_heads: int, head_width: int, genes: Mapping[str, Any]) -> WindowAttentionPart:
        """The part with heads as wide as their channels, in windows of `window_size` x `window_size` patches."""
        check_odd("window_size", genes["window_size"])
        return cls(num_heads * head_width, num_heads, head_width, genes["window_size"])

    def build(self, options: BuildOptions) -> nn.Module:
        """Build a `WindowAttention`."""
        return WindowAttention(self, options)

    @property
    def label(self) -> str:
        """The number of heads and the window size."""
        return f"{show_heads(self.num_heads)}\nwindow {self.window_size}x{self.window_size}"

    def slices(self, whole: WindowAttentionPart) -> dict[str, Slice]:
        """The last channels (the first ones belong to global attention); the window size must be equal."""
        return self.slices_from(whole.channels - self.channels, whole)

    def flatten(self, module: nn.Module, options: ExportOptions) -> nn.Module:
        """See `FlatAttention`."""
        assert isinstance(module, WindowAttention)
        return FlatAttention(module, options, module.visible)


@final
class WindowAttention(nn.Module):
    """Masked self-attention. Prefix tokens are not in the grid: they and the patches do not see each other."""

    def __init__(self, part: WindowAttentionPart, options: BuildOptions) -> None:
        super().__init__()
        dd, inner = options.factory, part.num_heads * part.head_dim
        self.num_heads, self.head_dim, self.window_size = part.num_heads, part.head_dim, part.window_size
        self.scale = part.head_dim**-0.5
        self.qkv = nn.Linear(part.channels, 3 * inner, **dd)
        self.proj = nn.Linear(inner, part.channels, **dd)
        self.attn_drop = options.attn_drop
        self.proj_drop = nn.Dropout(options.proj_drop)
        self.visible: Tensor
        self.set_tokens(options.tokens)

    @torch.jit.ignore
    def set_tokens(self, tokens: TokenGrid) -> None:
        """Set the grid of the following images."""
        device = self.qkv.weight.device
        rows = torch.arange(tokens.num_patches, device=device) // tokens.width
        columns = torch.arange(tokens.num_patches, device=device) % tokens.width
        far = torch.maximum((rows[:, None] - rows).abs(), (columns[:, None] - columns).abs())
        visible = torch.block_diag(
            torch.eye(tokens.num_prefix, device=device), (far <= self.window_size // 2).float()
        ).bool()
        self.register_buffer("visible", visible, persistent=False)  # [N, N]

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        drop = self.attn_drop if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.visible, dropout_p=drop, scale=self.scale)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))
