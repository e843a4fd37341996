"""What one block of a network may be, as data: products of choices, their distinct options, the ways between these.

It knows one block at a time; a whole network's are `space`'s. All randomness comes from a `random.Random` that the
caller gives, of which only `random()` is used: its sequence is the one that Python promises to keep in every version,
its state is plain integers, and for single numbers it is faster than numpy's. Nothing depends on the order of a set or
of a hash.

Letters: G and L global and local heads, N = G + L, K kernel size, E, r and d_z the ratios of `BlockSpec`.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import random
from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

from glit_models.errors import SearchError
from glit_models.spec import BlockSpec

__all__ = [
    "GENES",
    "BlockChoices",
    "BlockOptions",
    "UniformOver",
    "check_fields",
    "check_keys",
    "check_list",
    "check_mapping",
    "draw_below",
]

# What is searched in a block, the distribution of its heads first: the others matter or not depending on it.
GENES = ("num_global_heads", "kernel_size", "expand_ratio", "qkv_ratio", "mlp_ratio")
UniformOver = Literal["choices", "members"]


def draw_below(rng: random.Random, bound: int) -> int:
    """An integer from 0 to `bound` - 1, all equally likely; `bound` is far below 2**53."""
    return int(rng.random() * bound)


def check_keys(prefix: str, data: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raises SearchError on a key of `data` that is not known; names the nearest one that is."""
    names = list(known)
    for key in data:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.0)[0]
            raise SearchError(f"unknown key {prefix}{key}; did you mean {prefix}{near}?")


def check_mapping(where: str, data: Any) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise SearchError(f"{where.rstrip('.') or 'a search space'} must be a mapping of keys, got {data!r}")
    return data


def check_list(where: str, data: Any) -> Sequence[Any]:
    if not isinstance(data, (list, tuple)):
        raise SearchError(f"{where} must be a list, got {data!r}")
    return data


def check_fields(cls: type, prefix: str, data: Any) -> dict[str, Any]:
    """`data` as keywords of a dataclass: every key known, every required one there."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    check_keys(prefix, check_mapping(prefix, data), fields)
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in data:
            raise SearchError(f"{prefix}{name} is missing")
    return dict(data)


@final
@dataclass(frozen=True)
class BlockChoices:
    """A product of choices for one block: every distribution of heads with every value that matters under it.

    Fields that never matter may stay empty (`qkv_ratios` where no distribution has global heads; `kernel_sizes` and
    `expand_ratios` where none has local ones).

    Attributes:
        num_global_heads: choices of G; L is N - G.
        mlp_ratios: choices of d_z.
        qkv_ratios: choices of r.
        kernel_sizes: choices of K.
        expand_ratios: choices of E.

    Raises:
        SearchError: on a value that is no number. What else cannot be is known only in a `SearchSpace`.
    """

    num_global_heads: tuple[int, ...]
    mlp_ratios: tuple[float, ...]
    qkv_ratios: tuple[float, ...] = ()
    kernel_sizes: tuple[int, ...] = ()
    expand_ratios: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            values = tuple(getattr(self, field.name))
            if not all(isinstance(value, (int, float)) for value in values):
                raise SearchError(f"{field.name} must be numbers, got {list(values)}")
            object.__setattr__(self, field.name, values)

    def expand(self, num_heads: int) -> Iterator[BlockSpec]:
        """A block for each combination in a fixed order; those that differ in what does not matter come out equal."""
        for num_global in self.num_global_heads:
            for mlp_ratio, qkv_ratio, kernel_size, expand_ratio in itertools.product(
                self.mlp_ratios, self.qkv_ratios or (None,), self.kernel_sizes or (None,), self.expand_ratios or (None,)
            ):
                yield BlockSpec(num_global, num_heads - num_global, mlp_ratio, qkv_ratio, kernel_size, expand_ratio)

    def restrict(self, num_heads: int, **allowed: Sequence[float]) -> BlockChoices | None:
        """Only the allowed values of the named fields, and the distributions that still have what they need.

        None if nothing is left.
        """
        left = {
            field.name: tuple(v for v in getattr(self, field.name) if v in allowed.get(field.name, (v,)))
            for field in dataclasses.fields(self)
        }
        left["num_global_heads"] = tuple(
            num_global
            for num_global in left["num_global_heads"]
            if (left["qkv_ratios"] or not num_global)
            and ((left["kernel_sizes"] and left["expand_ratios"]) or num_global == num_heads)
        )
        return BlockChoices(**left) if left["num_global_heads"] and left["mlp_ratios"] else None

    def to_dict(self) -> dict[str, list[float]]:
        """The fields that hold anything, as plain values."""
        return {key: list(values) for key, values in dataclasses.asdict(self).items() if values}

    @classmethod
    def from_dict(cls, data: Any, place: str) -> BlockChoices:
        """The inverse of `to_dict`. Raises SearchError on an unknown, missing or impossible field, with its place."""
        fields = check_fields(cls, f"{place}.", data)
        lists = {name: tuple(check_list(f"{place}.{name}", values)) for name, values in fields.items()}
        try:
            return cls(**lists)
        except SearchError as error:
            raise SearchError(f"{place}.{error}") from None


@final
class BlockOptions:
    """The distinct options of one block, how often the choices give each, and the ways from one to another."""

    def __init__(self, choices: Sequence[BlockChoices], num_heads: int) -> None:
        counts = Counter(block for product in choices for block in product.expand(num_heads))
        self.blocks = tuple(counts)
        self.counts = tuple(counts.values())
        self.index = {block: index for index, block in enumerate(self.blocks)}
        self._cumulative = list(itertools.accumulate(self.counts))
        self._moves: dict[tuple[BlockSpec, str], tuple[tuple[BlockSpec, ...], ...]] = {}

    def draw(self, rng: random.Random, uniform_over: UniformOver) -> BlockSpec:
        if uniform_over == "members":
            return self.blocks[draw_below(rng, len(self.blocks))]
        return self.blocks[bisect(self._cumulative, draw_below(rng, self._cumulative[-1]))]

    def moves(self, block: BlockSpec, gene: str) -> tuple[tuple[BlockSpec, ...], ...]:
        """For each other value of the gene, the options with it that keep the most of the block's other values."""
        if (block, gene) not in self._moves:
            self._moves[block, gene] = tuple(self._find_moves(block, gene))
        return self._moves[block, gene]

    def _find_moves(self, block: BlockSpec, gene: str) -> Iterator[tuple[BlockSpec, ...]]:
        by_value: dict[float, list[BlockSpec]] = {}
        for option in self.blocks:
            value = getattr(option, gene)
            same_heads = gene == GENES[0] or option.num_global_heads == block.num_global_heads
            if same_heads and value not in (None, getattr(block, gene)):
                by_value.setdefault(value, []).append(option)
        for options in by_value.values():
            kept = [sum(getattr(option, name) == getattr(block, name) for name in GENES) for option in options]
            yield tuple(option for option, count in zip(options, kept, strict=True) if count == max(kept))
