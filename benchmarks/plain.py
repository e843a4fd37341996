"""GLiT as the authors' code computes it: Conv1d over [B, C, N], unfused attention, separate BatchNorm.

The baseline of `benchmarks.export`, written from the paper and the layout of the released checkpoint, whose names the
modules have: `to_official` of a model's state dict loads into it. For inference only.

Axes: B batch, N tokens, C channels, H heads, D head width.
"""

import torch
from torch import Tensor, nn

from glit_models import BlockSpec, GLiT
from glit_models.glit.checkpoint import to_official

__all__ = ["PlainGLiT", "plain_glit"]


def plain_glit(model: GLiT) -> "PlainGLiT":
    """The plain form of a model with class-token pooling, with its weights, in evaluation mode."""
    plain = PlainGLiT(model)
    plain.load_state_dict(to_official(model.state_dict()))
    return plain.eval()


class PlainGLiT(nn.Module):
    """[B, C, H, W] -> logits; with the sizes of `model`, and separate weights."""

    def __init__(self, model: GLiT) -> None:
        super().__init__()
        spec, dim = model.spec, model.spec.embed_dim
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(model.in_chans, dim, spec.patch_size, spec.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros_like(model.pos_embed))
        self.blocks = nn.Sequential(
            *(nn.Sequential(_Block(dim, spec.num_heads, block)) for block in spec.blocks)  # the `.0.` of their names
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, model.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class _Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, block: BlockSpec) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = _Mixer(dim, num_heads, block)
        self.mlp = nn.Module()
        hidden = int(dim * block.mlp_ratio)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp.fc2(nn.functional.gelu(self.mlp.fc1(self.norm2(x))))


class _Mixer(nn.Module):
    def __init__(self, dim: int, num_heads: int, block: BlockSpec) -> None:
        super().__init__()
        width = dim // num_heads
        self.num_heads, self.global_dim = block.num_global_heads, block.num_global_heads * width
        if block.qkv_ratio is not None:
            self.head_width = int(block.qkv_ratio * width)
            inner = self.num_heads * self.head_width
            self.qkv, self.proj = nn.Linear(self.global_dim, 3 * inner), nn.Linear(inner, self.global_dim)
        if block.kernel_size is not None and block.expand_ratio is not None:
            local = block.num_local_heads * width
            hidden = local * block.expand_ratio
            depthwise = nn.Module()
            depthwise.conv = nn.Conv1d(hidden, hidden, block.kernel_size, padding=block.kernel_size // 2, groups=hidden)
            self.net = nn.ModuleDict(
                {
                    "1": nn.Conv1d(local, 2 * hidden, 1),
                    "3": depthwise,
                    "4": nn.BatchNorm1d(hidden),
                    "6": nn.Conv1d(hidden, local, 1),
                }
            )

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        if self.global_dim:
            parts.append(self._attend(x[..., : self.global_dim]))
        if self.global_dim < x.shape[-1]:
            parts.append(self._convolve(x[..., self.global_dim :]))
        return torch.cat(parts, dim=-1)

    def _attend(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_width).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * self.head_width**-0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(B, N, -1))

    def _convolve(self, x: Tensor) -> Tensor:
        net = self.net
        x = nn.functional.glu(net["1"](x.transpose(1, 2)), dim=1)  # [B, C, N]
        x = net["4"](net["3"].conv(x))
        return net["6"](x * x.sigmoid()).transpose(1, 2)
