"""The choices for one block of a network: products of values, their distinct options, and moves between options.

A family's spec defines the genes of its blocks; this module knows none by name. All randomness comes from a
`random.Random` given by the caller, of which only `random()` is used: Python guarantees its sequence in every version,
and its state is plain integers. Nothing depends on the order of a set or of hashes.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import random
from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, final

from glit_models import Spec
from glit_models.errors import SearchError, SpecError

__all__ = [
    "BlockChoices",
    "BlockOptions",
    "UniformOver",
    "check_keys",
    "check_list",
    "check_mapping",
    "draw_below",
    "key_of",
]

UniformOver = Literal["choices", "members", "kinds"]
Value = int | float | str


def draw_below(rng: random.Random, bound: int) -> int:
    """A uniform random integer from 0 to `bound` - 1; `bound` is far below 2**53."""
    return int(rng.random() * bound)


def check_keys(prefix: str, data: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise SearchError on an unknown key of `data`; names the nearest valid one."""
    names = list(known)
    for key in data:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.0)[0]
            raise SearchError(f"unknown key {prefix}{key}; did you mean {prefix}{near}?")


def check_mapping(where: str, data: Any) -> Mapping[str, Any]:
    """Raise SearchError if `data` is no mapping whose keys are names."""
    if not isinstance(data, Mapping):
        raise SearchError(f"{where.rstrip('.') or 'a search space'} must be a mapping of keys, got {data!r}")
    if wrong := [key for key in data if not isinstance(key, str)]:
        raise SearchError(f"{where.rstrip('.') or 'a search space'} has the key {wrong[0]!r}; keys are names")
    return data


def check_list(where: str, data: Any) -> Sequence[Any]:
    if not isinstance(data, (list, tuple)):
        raise SearchError(f"{where} must be a list, got {data!r}")
    return data


def key_of(gene: str) -> str:
    """The key of a gene's values in a space: the gene's plural."""
    return gene if gene.endswith("s") else f"{gene}s"


def required_genes(spec_class: type[Spec]) -> list[str]:
    """The genes that a family's blocks require."""
    fields = {field.name: field for field in dataclasses.fields(spec_class.block_class)}
    known = spec_class.known_genes({})
    return [name for name in known if name in fields and fields[name].default is dataclasses.MISSING]


@final
class BlockChoices:
    """A product of choices for one block: every combination of these values. Immutable, compared by value.

    Args:
        values: the values of each gene, by its plural: `num_global_heads=(0, 1)`, `kernel_sizes=(3, 5)`. Genes that
            never have an effect can be left out.

    Raises:
        SearchError: on a value that is neither a number nor a name. Other errors are only detected in a `SearchSpace`.
    """

    def __init__(self, /, **values: Iterable[Value]) -> None:
        self.values: dict[str, tuple[Value, ...]] = {}
        for key, given in values.items():
            listed = tuple(given)
            if not all(isinstance(value, (int, float, str)) for value in listed):
                raise SearchError(f"{key} must be numbers or names, got {list(listed)}")
            self.values[key] = listed

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockChoices) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(frozenset((key, values) for key, values in self.values.items() if values))

    def __repr__(self) -> str:
        return f"BlockChoices({', '.join(f'{key}={values}' for key, values in self.values.items())})"

    def of(self, gene: str) -> tuple[Value, ...]:
        """The values of a gene, possibly none."""
        return self.values.get(key_of(gene), ())

    def known_genes(self, spec_class: type[Spec]) -> tuple[str, ...]:
        """The names of all genes that these blocks may have. Raises SpecError on an unknown name among the values."""
        return spec_class.known_genes({gene: self.of(gene) for gene in spec_class.leading_genes})

    def expand(self, spec_class: type[Spec], network: Mapping[str, Any]) -> Iterator[Any]:
        """Create a block for each combination in a fixed order; combinations with equal effect give equal blocks.

        Args:
            spec_class: spec class of the family.
            network: the spec's other fields, except `embed_dim`.

        Raises:
            SpecError: on an impossible combination.
        """
        genes = [gene for gene in self.known_genes(spec_class) if self.of(gene)]
        for combination in itertools.product(*map(self.of, genes)):
            yield spec_class.block_from_genes(dict(zip(genes, combination, strict=True)), network)

    def restrict(
        self, spec_class: type[Spec], network: Mapping[str, Any], allowed: Mapping[str, Sequence[Value]]
    ) -> BlockChoices | None:
        """Keep only the allowed values, by plurals, and the leading genes' values whose required genes have any left.

        Returns None if nothing is left.
        """
        before = self._leading_blocks(spec_class, network)
        relevant = {g: {spec_class.genes_of(block)[g] for block in before} for g in spec_class.leading_genes}
        implied = {key_of(gene): sorted(relevant[gene] - {None}) for gene in relevant if not self.of(gene)}
        if any(value not in allowed.get(key, (value,)) for key, values in implied.items() for value in values):
            # If no leading genes are given, write their values down.
            return BlockChoices(**{**self.values, **implied}).restrict(spec_class, network, allowed)
        left = {key: tuple(v for v in values if v in allowed.get(key, (v,))) for key, values in self.values.items()}
        for gene in reversed(spec_class.leading_genes):
            kept = []
            for value in left.get(key_of(gene), ()):
                narrowed = BlockChoices(**{**left, key_of(gene): (value,)})
                blocks = narrowed._leading_blocks(spec_class, network, self)
                if value not in relevant[gene] or any(spec_class.genes_of(block)[gene] == value for block in blocks):
                    kept.append(value)
            if key_of(gene) in left:
                left[key_of(gene)] = tuple(kept)
        known = {key_of(gene) for gene in BlockChoices(**left).known_genes(spec_class)}
        choices = BlockChoices(**{key: values for key, values in left.items() if key in known})
        return choices if choices._leading_blocks(spec_class, network, self) else None

    def _leading_blocks(
        self, spec_class: type[Spec], network: Mapping[str, Any], whole: BlockChoices | None = None
    ) -> list[Any]:
        """The possible blocks with each combination of leading genes and the first value of every other gene.

        Genes that have values in `whole`, but none here, must have no effect in them.
        """
        if not all(self.of(gene) for gene in required_genes(spec_class)):
            return []
        gone = [gene for gene in whole.known_genes(spec_class) if whole.of(gene) and not self.of(gene)] if whole else []
        first = {key: v if key in map(key_of, spec_class.leading_genes) else v[:1] for key, v in self.values.items()}
        genes = [gene for gene in self.known_genes(spec_class) if self.of(gene)]
        blocks = []
        for combination in itertools.product(*(first[key_of(gene)] for gene in genes)):
            try:
                block = spec_class.block_from_genes(dict(zip(genes, combination, strict=True)), network)
            except SpecError:
                continue
            if all(spec_class.genes_of(block).get(gene) is None for gene in gone):
                blocks.append(block)
        return blocks

    def to_dict(self) -> dict[str, list[Value]]:
        """The non-empty keys, as plain values."""
        return {key: list(values) for key, values in self.values.items() if values}

    @classmethod
    def from_dict(cls, data: Any, place: str) -> BlockChoices:
        """The inverse of `to_dict`. Raises SearchError on a key without values, with its place."""
        lists = {
            str(key): tuple(check_list(f"{place}.{key}", values))
            for key, values in check_mapping(place, data).items()
        }  # fmt: skip
        try:
            return cls(**lists)
        except SearchError as error:
            raise SearchError(f"{place}.{error}") from None


