"""The networks that a search may find: a `SearchSpace` gives each block its options, as data.

It draws, changes, counts and divides into stages; it knows no cost and no accuracy. The shipped spaces are in
`named_spaces`, what one block may be is in `choices`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import yaml

from glit_models.errors import SearchError, SpecError
from glit_models.spec import BlockSpec, GLiTSpec

from .choices import (
    GENES,
    BlockChoices,
    BlockOptions,
    UniformOver,
    check_fields,
    check_keys,
    check_list,
    check_mapping,
    draw_below,
)

__all__ = ["LowLevel", "SearchSpace"]


@final
@dataclass(frozen=True)
class LowLevel:
    """The values at which the first stage holds what the second one searches.

    The paper does not say its own. The ratios of attention and feed-forward network are DeiT's, the kernel is about
    Conformer's (32, arXiv 2005.08100); the expansion is the only one at which the paper's budget of 1.3 to 1.4 G
    multiply-adds can be met with these: at 2 the first stage's dearest network has 1.28 G.
    """

    kernel_size: int = 31
    expand_ratio: int = 4
    qkv_ratio: float = 1
    mlp_ratio: float = 4


@final
@dataclass(frozen=True)
class SearchSpace:
    """The networks of one width and depth whose every block is one of that block's options.

    Attributes:
        blocks: for each block its choices: one product, or several of which any may be taken.
        embed_dim: C, channels of a token.
        num_heads: N, heads of every block.
        patch_size: side of a square patch, in pixels.

    Raises:
        SearchError: names the block, the product, the field, the value and the bound.

    Source: GLiT (arXiv 2107.02960), section 3.3.
    """

    blocks: tuple[tuple[BlockChoices, ...], ...]
    embed_dim: int
    num_heads: int
    patch_size: int = 16

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(map(tuple, self.blocks)))
        for name in ("embed_dim", "num_heads", "patch_size"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise SearchError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.embed_dim % self.num_heads:
            raise SearchError(f"embed_dim must be a multiple of num_heads={self.num_heads}, got {self.embed_dim}")
        if not self.blocks:
            raise SearchError("blocks must hold at least one block, got none")
        for choices in dict.fromkeys(self.blocks):
            where = f"blocks[{self.blocks.index(choices)}]"
            if not choices:
                raise SearchError(f"{where}.choices must hold at least one product of choices, got none")
            for index, product in enumerate(choices):
                self._check(f"{where}.choices[{index}]", product)

    def _check(self, where: str, product: BlockChoices) -> None:
        for field in dataclasses.fields(product):
            values = getattr(product, field.name)
            if len(set(values)) < len(values):
                raise SearchError(f"{where}.{field.name} must not repeat a value, got {list(values)}")
            if not values and field.name in ("num_global_heads", "mlp_ratios"):
                raise SearchError(f"{where}.{field.name} must hold at least one value, got none")
        for num_global in product.num_global_heads:
            if type(num_global) is not int or not 0 <= num_global <= self.num_heads:
                raise SearchError(
                    f"{where}.num_global_heads must be integers from 0 to num_heads={self.num_heads}, "
                    f"got {num_global!r}"
                )
        try:
            for block in product.expand(self.num_heads):
                self._spec((block,))
        except SpecError as error:
            raise SearchError(f"{where}: {str(error).removeprefix('blocks[0].')}") from None

    def _spec(self, blocks: Iterable[BlockSpec]) -> GLiTSpec:
        return GLiTSpec(tuple(blocks), self.embed_dim, self.num_heads, self.patch_size)

    @cached_property
    def _options(self) -> tuple[BlockOptions, ...]:
        """One for each block; blocks with the same choices share theirs."""
        by_choices = {choices: BlockOptions(choices, self.num_heads) for choices in self.blocks}
        return tuple(by_choices[choices] for choices in self.blocks)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def size(self) -> int:
        """Number of members: networks that differ in what they compute."""
        return math.prod(len(options.blocks) for options in self._options)

    @property
    def raw_size(self) -> int:
        """Number of combinations of choices, those that do not matter counted too, as the paper counts."""
        return math.prod(sum(options.counts) for options in self._options)

    def options(self, block: int) -> tuple[BlockSpec, ...]:
        """The distinct options of a block, in a fixed order."""
        return self._options[block].blocks

    def counts(self, block: int) -> tuple[int, ...]:
        """How many combinations of choices give each of `options(block)`."""
        return self._options[block].counts

    def __contains__(self, spec: object) -> bool:
        """Whether each block of a `GLiTSpec` of this width and depth is one of that block's options."""
        shape = (self.depth, self.embed_dim, self.num_heads, self.patch_size)
        return (
            isinstance(spec, GLiTSpec)
            and (spec.depth, spec.embed_dim, spec.num_heads, spec.patch_size) == shape
            and all(block in options.index for block, options in zip(spec.blocks, self._options, strict=True))
        )

    def __iter__(self) -> Iterator[GLiTSpec]:
        """Every member in a fixed order, the last block's options changing fastest. For small spaces."""
        return map(self._spec, itertools.product(*(options.blocks for options in self._options)))

    def canonical(self, spec: GLiTSpec) -> GLiTSpec:
        """The member equal to `spec`, in the space's own numbers (1 and 1.0 are equal, and differ in JSON).

        Raises:
            SearchError: if it is none; names the first thing that keeps it out.
        """
        for name in ("depth", "embed_dim", "num_heads", "patch_size"):
            if getattr(spec, name) != getattr(self, name):
                raise SearchError(f"{name} must be the space's {getattr(self, name)}, got {getattr(spec, name)}")
        for index, (block, options) in enumerate(zip(spec.blocks, self._options, strict=True)):
            if block not in options.index:
                raise SearchError(f"blocks[{index}] must be one of the space's options, got {block.to_dict()}")
        return self._spec(o.blocks[o.index[block]] for block, o in zip(spec.blocks, self._options, strict=True))

    def sample(self, rng: random.Random, uniform_over: UniformOver = "choices") -> GLiTSpec:
        """A random member.

        Uniform over 'choices' draws each value by itself, as SPOS does; blocks in which few of the choices matter come
        up as often as the others. Uniform over 'members' makes every distinct network equally likely: of `glit`'s
        blocks, 82 % are then mixed ones.
        """
        return self._spec(options.draw(rng, uniform_over) for options in self._options)

    def mutate(self, spec: GLiTSpec, prob: float, rng: random.Random) -> GLiTSpec:
        """A member in which each gene of `spec` has changed with this probability; it may be `spec` again.

        A gene is the distribution of a block's heads or a value that matters under it. It takes any other of its values
        with equal chances; the rest of the block stays as far as its choices allow, and what newly matters is drawn.

        Raises:
            SearchError: if `spec` is no member.
        """
        blocks = []
        for block, options in zip(self.canonical(spec).blocks, self._options, strict=True):
            changed = block
            for gene in GENES:
                if (moves := options.moves(changed, gene)) and rng.random() < prob:
                    nearest = moves[draw_below(rng, len(moves))]
                    changed = nearest[draw_below(rng, len(nearest))]
            blocks.append(changed)
        return self._spec(blocks)

    def crossover(self, a: GLiTSpec, b: GLiTSpec, rng: random.Random) -> GLiTSpec:
        """A member that has each block from either parent with equal chances. Raises SearchError if one is none."""
        pairs = zip(self.canonical(a).blocks, self.canonical(b).blocks, strict=True)
        return self._spec(pair[rng.random() < 0.5] for pair in pairs)

    def neighbours(self, spec: GLiTSpec) -> Iterator[GLiTSpec]:
        """Every member one gene away, once each and in a fixed order: what `mutate` makes where one gene changes.

        Raises:
            SearchError: if `spec` is no member.
        """
        blocks = self.canonical(spec).blocks
        for index, options in enumerate(self._options):
            nearest = (group for gene in GENES for group in options.moves(blocks[index], gene))
            for block in dict.fromkeys(itertools.chain.from_iterable(nearest)):
                yield self._spec((*blocks[:index], block, *blocks[index + 1 :]))

    def restrict(self, **allowed: Sequence[float]) -> SearchSpace:
        """The members that have only these values, by the names of `BlockChoices`' fields: `kernel_sizes=(31,)`.

        Raises:
            SearchError: on an unknown field, or if a block has no option left.
        """
        return self._restrict([allowed] * self.depth)

    def _restrict(self, allowed: Sequence[Mapping[str, Sequence[float]]]) -> SearchSpace:
        blocks = []
        for index, (choices, values) in enumerate(zip(self.blocks, allowed, strict=True)):
            check_keys("", values, [field.name for field in dataclasses.fields(BlockChoices)])
            left = [product.restrict(self.num_heads, **values) for product in choices]
            blocks.append(tuple(product for product in left if product is not None))
            if not blocks[-1]:
                names = ", ".join(f"{name} {list(value)}" for name, value in values.items())
                raise SearchError(f"blocks[{index}] has no option left with {names}")
        return dataclasses.replace(self, blocks=tuple(blocks))

    def stage_one(self, fixed: LowLevel | None = None) -> SearchSpace:
        """The high level: every distribution of heads, all other values held at `fixed` (GLiT, section 3.3).

        Raises:
            SearchError: if a distribution of a block does not allow the fixed values.
        """
        values = dataclasses.asdict(fixed or LowLevel())
        for index in range(self.depth):
            for num_global in dict.fromkeys(block.num_global_heads for block in self.options(index)):
                want = BlockSpec(num_global, self.num_heads - num_global, **values)
                if want not in self.options(index):
                    raise SearchError(
                        f"the first stage's fixed values give blocks[{index}] {want.to_dict()}, "
                        "which is none of its options"
                    )
        return self.restrict(**{f"{name}s": (value,) for name, value in values.items()})

    def stage_two(self, winner: GLiTSpec) -> SearchSpace:
        """The low level: each block's heads distributed as the winner's, all other values as this space has them.

        Raises:
            SearchError: if the winner is of another depth, or a block does not allow its distribution.
        """
        if winner.depth != self.depth:
            raise SearchError(f"depth must be the space's {self.depth}, got {winner.depth}")
        return self._restrict([{"num_global_heads": (block.num_global_heads,)} for block in winner.blocks])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in YAML; equal blocks in a row are written once, with `repeat`."""
        runs = [(choices, len(list(run))) for choices, run in itertools.groupby(self.blocks)]
        blocks = [{"repeat": count, "choices": [product.to_dict() for product in run]} for run, count in runs]
        return {
            "embed_dim": self.embed_dim,
            "num_heads": self.num_heads,
            "patch_size": self.patch_size,
            "blocks": blocks,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SearchSpace:
        """The inverse of `to_dict`.

        Raises:
            SearchError: on an unknown key, of which it names the nearest valid one, a missing one or a wrong value.
        """
        fields = check_fields(cls, "", data)
        blocks: list[tuple[BlockChoices, ...]] = []
        for run in check_list("blocks", fields["blocks"]):
            place = f"blocks[{len(blocks)}]"
            check_keys(f"{place}.", check_mapping(place, run), ("repeat", "choices"))
            repeat, products = run.get("repeat", 1), check_list(f"{place}.choices", run.get("choices"))
            if type(repeat) is not int or repeat < 1:
                raise SearchError(f"{place}.repeat must be an integer of at least 1, got {repeat!r}")
            choices = (BlockChoices.from_dict(data, f"{place}.choices[{i}]") for i, data in enumerate(products))
            blocks += [tuple(choices)] * repeat
        return cls(**{**fields, "blocks": tuple(blocks)})

    def to_yaml(self) -> str:
        """The space as YAML text, which `load_space` reads."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=120)
