"""The built-in search spaces by name, at any width and depth, and reading custom ones from YAML.

They are ordinary `SearchSpace`s; nothing else in the search refers to their names.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from glit_models.errors import SearchError
from glit_models.reading import is_file, parse_yaml, read_text
from glit_models.spec import MAX_BLOCKS, MAX_SIZE

from .choices import BlockChoices, check_keys
from .space import SearchSpace

__all__ = [
    "NAMED_SPACES",
    "autoformer",
    "autoformer_base",
    "autoformer_small",
    "autoformer_tiny",
    "glit",
    "glit_conv2d",
    "glit_released",
    "glit_window",
    "global_only",
    "load_space",
    "vitas",
]

_KERNEL_SIZES = (17, 31, 45)
_EXPAND_RATIOS = (1, 2, 4)
_QKV_RATIOS = (0.5, 1, 2)
_MLP_RATIOS = (2, 4, 6)
_VITAS_WIDTHS = (38, 77, 115, 154, 192, 230, 269, 307, 346, 384)  # tenths of 384, rounded as in the authors' code
_VITAS_HIDDENS = (144, 288, 432, 576, 720, 864, 1008, 1152, 1296, 1440)


def glit(
    embed_dim: int = 192,
    num_heads: int = 3,
    depth: int = 12,
    patch_size: int = 16,
    kernel_sizes: Sequence[int] = _KERNEL_SIZES,
    expand_ratios: Sequence[int] = _EXPAND_RATIOS,
    qkv_ratios: Sequence[float] = _QKV_RATIOS,
    mlp_ratios: Sequence[float] = _MLP_RATIOS,
    local_parts: Sequence[str] = (),
    window_sizes: Sequence[int] = (),
) -> SearchSpace:
    """The paper's space: in each block every distribution of the heads, with every value (GLiT, section 3.3).

    324 combinations per block at 3 heads, 198 of them distinct. `local_parts` names the kinds of local parts; by
    default only the paper's convolution. Raises SearchError on an invalid value.
    """
    choices = BlockChoices(
        num_global_heads=range(num_heads + 1),
        mlp_ratios=mlp_ratios,
        qkv_ratios=qkv_ratios,
        kernel_sizes=kernel_sizes,
        expand_ratios=expand_ratios,
        **({"local_parts": local_parts} if local_parts else {}),
        **({"window_sizes": window_sizes} if window_sizes else {}),
    )
    return SearchSpace([(choices,)] * depth, embed_dim, num_heads=num_heads, patch_size=patch_size)


def glit_conv2d(
    embed_dim: int = 192,
    num_heads: int = 3,
    depth: int = 12,
    patch_size: int = 16,
    kernel_sizes: Sequence[int] = (3, 5, 7),
    expand_ratios: Sequence[int] = _EXPAND_RATIOS,
    qkv_ratios: Sequence[float] = _QKV_RATIOS,
    mlp_ratios: Sequence[float] = _MLP_RATIOS,
) -> SearchSpace:
    """`glit` with 2-D convolutions as local parts: the paper's ablation "Conv2d". The kernel sizes are ours."""
    return glit(
        embed_dim, num_heads, depth, patch_size, kernel_sizes, expand_ratios, qkv_ratios, mlp_ratios,
        local_parts=("local_conv2d",),
    )  # fmt: skip


def glit_window(
    embed_dim: int = 192,
    num_heads: int = 3,
    depth: int = 12,
    patch_size: int = 16,
    window_sizes: Sequence[int] = (3, 5, 7),
    qkv_ratios: Sequence[float] = _QKV_RATIOS,
    mlp_ratios: Sequence[float] = _MLP_RATIOS,
) -> SearchSpace:
    """`glit` with attention in windows as local parts: the paper's ablation "local attention". The sizes are ours."""
    return glit(
        embed_dim, num_heads, depth, patch_size, (), (), qkv_ratios, mlp_ratios,
        local_parts=("window_attention",), window_sizes=window_sizes,
    )  # fmt: skip


