"""Parameters and multiply-adds of a spec in closed form. Standard library only.

Letters: C embedding width, N tokens, H heads, D head width, G/L global/local heads, K kernel, E expansion.
"""

from __future__ import annotations

from .spec import BlockSpec, GLiTSpec

__all__ = ["count_block_macs", "count_block_params", "count_macs", "count_params"]


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _num_tokens(spec: GLiTSpec, img_size: int | tuple[int, int], class_token: bool) -> int:
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    return (height // spec.patch_size) * (width // spec.patch_size) + int(class_token)


def _block_widths(spec: GLiTSpec, block: BlockSpec) -> tuple[int, int, int, int, int]:
    """Channels: global, attention (r * global), local, convolution (E * local), feed-forward hidden."""
    global_dim = block.num_global_heads * spec.head_width
    local_dim = block.num_local_heads * spec.head_width
    attn_dim = block.num_global_heads * int((block.qkv_ratio or 0) * spec.head_width)
    conv_dim = local_dim * (block.expand_ratio or 0)
    return global_dim, attn_dim, local_dim, conv_dim, int(spec.embed_dim * block.mlp_ratio)


def count_block_params(spec: GLiTSpec, block: BlockSpec) -> int:
    """Trainable parameters of one block at the width of `spec`."""
    dim = spec.embed_dim
    global_dim, attn_dim, local_dim, conv_dim, mlp_dim = _block_widths(spec, block)
    total = 2 * 2 * dim  # two LayerNorms
    total += _linear(dim, mlp_dim) + _linear(mlp_dim, dim)
    if block.num_global_heads:
        total += _linear(global_dim, 3 * attn_dim) + _linear(attn_dim, global_dim)
    if block.kernel_size is not None:
        total += _linear(local_dim, 2 * conv_dim) + _linear(conv_dim, local_dim)
        total += conv_dim * (block.kernel_size + 1) + 2 * conv_dim  # depthwise convolution, BatchNorm
    return total


def count_block_macs(spec: GLiTSpec, block: BlockSpec, num_tokens: int) -> int:
    """Multiply-adds of one block at the width of `spec` for one image of `num_tokens` tokens, class token included."""
    global_dim, attn_dim, local_dim, conv_dim, mlp_dim = _block_widths(spec, block)
    per_token = 2 * spec.embed_dim * mlp_dim
    per_token += (3 + 1) * global_dim * attn_dim  # qkv and output projections
    per_token += 2 * num_tokens * attn_dim  # query @ key, weights @ value
    per_token += (2 + 1) * local_dim * conv_dim  # pointwise in (twice as wide, for the gate) and out
    per_token += conv_dim * (block.kernel_size or 0)
    return num_tokens * per_token


def count_params(
    spec: GLiTSpec,
    num_classes: int = 1000,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    class_token: bool = True,
) -> int:
    """Trainable parameters of the network (BatchNorm's running statistics are not parameters).

    `num_classes=0` counts no head. 7,264,456 for GLIT_TINY with the defaults.
    """
    dim = spec.embed_dim
    total = _linear(in_chans * spec.patch_size**2, dim)  # patch embedding
    total += _num_tokens(spec, img_size, class_token) * dim + int(class_token) * dim  # position embedding, class token
    total += sum(count_block_params(spec, block) for block in spec.blocks)
    total += 2 * dim  # final LayerNorm
    return total + (_linear(dim, num_classes) if num_classes else 0)


def count_macs(
    spec: GLiTSpec,
    img_size: int | tuple[int, int] = 224,
    num_classes: int = 1000,
    in_chans: int = 3,
    class_token: bool = True,
) -> int:
    """Multiply-adds for one image: matrix products and convolutions only, zero padding counted as computed.

    Equals half of what `torch.utils.flop_counter` counts. 1,472,873,280 for GLIT_TINY with the defaults.
    """
    tokens = _num_tokens(spec, img_size, class_token)
    dim = spec.embed_dim
    total = (tokens - int(class_token)) * in_chans * spec.patch_size**2 * dim
    total += sum(count_block_macs(spec, block, tokens) for block in spec.blocks)
    return total + dim * num_classes