@final
class BlockOptions:
    """The distinct options of one block, how many choices give each of them, and the moves from one to another.

    Attributes:
        blocks: the options in a fixed order.
        counts: number of combinations of choices that give each option.
        index: index of each option in `blocks`.
        genes: the names of all genes that have an effect in any option, in the order in which a search changes them.
    """

    def __init__(self, choices: Sequence[BlockChoices], spec_class: type[Spec], network: Mapping[str, Any]) -> None:
        counted = Counter(block for product in choices for block in product.expand(spec_class, network))
        self.blocks = tuple(counted)
        self.counts = tuple(counted.values())
        self.index = {block: index for index, block in enumerate(self.blocks)}
        self.total = sum(self.counts)
        self._leading = spec_class.leading_genes
        self._genes = {block: spec_class.genes_of(block) for block in self.blocks}
        self.genes = tuple(dict.fromkeys(name for genes in self._genes.values() for name in genes))
        self._cumulative = list(itertools.accumulate(self.counts))
        self._moves: dict[tuple[Any, str], tuple[tuple[Any, ...], ...]] = {}

    def draw(self, rng: random.Random, uniform_over: UniformOver) -> Any:
        """A random option, with probability proportional to its weight."""
        if uniform_over == "members":
            return self.blocks[draw_below(rng, len(self.blocks))]
        if uniform_over == "kinds":
            cumulative = self._kind_cumulative
            return self.blocks[bisect(cumulative, rng.random() * cumulative[-1], hi=len(cumulative) - 1)]
        return self.blocks[bisect(self._cumulative, draw_below(rng, self._cumulative[-1]))]

    def weights(self, uniform_over: UniformOver) -> Sequence[float]:
        """The weight of each option in a random draw, see `SearchSpace.sample`."""
        if uniform_over == "choices":
            return self.counts
        if uniform_over == "members":
            return [1] * len(self.blocks)
        return self._kind_weights

    @cached_property
    def _kind_weights(self) -> list[float]:
        """The share of each option among those with the same leading genes."""
        kinds = [tuple(self._genes[block][gene] for gene in self._leading) for block in self.blocks]
        totals: Counter[tuple[Any, ...]] = Counter()
        for kind, count in zip(kinds, self.counts, strict=True):
            totals[kind] += count
        return [count / totals[kind] for kind, count in zip(kinds, self.counts, strict=True)]

    @cached_property
    def _kind_cumulative(self) -> list[float]:
        return list(itertools.accumulate(self._kind_weights))

    def moves(self, block: Any, gene: str) -> tuple[tuple[Any, ...], ...]:
        """For each other value of the gene, the options with it that keep the most other values of the block.

        Genes that precede this one keep their values.
        """
        if (block, gene) not in self._moves:
            self._moves[block, gene] = tuple(self._find_moves(block, gene))
        return self._moves[block, gene]

    def _find_moves(self, block: Any, gene: str) -> Iterator[tuple[Any, ...]]:
        own = self._genes[block]
        held = self._leading[: self._leading.index(gene)] if gene in self._leading else self._leading
        by_value: dict[Any, list[Any]] = {}
        for option, genes in self._genes.items():
            value = genes.get(gene)
            if value not in (None, own.get(gene)) and all(genes[name] == own[name] for name in held):
                by_value.setdefault(value, []).append(option)
        for options in by_value.values():
            kept = [sum(self._genes[o].get(name) == own.get(name) for name in self.genes) for o in options]
            yield tuple(option for option, count in zip(options, kept, strict=True) if count == max(kept))
