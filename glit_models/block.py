"""Build blocks from parts: pre-norm and residual; each part processes separate channels.

Axes: B batch, N tokens, C channels. Tokens stay channels-last [B, N, C] throughout.
"""

from __future__ import annotations

from typing import final

import torch
from timm.layers import DropPath, LayerNorm
from torch import Tensor, nn

from .parts import BlockParts, BuildOptions, Part, TokenGrid, build_part

__all__ = ["Block", "Mixer", "build_block"]


@final
class Mixer(nn.ModuleDict):
    """Parts that mix tokens, each on separate channels, with concatenated results; one module per part, named by slot.

    In GLiT, attention takes the first channels and the local part the last ones; nothing mixes the two groups here
    (GLiT, arXiv 2107.02960, section 3.1).
    """

    def __init__(self, parts: tuple[Part, ...], options: BuildOptions) -> None:
        super().__init__({part.slot: build_part(part, options) for part in parts})
        self.widths = [part.channels for part in parts]

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        pieces = x.split(self.widths, dim=-1)
        outputs: list[Tensor] = []
        for index, module in enumerate(self.values()):
            # A linear layer adds its bias in a separate pass unless its input is contiguous.
            outputs.append(module(pieces[index].contiguous()))
        return torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]


@final
class Block(nn.Module):
    """x + mixer(norm1(x)), then x + mlp(norm2(x)), each under stochastic depth.

    Args:
        parts: the parts of the block, with their sizes.
        options: other options of the parts' modules.
        drop_path: stochastic-depth probability.
    """

    def __init__(self, parts: BlockParts, options: BuildOptions, drop_path: float = 0.0) -> None:
        super().__init__()
        assert parts.mlp is not None  # `build_block` makes identity blocks
        dd = options.factory
        self.parts = parts
        self.norm1 = LayerNorm(parts.dim, eps=parts.norm_eps, **dd)
        self.mixer = Mixer(parts.mixers, options)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = LayerNorm(parts.dim, eps=parts.norm_eps, **dd)
        self.mlp = build_part(parts.mlp, options)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        x = x + self.drop_path1(self.mixer(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))

    @torch.jit.ignore
    def part_modules(self) -> list[tuple[Part, nn.Module]]:
        """Each part with its module."""
        assert self.parts.mlp is not None
        return [*zip(self.parts.mixers, self.mixer.values(), strict=True), (self.parts.mlp, self.mlp)]

    @torch.jit.ignore
    def set_tokens(self, tokens: TokenGrid) -> None:
        """Set the grid of tokens of every module that depends on it."""
        for module in self.modules():
            if module is not self and callable(set_tokens := getattr(module, "set_tokens", None)):
                set_tokens(tokens)

    @torch.jit.ignore
    def fuse(self) -> Block:
        """Fold each BatchNorm into its convolution, in place; for inference only."""
        for _, module in self.part_modules():
            if callable(fuse := getattr(module, "fuse", None)):
                fuse()
        return self


def build_block(parts: BlockParts, options: BuildOptions, drop_path: float = 0.0) -> nn.Module:
    """Build a block from its parts; `nn.Identity` for an identity block."""
    return nn.Identity() if parts.is_identity else Block(parts, options, drop_path)
