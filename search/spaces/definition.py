"""Define the networks of a search space: its family, its widths and depths, and the options of each block.

`space` samples and changes networks; `choices` defines the options of one block.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self, final

import yaml

from glit_models import Spec
from glit_models.errors import SearchError, SpecError
from glit_models.families import FAMILIES
from glit_models.spec import MAX_BLOCKS

from .choices import (
    BlockChoices,
    BlockOptions,
    check_keys,
    check_list,
    check_mapping,
    key_of,
    required_genes,
)

__all__ = ["NETWORK_GENES", "SpaceDefinition", "Stratum"]

NETWORK_GENES = ("embed_dim", "depth")
_MAX_COMBINATIONS = 100_000  # of all different blocks; the largest shipped space has 972


@final
@dataclass(frozen=True)
class Stratum:
    """The members of a space with one width and one depth: all products of their blocks' options.

    Attributes:
        space: the whole space.
        embed_dim: C, channels of a token.
        depth: number of blocks.
    """

    space: SpaceDefinition
    embed_dim: int
    depth: int

    @property
    def options(self) -> tuple[BlockOptions, ...]:
        """The options of each block."""
        return self.space.block_options[: self.depth]

    @property
    def size(self) -> int:
        """Number of members."""
        return math.prod(len(options.blocks) for options in self.options)

    @property
    def raw_size(self) -> int:
        """Number of combinations of choices."""
        return math.prod(options.total for options in self.options)

    def spec(self, blocks: Iterable[Any]) -> Spec:
        """The network with these blocks."""
        return self.space.make_spec(blocks, self.embed_dim)

    def member_at(self, indices: Iterable[int]) -> Spec:
        """The member whose blocks are the options at these indices."""
        return self.spec(options.blocks[index] for options, index in zip(self.options, indices, strict=True))


class SpaceDefinition:
    """The networks of one family in which every block is one of that block's options. Immutable, compared by value.

    A space is a union of strata, one for each width and depth; in each, blocks are chosen independently.

    Args:
        blocks: for each block of the deepest network its choices: one product, or several alternative ones.
        embed_dim: C, channels of a token, or several values of it.
        family: name of the networks' family.
        depth: numbers of blocks; shorter networks use the first blocks. None for all of `blocks`.
        network: the other fields of the family's spec, such as `num_heads` and `patch_size`.

    Raises:
        SearchError: names the block, the product, the field, the value and the bound.

    Source: GLiT (arXiv 2107.02960), section 3.3; widths and depths: AutoFormer (arXiv 2107.00651), section 3.
    """

    def __init__(
        self,
        blocks: Iterable[Iterable[BlockChoices]],
        embed_dim: int | Sequence[int],
        *,
        family: str = "glit",
        depth: int | Sequence[int] | None = None,
        **network: Any,
    ) -> None:
        try:
            self.spec_class = FAMILIES[family].spec
        except SpecError as error:
            raise SearchError(str(error)) from None
        self.family = family
        self.blocks = tuple(map(tuple, blocks))
        self.embed_dims = _numbers("embed_dim", embed_dim)
        self.depths = (len(self.blocks),) if depth is None else _numbers("depth", depth)
        self.network = self._complete(network)
        if not self.blocks:
            raise SearchError("blocks must hold at least one block, got none")
        if len(self.blocks) > MAX_BLOCKS:
            raise SearchError(f"blocks must hold at most {MAX_BLOCKS} blocks, got {len(self.blocks)}")
        if max(self.depths) != len(self.blocks):
            raise SearchError(f"blocks must describe depth={max(self.depths)} blocks, got {len(self.blocks)}")
        count = sum(map(self._count, dict.fromkeys(product for choices in self.blocks for product in choices)))
        if count > _MAX_COMBINATIONS:
            raise SearchError(f"all choices must give at most {_MAX_COMBINATIONS:,} combinations, got {count:,}")
        for choices in dict.fromkeys(self.blocks):
            where = f"blocks[{self.blocks.index(choices)}]"
            if not choices:
                raise SearchError(f"{where}.choices must hold at least one product of choices, got none")
            for index, product in enumerate(choices):
                self._check(f"{where}.choices[{index}]", product)

    def _count(self, product: BlockChoices) -> int:
        return math.prod(max(len(values), 1) for values in product.values.values()) * len(self.embed_dims)

    def _complete(self, network: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of the spec except blocks and width, with their defaults."""
        fields = _network_fields(self.spec_class)
        check_keys("", network, ["embed_dim", "depth", *fields])
        hints = typing.get_type_hints(self.spec_class)
        complete = {}
        for name, field in fields.items():
            if name not in network and field.default is dataclasses.MISSING:
                raise SearchError(f"{name} is missing")
            value = complete[name] = network.get(name, field.default)
            if hints[name] is int and (type(value) is not int or value < 1):
                raise SearchError(f"{name} must be an integer of at least 1, got {value!r}")
        return complete

    def _check(self, where: str, product: BlockChoices) -> None:
        try:
            check_keys(f"{where}.", product.values, map(key_of, product.known_genes(self.spec_class)))
        except SpecError as error:
            raise SearchError(f"{where}: {error}") from None
        for key in map(key_of, required_genes(self.spec_class)):
            if key not in product.values:
                raise SearchError(f"{where}.{key} is missing")
            if not product.values[key]:
                raise SearchError(f"{where}.{key} must hold at least one value, got none")
        for key, values in product.values.items():
            if len(set(values)) < len(values):
                raise SearchError(f"{where}.{key} must not repeat a value, got {list(values)}")
        for embed_dim in self.embed_dims:
            self._check_width(where, product, embed_dim)

    def _check_width(self, where: str, product: BlockChoices, embed_dim: int) -> None:
        at = f" (at embed_dim={embed_dim})" if len(self.embed_dims) > 1 else ""
        try:
            blocks = list(product.expand(self.spec_class, self.network))
        except SpecError as error:
            raise SearchError(f"{where}: {error}") from None
        for block in dict.fromkeys(blocks):
            try:
                self.make_spec((block,), embed_dim)
            except SpecError as error:
                text = str(error)
                place = f"{where}: " if text.startswith("blocks[0].") else ""
                raise SearchError(f"{place}{text.removeprefix('blocks[0].')}{at}") from None

    def make_spec(self, blocks: Iterable[Any], embed_dim: int) -> Spec:
        """The network with these blocks at this width."""
        spec_class: Any = self.spec_class  # a family's spec is a dataclass, which `Spec` itself is not
        spec: Spec = spec_class(blocks=tuple(blocks), embed_dim=embed_dim, **self.network)
        return spec

    # ---- content ----

    @cached_property
    def block_options(self) -> tuple[BlockOptions, ...]:
        """The options of each block of the deepest network; equal blocks share theirs."""
        known = {c: BlockOptions(c, self.spec_class, self.network) for c in dict.fromkeys(self.blocks)}
        return tuple(known[choices] for choices in self.blocks)

    @cached_property
    def strata(self) -> tuple[Stratum, ...]:
        """One stratum for each width and depth."""
        return tuple(Stratum(self, width, depth) for width in self.embed_dims for depth in self.depths)

    @property
    def depth(self) -> int:
        """Number of blocks of the deepest network."""
        return len(self.blocks)

    @property
    def patch_size(self) -> int:
        """Side of a square patch, in pixels."""
        size: int = self.network["patch_size"]
        return size

    @property
    def size(self) -> int:
        """Number of members: networks that compute different functions."""
        return sum(stratum.size for stratum in self.strata)

    @property
    def raw_size(self) -> int:
        """Number of combinations of choices, including those without an effect, as the paper counts."""
        return sum(stratum.raw_size for stratum in self.strata)

    def options(self, block: int) -> tuple[Any, ...]:
        """The distinct options of a block, in a fixed order."""
        return self.block_options[block].blocks

    def counts(self, block: int) -> tuple[int, ...]:
        """The number of combinations of choices that give each of `options(block)`."""
        return self.block_options[block].counts

    def identity_of(self, options: BlockOptions) -> Any | None:
        """The identity block among these options; None if there is none, or nothing else."""
        parts = {block: self.make_spec((block,), self.embed_dims[0]).block_parts(0) for block in options.blocks}
        found = [block for block in options.blocks if parts[block].is_identity]
        return found[0] if found and len(found) < len(parts) else None

    def genes(self) -> tuple[str, ...]:
        """The names of all genes that blocks of this space may have, leading ones first."""
        names = (
            name for choices in self.blocks for product in choices for name in product.known_genes(self.spec_class)
        )
        return tuple(dict.fromkeys((*self.spec_class.leading_genes, *names)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SpaceDefinition) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.size:.4g} networks of {self.family}>"

    @property
    def _key(self) -> tuple[Any, ...]:
        return self.family, self.blocks, self.embed_dims, self.depths, tuple(self.network.items())

    def __contains__(self, spec: object) -> bool:
        """Whether a spec has one of the widths and depths, and each of its blocks is one of that block's options."""
        return isinstance(spec, Spec) and self._what_keeps_out(spec) is None

    def _what_keeps_out(self, spec: Spec) -> str | None:
        if not isinstance(spec, self.spec_class):
            return f"spec must be of the family {self.family}, got one of {spec.family}"
        allowed = {"depth": self.depths, "embed_dim": self.embed_dims}
        for name, values in (*allowed.items(), *((name, (value,)) for name, value in self.network.items())):
            if getattr(spec, name) not in values:
                one = "the space's" if len(values) == 1 else "one of the space's"
                return f"{name} must be {one} {', '.join(map(str, values))}, got {getattr(spec, name)}"
        for index, (block, options) in enumerate(zip(spec.blocks, self.block_options, strict=False)):
            if block not in options.index:
                return f"blocks[{index}] must be one of the space's options, got {block.to_dict()}"
        return None

    def canonical(self, spec: Spec) -> Spec:
        """The member equal to `spec`, with the space's number types (1 and 1.0 are equal, but differ in JSON).

        Raises:
            SearchError: if it is not a member; names the first reason.
        """
        if (reason := self._what_keeps_out(spec)) is not None:
            raise SearchError(reason)
        options = self.block_options[: spec.depth]
        return self.make_spec((o.blocks[o.index[block]] for block, o in zip(spec.blocks, options, strict=True)),
                              spec.embed_dim)  # fmt: skip

    def __iter__(self) -> Iterator[Spec]:
        """Every member in a fixed order, the last block's options changing fastest. For small spaces."""
        for stratum in self.strata:
            yield from map(stratum.spec, itertools.product(*(options.blocks for options in stratum.options)))

    # ---- serialisation ----

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in YAML; runs of equal blocks are written once, with `repeat`."""
        runs = [(choices, len(list(run))) for choices, run in itertools.groupby(self.blocks)]
        blocks = [{"repeat": count, "choices": [product.to_dict() for product in run]} for run, count in runs]
        data: dict[str, Any] = {} if self.family == "glit" else {"family": self.family}  # as in version 0.1
        data["embed_dim"] = _short(self.embed_dims)
        if self.depths != (self.depth,):
            data["depth"] = _short(self.depths)
        fields = _network_fields(self.spec_class)
        written = (name for name in fields if name == "patch_size" or self.network[name] != fields[name].default)
        return {**data, **{name: self.network[name] for name in written}, "blocks": blocks}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            SearchError: on an unknown key (names the nearest valid one), a missing one or a wrong value.
        """
        family = check_mapping("", data).get("family", "glit")
        try:
            names = _network_fields(FAMILIES[family].spec)
        except SpecError as error:
            raise SearchError(str(error)) from None
        check_keys("", data, ["blocks", "embed_dim", *names, "depth", "family"])
        for name in ("blocks", "embed_dim"):
            if name not in data:
                raise SearchError(f"{name} is missing")
        blocks: list[tuple[BlockChoices, ...]] = []
        for run in check_list("blocks", data["blocks"]):
            place = f"blocks[{len(blocks)}]"
            check_keys(f"{place}.", check_mapping(place, run), ("repeat", "choices"))
            repeat, products = run.get("repeat", 1), check_list(f"{place}.choices", run.get("choices"))
            if type(repeat) is not int or not 1 <= repeat <= MAX_BLOCKS:
                bound = f"from 1 to {MAX_BLOCKS}" if isinstance(repeat, int) and repeat > 1 else "of at least 1"
                raise SearchError(f"{place}.repeat must be an integer {bound}, got {repeat!r}")
            choices = (BlockChoices.from_dict(data, f"{place}.choices[{i}]") for i, data in enumerate(products))
            blocks += [tuple(choices)] * repeat
        return cls(blocks, **{key: value for key, value in data.items() if key != "blocks"})

    def to_yaml(self) -> str:
        """The space as YAML text, which `load_space` reads."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=120)


def _network_fields(spec_class: type[Spec]) -> dict[str, dataclasses.Field[Any]]:
    """The fields of a family's spec except blocks and width."""
    fields: Any = dataclasses.fields(spec_class)  # type: ignore[arg-type]
    return {field.name: field for field in fields if field.name not in ("blocks", "embed_dim")}


def _numbers(name: str, value: Any) -> tuple[int, ...]:
    """Check for one positive integer or several different ones."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    for number in values:
        if type(number) is not int or number < 1:
            raise SearchError(f"{name} must be an integer of at least 1, got {number!r}")
    if not values or len(set(values)) < len(values):
        raise SearchError(f"{name} must be one value or several different ones, got {list(values)}")
    return values


def _short(values: tuple[int, ...]) -> int | list[int]:
    return values[0] if len(values) == 1 else list(values)