def glit_released(
    embed_dim: int = 192,
    num_heads: int = 3,
    depth: int = 12,
    patch_size: int = 16,
    kernel_sizes: Sequence[int] = _KERNEL_SIZES,
    expand_ratios: Sequence[int] = _EXPAND_RATIOS,
    qkv_ratios: Sequence[float] = _QKV_RATIOS,
    mlp_ratios: Sequence[float] = _MLP_RATIOS,
    mixed_kernel_size: int = 31,
) -> SearchSpace:
    """The reduced space of the authors' released model: nine options for each distribution of a block's heads.

    Local blocks choose K and E, with d_z = 4; global ones r and d_z; mixed ones E and d_z, with K = 31 and r = 1.
    `GLIT_TINY` is a member of the default. Raises SearchError on an invalid value.
    """
    local = BlockChoices(
        num_global_heads=(0,), mlp_ratios=(4,), kernel_sizes=kernel_sizes, expand_ratios=expand_ratios
    )  # fmt: skip
    mixed = BlockChoices(
        num_global_heads=range(1, num_heads), mlp_ratios=mlp_ratios, qkv_ratios=(1,),
        kernel_sizes=(mixed_kernel_size,), expand_ratios=expand_ratios,
    )  # fmt: skip
    pure_global = BlockChoices(num_global_heads=(num_heads,), mlp_ratios=mlp_ratios, qkv_ratios=qkv_ratios)
    choices = (local, mixed, pure_global) if num_heads > 1 else (local, pure_global)
    return SearchSpace([choices] * depth, embed_dim, num_heads=num_heads, patch_size=patch_size)


def global_only(
    embed_dim: int = 192,
    num_heads: int = 3,
    depth: int = 12,
    patch_size: int = 16,
    qkv_ratios: Sequence[float] = _QKV_RATIOS,
    mlp_ratios: Sequence[float] = _MLP_RATIOS,
) -> SearchSpace:
    """No locality, only r and d_z: the paper's ablation "NLP-NAS". Raises SearchError on an invalid value."""
    choices = BlockChoices(num_global_heads=(num_heads,), mlp_ratios=mlp_ratios, qkv_ratios=qkv_ratios)
    return SearchSpace([(choices,)] * depth, embed_dim, num_heads=num_heads, patch_size=patch_size)


def autoformer(
    embed_dim: Sequence[int],
    depth: Sequence[int],
    num_heads: Sequence[int],
    mlp_ratios: Sequence[float] = (3.0, 3.5, 4.0),
    patch_size: int = 16,
    head_dim: int = 64,
    max_relative_position: int = 14,
) -> SearchSpace:
    """A space like AutoFormer's: one width and depth per network, heads and MLP ratio per block.

    Raises SearchError on an invalid value.
    """
    choices = BlockChoices(num_heads=num_heads, mlp_ratios=mlp_ratios)
    deepest = min(max((number for number in depth if isinstance(number, int)), default=0), MAX_BLOCKS)
    return SearchSpace(
        [(choices,)] * deepest, embed_dim, family="autoformer", depth=depth, patch_size=patch_size, head_dim=head_dim,
        max_relative_position=max_relative_position,
    )  # fmt: skip


def autoformer_tiny(
    embed_dim: Sequence[int] = (192, 216, 240),
    depth: Sequence[int] = (12, 13, 14),
    num_heads: Sequence[int] = (3, 4),
    mlp_ratios: Sequence[float] = (3.0, 3.5, 4.0),
    patch_size: int = 16,
) -> SearchSpace:
    """AutoFormer-T's space (arXiv 2107.00651, table 1). The authors' file lists only the ratios 3.5 and 4, but the
    network that they released has 3 in three blocks.
    """
    return autoformer(embed_dim, depth, num_heads, mlp_ratios, patch_size)


def autoformer_small(
    embed_dim: Sequence[int] = (320, 384, 448),
    depth: Sequence[int] = (12, 13, 14),
    num_heads: Sequence[int] = (5, 6, 7),
    mlp_ratios: Sequence[float] = (3.0, 3.5, 4.0),
    patch_size: int = 16,
) -> SearchSpace:
    """AutoFormer-S's space (arXiv 2107.00651, table 1)."""
    return autoformer(embed_dim, depth, num_heads, mlp_ratios, patch_size)


def autoformer_base(
    embed_dim: Sequence[int] = (528, 576, 624),
    depth: Sequence[int] = (14, 15, 16),
    num_heads: Sequence[int] = (8, 9, 10),
    mlp_ratios: Sequence[float] = (3.0, 3.5, 4.0),
    patch_size: int = 16,
) -> SearchSpace:
    """AutoFormer-B's space (arXiv 2107.00651, table 1), with the heads of the authors' file for evaluation; their file
    for the supernet lists only 9 and 10.
    """
    return autoformer(embed_dim, depth, num_heads, mlp_ratios, patch_size)


