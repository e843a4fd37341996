"""Specs of GLiT networks: `BlockSpec` and `GLiTSpec`, immutable and validated, compared by value, stored as JSON.

A spec holds no tensors, and nothing about the task (image size, classes, drop rates).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

from ..errors import SpecError
from ..parts import PARTS, AttentionPart, BlockParts, MlpPart, Part
from ..spec import Spec, check_depth, check_fields, check_int, check_odd, check_ratio, parse_blocks

__all__ = ["BlockSpec", "GLiTSpec"]

_NAMED_SIZES = ("kernel_size", "expand_ratio")  # sizes of local parts that are fields of a BlockSpec
_LOCAL_PART = "local_conv"


@final
@dataclass(frozen=True)
class BlockSpec:
    """One block: how many heads are global and local, and the sizes of its parts.

    Fields that have no effect are set to their defaults (`qkv_ratio` without global heads; `local_part` and its sizes
    without local ones), so that blocks that compute the same function are equal.

    Attributes:
        num_global_heads: G, heads of self-attention.
        num_local_heads: L, heads of the local part; G + L is the model's `num_heads`.
        mlp_ratio: d_z, hidden width of the feed-forward network over the embedding width.
        qkv_ratio: r, width of query, key and value over the width of the global channels.
        kernel_size: K, odd taps of the depthwise convolution.
        expand_ratio: E, hidden width of the convolution module over the width of the local channels.
        local_part: kind of the local part: 'local_conv' (the paper's), 'local_conv2d', 'window_attention', or a custom
            one (see `register_part`).
        local_sizes: sizes of the local part that have no field here, such as `{"window_size": 7}`.

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
    local_part: str = _LOCAL_PART
    local_sizes: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        check_int("num_global_heads", self.num_global_heads, 0)
        check_int("num_local_heads", self.num_local_heads, 0)
        if self.num_global_heads + self.num_local_heads == 0:
            raise SpecError("num_global_heads + num_local_heads must be at least 1, got 0")
        check_ratio("mlp_ratio", self.mlp_ratio)
        if self.num_global_heads:
            check_ratio("qkv_ratio", self.qkv_ratio)
        else:
            object.__setattr__(self, "qkv_ratio", None)
        if self.num_local_heads:
            self._check_local()
        else:
            for name, value in (("kernel_size", None), ("expand_ratio", None), ("local_part", _LOCAL_PART)):
                object.__setattr__(self, name, value)
            object.__setattr__(self, "local_sizes", ())

    def _check_local(self) -> None:
        genes = PARTS[self.local_part].genes
        if not genes:
            raise SpecError(f"local_part must be a part that takes local heads, got {self.local_part!r}")
        given = dict(self.local_sizes)
        for name in given:
            if name not in genes or name in _NAMED_SIZES:
                raise SpecError(f"local_sizes of {self.local_part} must name {', '.join(genes)}, got {name!r}")
        for name in genes:
            if name not in _NAMED_SIZES and name not in given:
                raise SpecError(f"local_sizes of {self.local_part} lacks {name!r}")
        for name, value in given.items():
            if not isinstance(value, Hashable):
                raise SpecError(f"{name} must be a number or a text, got {value!r:.60}")
        for name in _NAMED_SIZES:
            if name not in genes:
                object.__setattr__(self, name, None)
        object.__setattr__(self, "local_sizes", tuple((name, given[name]) for name in genes if name in given))
        if "kernel_size" in genes:
            check_odd("kernel_size", self.kernel_size)
        if "expand_ratio" in genes:
            check_int("expand_ratio", self.expand_ratio, 1)

    def parts(self, embed_dim: int, head_width: int) -> BlockParts:
        """The parts of this block in a network of these widths. Raises SpecError if a width is not an integer."""
        return _parts_of(self, embed_dim, head_width)

    @property
    def local_genes(self) -> dict[str, Any]:
        """The sizes of the local part, by name."""
        return {name: getattr(self, name) for name in _NAMED_SIZES} | dict(self.local_sizes)

    def to_dict(self) -> dict[str, Any]:
        """The fields that have an effect, as plain values."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        sizes = dict(fields.pop("local_sizes"))
        if fields["local_part"] == _LOCAL_PART:
            del fields["local_part"]  # version 0.1 wrote no such field
        return {key: value for key, value in (fields | sizes).items() if value is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BlockSpec:
        """The inverse of `to_dict`. Raises SpecError on an unknown, missing or impossible field."""
        extra: tuple[str, ...] = ()
        if isinstance(data, Mapping) and isinstance(data.get("local_part"), str):
            extra = tuple(name for name in PARTS[data["local_part"]].genes if name not in _NAMED_SIZES)
        if isinstance(data, Mapping) and "local_sizes" in data:
            raise SpecError("block must name the sizes of its local part next to the other fields, not in local_sizes")
        fields = check_fields(cls, "block", data, extra)
        sizes = {name: fields.pop(name) for name in extra if name in fields}
        return cls(**(fields | {"local_sizes": tuple(sizes.items())}))


@functools.lru_cache(maxsize=4096)  # a search asks for the same few blocks again and again
def _parts_of(block: BlockSpec, embed_dim: int, head_width: int) -> BlockParts:
    mixers: list[Part] = []
    if block.num_global_heads:
        mixers.append(AttentionPart.from_genes(block.num_global_heads, head_width, {"qkv_ratio": block.qkv_ratio}))
    if block.num_local_heads:
        local = PARTS[block.local_part]
        mixers.append(local.from_genes(block.num_local_heads, head_width, block.local_genes))
    hidden = block.mlp_ratio * embed_dim
    if hidden < 1 or hidden % 1:
        raise SpecError(
            f"mlp_ratio must give a whole number of channels: {block.mlp_ratio} * {embed_dim} is {hidden:g}"
        )
    return BlockParts(embed_dim, tuple(mixers), MlpPart(embed_dim, int(hidden)))


@final
@dataclass(frozen=True)
class GLiTSpec(Spec):
    """A whole network: its blocks, embedding width, number of heads and patch size.

    Attributes:
        blocks: one `BlockSpec` per block, first to last.
        embed_dim: C, channels of a token.
        num_heads: N, heads of every block; C / N is the head width.
        patch_size: side of a square patch, in pixels.

    Raises:
        SpecError: names the block, the field, the value and the bound.
    """

    family: ClassVar[str] = "glit"
    symbols: ClassVar[Mapping[str, str]] = {
        "num_global_heads": "G",
        "num_local_heads": "L",
        "kernel_size": "K",
        "expand_ratio": "E",
        "qkv_ratio": "r",
        "mlp_ratio": "d_z",
    }
    block_class: ClassVar[type] = BlockSpec
    leading_genes: ClassVar[tuple[str, ...]] = ("num_global_heads", "local_part")
    # The paper does not give its values. The ratios are DeiT's, the kernel size is close to Conformer's (32, arXiv
    # 2005.08100). The expansion is the only one that meets the paper's budget of 1.3 to 1.4 G multiply-adds with these
    # values: with 2, the most expensive network of the first stage has 1.28 G.
    first_stage: ClassVar[Mapping[str, Any]] = {"kernel_size": 31, "expand_ratio": 4, "qkv_ratio": 1, "mlp_ratio": 4}

    blocks: tuple[BlockSpec, ...]
    embed_dim: int
    num_heads: int
    patch_size: int = 16

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        check_depth(self.blocks)
        check_int("embed_dim", self.embed_dim, 1)
        check_int("num_heads", self.num_heads, 1)
        check_int("patch_size", self.patch_size, 1)
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
        try:
            block.parts(self.embed_dim, self.head_width)
        except SpecError as error:
            raise SpecError(f"{where}.{error}") from None

    @property
    def head_width(self) -> int:
        """C / N, channels of one head."""
        return self.embed_dim // self.num_heads

    @property
    def summary(self) -> str:
        """A short description of the sizes that all blocks share."""
        return f"{self.depth} blocks, width {self.embed_dim}, {self.num_heads} heads, patch {self.patch_size}"

    def block_parts(self, index: int) -> BlockParts:
        """The parts of block `index`, with their sizes."""
        return self.blocks[index].parts(self.embed_dim, self.head_width)

    @classmethod
    def known_genes(cls, choices: Mapping[str, Sequence[Any]]) -> tuple[str, ...]:
        """The fields of a block, and the sizes of the local parts in `choices`."""
        names = [name for name in super().known_genes(choices) if name not in ("num_local_heads", "local_sizes")]
        for kind in choices.get("local_part", ()):
            names += [name for name in PARTS[kind].genes if name not in names]
        return tuple(names)

    @classmethod
    def block_from_genes(cls, genes: Mapping[str, Any], network: Mapping[str, Any]) -> BlockSpec:
        """Build a block from its genes; the heads of `num_heads` that are not global are local."""
        genes, num_heads = dict(genes), network["num_heads"]
        num_global = genes.pop("num_global_heads")
        if isinstance(num_global, bool) or not isinstance(num_global, int) or not 0 <= num_global <= num_heads:
            raise SpecError(f"num_global_heads must be an integer from 0 to num_heads={num_heads}, got {num_global!r}")
        own = PARTS[genes.get("local_part", _LOCAL_PART)].genes
        sizes = {name: genes.pop(name) for name in tuple(genes) if name not in cls.known_genes({})}
        local_sizes = tuple((name, value) for name, value in sizes.items() if name in own)
        return BlockSpec(num_global, num_heads - num_global, **genes, local_sizes=local_sizes)

    @classmethod
    def genes_of(cls, block: BlockSpec) -> dict[str, Any]:
        """The genes of a block, starting with its division of heads."""
        names = ("kernel_size", "expand_ratio", "qkv_ratio", "mlp_ratio")
        return {
            "num_global_heads": block.num_global_heads,
            "local_part": block.local_part if block.num_local_heads else None,
            **{name: getattr(block, name) for name in names},
            **dict(block.local_sizes),
        }

    def scaled(self, embed_dim: int, num_heads: int) -> GLiTSpec:
        """Scale the blocks to another width: G/N, L/N, the ratios and the kernel sizes stay the same.

        Raises:
            SpecError: if the heads of a block cannot be divided in the same proportion at `num_heads`.
        """
        check_int("num_heads", num_heads, 1)
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
        """Plain values as stored in JSON and in a Hub `config.json`; without `family`, as version 0.1 wrote them."""
        return {
            "embed_dim": self.embed_dim,
            "num_heads": self.num_heads,
            "patch_size": self.patch_size,
            "blocks": [block.to_dict() for block in self.blocks],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GLiTSpec:
        """The inverse of `to_dict`. Raises SpecError on an unknown, missing or impossible field."""
        fields = check_fields(cls, "spec", data)
        return cls(**{**fields, "blocks": parse_blocks(fields["blocks"], BlockSpec.from_dict)})
