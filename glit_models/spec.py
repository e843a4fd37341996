"""The architecture as data: `BlockSpec` and `GLiTSpec`, immutable, validated, compared by value, JSON.

Standard library only. It knows nothing of tensors, and nothing of the task (image size, classes, drop rates).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import SpecError

__all__ = ["BlockSpec", "GLiTSpec"]


def _check_int(name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise SpecError(f"{name} must be an integer of at least {minimum}, got {value!r}")


def _check_odd(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value % 2 == 0:
        raise SpecError(f"{name} must be odd and positive, got {value!r}")


def _check_ratio(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise SpecError(f"{name} must be a positive finite number, got {value!r}")


def _from_mapping(cls: type, where: str, data: Any) -> dict[str, Any]:
    """Check that `data` is a mapping which names exactly known fields of `cls`, every required one among them."""
    if not isinstance(data, Mapping):
        raise SpecError(f"{where} must be an object of named fields, got {type(data).__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            raise SpecError(f"{where} has an unknown field {key!r}; known: {', '.join(fields)}")
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in data:
            raise SpecError(f"{where} lacks the field {name!r}")
    return dict(data)


@dataclass(frozen=True)
class BlockSpec:
    """One block: how its heads divide into global and local ones, and the widths of its parts.

    Fields that do not matter are set to None (`qkv_ratio` without global heads; `kernel_size` and `expand_ratio`
    without local ones), so that blocks which compute the same function are equal.

    Attributes:
        num_global_heads: G, heads of self-attention.
        num_local_heads: L, heads of the convolution module; G + L is the model's `num_heads`.
        mlp_ratio: d_z, hidden width of the feed-forward network over the embedding width.
        qkv_ratio: r, width of query, key and value over the width of the global channels.
        kernel_size: K, odd taps of the depthwise convolution over the token sequence.
        expand_ratio: E, hidden width of the convolution module over the width of the local channels.

    Raises:
        SpecError: names the field, the value and the bound.

    Source: GLiT (arXiv 2107.02960), section 3.
    """

    num_global_heads: int
    num_local_heads: int
    mlp_ratio: float
    qkv_ratio: float | None = None
    kernel_size: int | None = None
    expand_ratio: int | None = None

    def __post_init__(self) -> None:
        _check_int("num_global_heads", self.num_global_heads, 0)
        _check_int("num_local_heads", self.num_local_heads, 0)
        if self.num_global_heads + self.num_local_heads == 0:
            raise SpecError("num_global_heads + num_local_heads must be at least 1, got 0")
        _check_ratio("mlp_ratio", self.mlp_ratio)
        if self.num_global_heads:
            _check_ratio("qkv_ratio", self.qkv_ratio)
        else:
            object.__setattr__(self, "qkv_ratio", None)
        if self.num_local_heads:
            _check_odd("kernel_size", self.kernel_size)
            _check_int("expand_ratio", self.expand_ratio, 1)
        else:
            object.__setattr__(self, "kernel_size", None)
            object.__setattr__(self, "expand_ratio", None)

    def to_dict(self) -> dict[str, Any]:
        """The fields that matter, as plain values."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BlockSpec:
        """The inverse of `to_dict`. Raises SpecError on an unknown, missing or impossible field."""
        return cls(**_from_mapping(cls, "block", data))