def vitas(
    embed_dim: Sequence[int] = _VITAS_WIDTHS,
    depth: int = 16,
    num_heads: Sequence[int] = (0, 3, 6, 12, 16),
    qkv_widths: Sequence[int] = _VITAS_HIDDENS,
    mlp_hiddens: Sequence[int] = _VITAS_HIDDENS,
    patch_size: int = 16,
) -> SearchSpace:
    """ViTAS's space (arXiv 2106.13700) at one patch size: widths in tenths of the largest, and identity blocks.

    Args:
        embed_dim: widths of the network.
        depth: number of blocks, including identity blocks.
        num_heads: numbers of heads; 0 for an identity block.
        qkv_widths: widths of queries, keys and values together.
        mlp_hiddens: hidden widths of the MLP.
        patch_size: side of a square patch, in pixels.

    Raises:
        SearchError: on an invalid value.
    """
    for name, values, bound in (("num_heads", num_heads, 0), ("qkv_widths", qkv_widths, 1)):
        if not values or not all(type(value) is int and value >= bound for value in values):
            raise SearchError(f"{name} must be integers of at least {bound}, got {list(values)}")
    choices = []
    for heads in num_heads:
        if heads == 0:
            choices.append(BlockChoices(num_heads=(0,)))
            continue
        if wrong := [width for width in qkv_widths if width % (3 * heads)]:
            raise SearchError(f"qkv_widths must be multiples of 3 * num_heads={3 * heads}, got {wrong[0]}")
        head_dims = [width // (3 * heads) for width in qkv_widths]
        choices.append(BlockChoices(num_heads=(heads,), head_dims=head_dims, mlp_hiddens=mlp_hiddens))
    return SearchSpace(
        [tuple(choices)] * depth, embed_dim, family="autoformer", patch_size=patch_size, max_relative_position=None,
        scale_by_embed_dim=True, block_norm_eps=1e-6,
    )  # fmt: skip


NAMED_SPACES: dict[str, Callable[..., SearchSpace]] = {
    "glit": glit,
    "glit_released": glit_released,
    "global_only": global_only,
    "glit_conv2d": glit_conv2d,
    "glit_window": glit_window,
    "autoformer": autoformer,
    "autoformer_tiny": autoformer_tiny,
    "autoformer_small": autoformer_small,
    "autoformer_base": autoformer_base,
    "vitas": vitas,
}
"""The functions that make the shipped search spaces, by name."""


def load_space(value: str | os.PathLike[str] | Mapping[str, Any]) -> SearchSpace:
    """Load a space: by the name of a built-in one, the path of a YAML file, or the content of such a file.

    The content is either what `SearchSpace.to_yaml` writes, or a built-in space's name under `space` with keywords of
    its function: `{space: glit, embed_dim: 96, depth: 6, kernel_sizes: [3, 5, 7]}`.

    Raises:
        SearchError: if it is missing, is not YAML, or has an unknown key (names the nearest valid) or a wrong value.
    """
    if isinstance(value, Mapping):
        return _from_mapping(value)
    path = Path(value)
    if not is_file(path):
        return _from_mapping({"space": os.fspath(value)})
    try:
        data = parse_yaml(read_text(path))
    except OSError as error:
        raise SearchError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise SearchError(f"{path}: {error}") from None
    if not isinstance(data, Mapping):
        raise SearchError(f"{path}: a search space is a mapping of keys, not {type(data).__name__}")
    try:
        return _from_mapping(data)
    except SearchError as error:
        raise SearchError(f"{path}: {error}") from None


def _from_mapping(data: Mapping[str, Any]) -> SearchSpace:
    if "space" not in data:
        return SearchSpace.from_dict(data)
    name = data["space"]
    if not isinstance(name, str) or name not in NAMED_SPACES:
        raise SearchError(f"no search space {name!r}: not a file, and the shipped ones are {', '.join(NAMED_SPACES)}")
    parameters = inspect.signature(NAMED_SPACES[name]).parameters
    check_keys("", data, ["space", *parameters])
    keywords = {key: value for key, value in data.items() if key != "space"}
    for key, parameter in parameters.items():
        if key not in keywords and parameter.default is parameter.empty:
            raise SearchError(f"{key} is missing")
    for key, value in keywords.items():
        whole = isinstance(parameters[key].default, int)
        if whole and (type(value) is not int or value < 1):
            raise SearchError(f"{key} must be an integer of at least 1, got {value!r}")
        most = MAX_BLOCKS if key == "depth" else MAX_SIZE
        if whole and value > most:
            raise SearchError(f"{key} must be at most {most}, got {value}")
        if not whole and not isinstance(value, (list, tuple)):
            raise SearchError(f"{key} must be a list, got {value!r}")
    return NAMED_SPACES[name](**keywords)
