"""The shipped search spaces by name, at any width and depth, and the reading of one's own from YAML.

They are `SearchSpace`s like any other; nothing else in the search knows their names.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from glit_models.errors import SearchError

from .choices import BlockChoices, check_keys
from .space import SearchSpace

__all__ = ["NAMED_SPACES", "glit", "glit_released", "global_only", "load_space"]

_KERNEL_SIZES = (17, 31, 45)
_EXPAND_RATIOS = (1, 2, 4)
_QKV_RATIOS = (0.5, 1, 2)
_MLP_RATIOS = (2, 4, 6)


def glit(
    embed_dim: int = 192,
    num_heads: int = 3,
    depth: int = 12,
    patch_size: int = 16,
    kernel_sizes: Sequence[int] = _KERNEL_SIZES,
    expand_ratios: Sequence[int] = _EXPAND_RATIOS,
    qkv_ratios: Sequence[float] = _QKV_RATIOS,
    mlp_ratios: Sequence[float] = _MLP_RATIOS,
) -> SearchSpace:
    """The paper's space: in each block every distribution of the heads, with every value (GLiT, section 3.3).

    324 combinations a block at 3 heads, of which 198 differ. Raises SearchError on a value that cannot be.
    """
    choices = BlockChoices(
        num_global_heads=tuple(range(num_heads + 1)),
        mlp_ratios=tuple(mlp_ratios),
        qkv_ratios=tuple(qkv_ratios),
        kernel_sizes=tuple(kernel_sizes),
        expand_ratios=tuple(expand_ratios),
    )
    return SearchSpace(((choices,),) * depth, embed_dim, num_heads, patch_size)


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
    `GLIT_TINY` is a member of the default. Raises SearchError on a value that cannot be.
    """
    local = BlockChoices((0,), (4,), kernel_sizes=tuple(kernel_sizes), expand_ratios=tuple(expand_ratios))
    mixed = BlockChoices(
        tuple(range(1, num_heads)), tuple(mlp_ratios), (1,), (mixed_kernel_size,), tuple(expand_ratios)
    )
    pure_global = BlockChoices((num_heads,), tuple(mlp_ratios), qkv_ratios=tuple(qkv_ratios))
    choices = (local, mixed, pure_global) if num_heads > 1 else (local, pure_global)
    return SearchSpace((choices,) * depth, embed_dim, num_heads, patch_size)


def global_only(
    embed_dim: int = 192,
    num_heads: int = 3,
    depth: int = 12,
    patch_size: int = 16,
    qkv_ratios: Sequence[float] = _QKV_RATIOS,
    mlp_ratios: Sequence[float] = _MLP_RATIOS,
) -> SearchSpace:
    """No locality, only r and d_z: the paper's ablation "NLP-NAS". Raises SearchError on a value that cannot be."""
    choices = BlockChoices((num_heads,), tuple(mlp_ratios), qkv_ratios=tuple(qkv_ratios))
    return SearchSpace(((choices,),) * depth, embed_dim, num_heads, patch_size)


NAMED_SPACES: dict[str, Callable[..., SearchSpace]] = {
    "glit": glit,
    "glit_released": glit_released,
    "global_only": global_only,
}


def load_space(value: str | os.PathLike[str] | Mapping[str, Any]) -> SearchSpace:
    """A space from whatever names one: a shipped one's name, the path of a YAML file, or what such a file holds.

    That is either what `SearchSpace.to_yaml` writes, or the name of a shipped space under `space` with keywords of its
    function: `{space: glit, embed_dim: 96, depth: 6, kernel_sizes: [3, 5, 7]}`.

    Raises:
        SearchError: if it is missing, no YAML, or has an unknown key (names the nearest valid one) or a wrong value.
    """
    if isinstance(value, Mapping):
        return _from_mapping(value)
    path = Path(value)
    if not path.is_file():
        return _from_mapping({"space": os.fspath(value)})
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SearchError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SearchError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
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
    for key, value in keywords.items():
        whole = isinstance(parameters[key].default, int)
        if whole and (type(value) is not int or value < 1):
            raise SearchError(f"{key} must be an integer of at least 1, got {value!r}")
        if not whole and not isinstance(value, (list, tuple)):
            raise SearchError(f"{key} must be a list, got {value!r}")
    return NAMED_SPACES[name](**keywords)