@dataclass(frozen=True)
class GLiTSpec:
    """A whole network: its blocks, embedding width, number of heads and patch size.

    Attributes:
        blocks: one `BlockSpec` a block, first to last.
        embed_dim: C, channels of a token.
        num_heads: N, heads of every block; C / N is the head width.
        patch_size: side of a square patch, in pixels.

    Raises:
        SpecError: names the block, the field, the value and the bound.
    """

    blocks: tuple[BlockSpec, ...]
    embed_dim: int
    num_heads: int
    patch_size: int = 16

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if not self.blocks:
            raise SpecError("blocks must hold at least one block, got none")
        _check_int("embed_dim", self.embed_dim, 1)
        _check_int("num_heads", self.num_heads, 1)
        _check_int("patch_size", self.patch_size, 1)
        if self.embed_dim % self.num_heads:
            raise SpecError(f"embed_dim must be a multiple of num_heads={self.num_heads}, got {self.embed_dim}")
        for index, block in enumerate(self.blocks):
            self._check_block(f"blocks[{index}]", block)

    def _check_block(self, where: str, block: BlockSpec) -> None:
        if not isinstance(block, BlockSpec):
            raise SpecError(f"{where} must be a BlockSpec, got {type(block).__name__}")
        heads = block.num_global_heads + block.num_local_heads
        if heads != self.num_heads:
            raise SpecError(
                f"{where}.num_global_heads + num_local_heads must be num_heads={self.num_heads}, got {heads}"
            )
        for name, ratio, width in (
            ("mlp_ratio", block.mlp_ratio, self.embed_dim),
            ("qkv_ratio", block.qkv_ratio, self.head_width),
        ):
            if ratio is not None and (ratio * width < 1 or ratio * width % 1):
                raise SpecError(
                    f"{where}.{name} must give a whole number of channels: {ratio} * {width} is {ratio * width:g}"
                )

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def head_width(self) -> int:
        """C / N, channels of one head."""
        return self.embed_dim // self.num_heads

    def scaled(self, embed_dim: int, num_heads: int) -> GLiTSpec:
        """The same table in proportions at another width: G/N and L/N are kept, the ratios and kernels too.

        Raises:
            SpecError: if a block's heads do not divide in the same proportion at `num_heads`.
        """
        _check_int("num_heads", num_heads, 1)
        blocks = []
        for index, block in enumerate(self.blocks):
            if block.num_global_heads * num_heads % self.num_heads:
                raise SpecError(
                    f"num_heads={num_heads} cannot keep blocks[{index}]'s proportion of "
                    f"{block.num_global_heads} global heads of {self.num_heads}"
                )
            num_global = block.num_global_heads * num_heads // self.num_heads
            blocks.append(
                dataclasses.replace(block, num_global_heads=num_global, num_local_heads=num_heads - num_global)
            )
        return dataclasses.replace(self, blocks=tuple(blocks), embed_dim=embed_dim, num_heads=num_heads)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in JSON and in a Hub `config.json`."""
        return {
            "embed_dim": self.embed_dim,
            "num_heads": self.num_heads,
            "patch_size": self.patch_size,
            "blocks": [block.to_dict() for block in self.blocks],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GLiTSpec:
        """The inverse of `to_dict`. Raises SpecError on an unknown, missing or impossible field."""
        fields = _from_mapping(cls, "spec", data)
        if not isinstance(fields["blocks"], (list, tuple)):
            raise SpecError(f"blocks must be a list, got {type(fields['blocks']).__name__}")
        blocks = []
        for index, block in enumerate(fields["blocks"]):
            try:
                blocks.append(BlockSpec.from_dict(block))
            except SpecError as error:
                separator = " " if str(error).startswith("block ") else "."
                raise SpecError(f"blocks[{index}]{separator}{str(error).removeprefix('block ')}") from None
        fields["blocks"] = tuple(blocks)
        return cls(**fields)

    def to_json(self, indent: int | None = 2) -> str:
        """The spec as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_json(cls, text: str) -> GLiTSpec:
        """The inverse of `to_json`. Raises SpecError on text that is no JSON or no spec."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise SpecError(f"spec is not valid JSON: {error}") from None
        return cls.from_dict(data)

    @classmethod
    def parse(cls, value: GLiTSpec | Mapping[str, Any] | str | os.PathLike[str]) -> GLiTSpec:
        """A spec from whatever names one: a spec, a dict of its fields, or the path of a JSON file.

        Raises:
            SpecError: if the file cannot be read or does not hold a valid spec; names the path.
        """
        if isinstance(value, GLiTSpec):
            return value
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        if not isinstance(value, (str, os.PathLike)):
            raise SpecError(f"spec must be a GLiTSpec, a dict or the path of a JSON file, got {type(value).__name__}")
        try:
            return cls.from_json(Path(value).read_text(encoding="utf-8"))
        except OSError as error:
            raise SpecError(f"spec file {os.fspath(value)} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise SpecError(f"spec file {os.fspath(value)} is not text") from None
        except SpecError as error:
            raise SpecError(f"spec file {os.fspath(value)}: {error}") from None
