"""`SearchSpace`: sample, mutate and cross over the networks of a search space, and divide it into stages.

`definition` defines the content of a space; `named` has the built-in spaces.
"""

from __future__ import annotations

import itertools
import random
from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

from glit_models import Spec
from glit_models.errors import SearchError

from .choices import BlockChoices, UniformOver, check_keys, draw_below, key_of
from .definition import NETWORK_GENES, SpaceDefinition, Stratum

__all__ = ["SearchSpace"]


@final
class SearchSpace(SpaceDefinition):
    """A search space: see `SpaceDefinition` for its arguments."""

    def sample(self, rng: random.Random, uniform_over: UniformOver = "choices") -> Spec:
        """Draw a random member.

        Uniform over 'choices' draws each value independently, as in SPOS; blocks in which few choices have an effect
        are as frequent as others. Uniform over 'kinds' first draws a kind of block, such as a number of heads, all
        equally likely, and then the other values, so that an identity block is as frequent as each number of heads in
        `vitas`. Uniform over 'members' makes every distinct network equally likely: then 82 % of
        `glit`'s blocks are mixed.
        """
        if uniform_over == "members" and len(self.strata) > 1:
            cumulative = list(itertools.accumulate(float(stratum.size) for stratum in self.strata))
            place = bisect(cumulative, rng.random() * cumulative[-1])
            stratum = self.strata[min(place, len(cumulative) - 1)]
        else:
            width, depth = _pick(rng, self.embed_dims), _pick(rng, self.depths)
            stratum = Stratum(self, width, depth)
        return stratum.spec(options.draw(rng, uniform_over) for options in stratum.options)

    def mutate(
        self,
        spec: Spec,
        prob: float,
        rng: random.Random,
        depth_prob: float | None = None,
        width_prob: float | None = None,
        redraw: bool = False,
    ) -> Spec:
        """Change each gene of `spec` with some probability; the result may equal `spec`.

        A gene of a block changes to any of its other values with equal probability; the rest of the block is kept if
        its choices allow it, and genes that gain an effect are drawn. A new depth cuts or adds blocks at the end.

        Args:
            spec: a member.
            prob: probability of a change of each gene of each block.
            rng: source of randomness.
            depth_prob: probability of a change of the depth; None for `prob`.
            width_prob: probability of a change of the embedding width; None for `prob`.
            redraw: whether a changed gene may get its old value again, as in AutoFormer.

        Raises:
            SearchError: if `spec` is not a member.
        """
        spec = self.canonical(spec)
        depth_prob, width_prob = (prob if own is None else own for own in (depth_prob, width_prob))
        depth = _change(rng, spec.depth, self.depths, depth_prob, redraw)
        new = (options.draw(rng, "choices") for options in self.block_options[spec.depth : depth])
        blocks = []
        for block, options in zip((*spec.blocks[:depth], *new), self.block_options, strict=False):
            changed = block
            for gene in options.genes:
                if (moves := options.moves(changed, gene)) and rng.random() < prob:
                    place = draw_below(rng, len(moves) + redraw)
                    if place < len(moves):
                        nearest = moves[place]
                        changed = nearest[draw_below(rng, len(nearest))]
            blocks.append(changed)
        return self.make_spec(blocks, _change(rng, spec.embed_dim, self.embed_dims, width_prob, redraw))

    def redraw_blocks(self, spec: Spec, num_blocks: float, rng: random.Random) -> Spec:
        """Replace blocks of `spec` by others, on average `num_blocks` of them (SPOS, section 3.4).

        Each block becomes any other of its options, all equally likely, with probability num_blocks / depth; so do the
        width and the depth, which cuts or adds random blocks at the end.

        Raises:
            SearchError: if `spec` is not a member.
        """
        spec = self.canonical(spec)
        prob = num_blocks / spec.depth
        depth = _change(rng, spec.depth, self.depths, prob, redraw=False)
        blocks = list(spec.blocks[:depth])
        for index, options in enumerate(self.block_options[:depth]):
            if index >= spec.depth:
                blocks.append(options.draw(rng, "choices"))
            elif len(options.blocks) > 1 and rng.random() < prob:
                place = draw_below(rng, len(options.blocks) - 1)
                blocks[index] = options.blocks[place + (place >= options.index[blocks[index]])]
        return self.make_spec(blocks, _change(rng, spec.embed_dim, self.embed_dims, prob, redraw=False))

    def crossover(self, a: Spec, b: Spec, rng: random.Random) -> Spec:
        """Combine two members: each block, and the width, comes from either parent with equal probability.

        Raises:
            SearchError: if a parent is not a member, or they differ in depth.
        """
        a, b = self.canonical(a), self.canonical(b)
        if a.depth != b.depth:
            raise SearchError(f"parents must be of equal depth, got {a.depth} and {b.depth}")
        blocks = [pair[rng.random() < 0.5] for pair in zip(a.blocks, b.blocks, strict=True)]
        widths = (a.embed_dim, b.embed_dim)
        return self.make_spec(blocks, widths[rng.random() < 0.5] if len(self.embed_dims) > 1 else a.embed_dim)

    def neighbours(self, spec: Spec) -> Iterator[Spec]:
        """All members that differ in one gene, once each and in a fixed order: results of `mutate` with one change.

        Raises:
            SearchError: if `spec` is not a member.
        """
        spec = self.canonical(spec)
        blocks = spec.blocks
        for index, options in enumerate(self.block_options[: spec.depth]):
            nearest = (group for gene in options.genes for group in options.moves(blocks[index], gene))
            for block in dict.fromkeys(itertools.chain.from_iterable(nearest)):
                yield self.make_spec((*blocks[:index], block, *blocks[index + 1 :]), spec.embed_dim)
        for width in self.embed_dims:
            if width != spec.embed_dim:
                yield self.make_spec(blocks, width)
        for depth in self.depths:
            if depth != spec.depth:
                added = (options.blocks for options in self.block_options[spec.depth : depth])
                for more in itertools.product(*added):
                    yield self.make_spec((*blocks[:depth], *more), spec.embed_dim)

    # ---- subspaces ----

    def restrict(self, **allowed: Sequence[Any]) -> SearchSpace:
        """The members with only these values, by the genes' plurals (`kernel_sizes=(31,)`), `embed_dim`, `depth`.

        Raises:
            SearchError: on an unknown gene, or if a block has no option left.
        """
        check_keys("", allowed, [*map(key_of, self.genes()), *NETWORK_GENES])
        of_network = {name: allowed.pop(name) for name in NETWORK_GENES if name in allowed}
        return self._restrict([allowed] * self.depth, **of_network)

    def _restrict(
        self,
        allowed: Sequence[Mapping[str, Sequence[Any]]],
        embed_dim: Sequence[int] | None = None,
        depth: Sequence[int] | None = None,
    ) -> SearchSpace:
        widths = [width for width in self.embed_dims if embed_dim is None or width in embed_dim]
        depths = [number for number in self.depths if depth is None or number in depth]
        if not widths or not depths:
            raise SearchError(f"no network is left with embed_dim {embed_dim} and depth {depth}")
        blocks = []
        for index, choices in enumerate(self.blocks[: max(depths)]):
            values = allowed[index]
            left = [product.restrict(self.spec_class, self.network, values) for product in choices]
            blocks.append(tuple(product for product in left if product is not None))
            if not blocks[-1]:
                names = ", ".join(f"{name} {list(value)}" for name, value in values.items())
                raise SearchError(f"blocks[{index}] has no option left with {names}")
        return SearchSpace(blocks, widths, family=self.family, depth=depths, **self.network)

    def largest(self, share: float) -> SearchSpace:
        """The members with only the largest sizes: of n values of a size, the largest 1 + floor(share * (n - 1)).

        Leading genes, which divide a block among kinds of parts, and names keep all their values.
        """

        def keep(values: tuple[Any, ...]) -> tuple[Any, ...]:
            if any(isinstance(value, str) for value in values):
                return values
            kept = sorted(values, reverse=True)[: 1 + int(share * (len(values) - 1))]
            return tuple(value for value in values if value in kept)

        leading = [key_of(gene) for gene in self.spec_class.leading_genes]

        def narrow(product: BlockChoices) -> BlockChoices:
            return BlockChoices(**{k: v if k in leading else keep(v) for k, v in product.values.items()})

        blocks = {choices: tuple(map(narrow, choices)) for choices in self.blocks}
        return SearchSpace(
            [blocks[choices] for choices in self.blocks], keep(self.embed_dims), family=self.family,
            depth=keep(self.depths), **self.network,
        )  # fmt: skip

    def stage_one(self, /, **fixed: Any) -> SearchSpace:
        """The first stage: every choice of the leading genes, with all other values fixed (GLiT, section 3.3).

        Args:
            fixed: values of the other genes; missing ones come from the family's `first_stage`.

        Raises:
            SearchError: if the family is not searched in two stages, or a block does not allow the fixed values.
        """
        if self.spec_class.first_stage is None:
            raise SearchError(
                f"networks of {self.family} are searched in one stage; take another method than hierarchical"
            )
        leading = self.spec_class.leading_genes
        values = {**self.spec_class.first_stage, **fixed}
        check_keys("fixed.", values, [name for name in self.genes() if name not in leading])
        for options in dict.fromkeys(self.block_options):
            index = self.block_options.index(options)
            for block in options.blocks:
                genes = {name: value for name, value in self.spec_class.genes_of(block).items() if value is not None}
                held = {name: value for name, value in genes.items() if name not in leading}
                want = self.spec_class.block_from_genes(
                    {**genes, **{name: values[name] for name in held if name in values}}, self.network
                )
                if missing := [name for name in held if name not in values and self._varies(name)]:
                    raise SearchError(f"fixed.{missing[0]} is missing: the first stage must hold it")
                if want not in options.index:
                    raise SearchError(
                        f"the first stage's fixed values give blocks[{index}] {want.to_dict()}, "
                        "which is none of its options"
                    )
        return self.restrict(**{key_of(name): (value,) for name, value in values.items()})

    def _varies(self, gene: str) -> bool:
        return any(len(product.of(gene)) > 1 for choices in self.blocks for product in choices)

    def stage_two(self, winner: Spec) -> SearchSpace:
        """The second stage: each block has the winner's leading genes, and this space's choices of all other values.

        Raises:
            SearchError: if the winner has another depth, or a block does not allow its leading genes.
        """
        if winner.depth not in self.depths:
            raise SearchError(f"depth must be the space's {', '.join(map(str, self.depths))}, got {winner.depth}")
        genes = [self.spec_class.genes_of(block) for block in winner.blocks]
        leading = self.spec_class.leading_genes
        allowed = [{key_of(name): (own[name],) for name in leading if own[name] is not None} for own in genes]
        width = [winner.embed_dim] if len(self.embed_dims) > 1 else None
        return self._restrict(allowed, width, [winner.depth])


def _pick(rng: random.Random, values: Sequence[int]) -> int:
    """Pick a random value; a single one is picked without drawing."""
    return values[draw_below(rng, len(values))] if len(values) > 1 else values[0]


def _change(rng: random.Random, value: int, values: Sequence[int], prob: float, redraw: bool) -> int:
    """Change to another of the values with this probability, or to any of them with `redraw`."""
    if len(values) == 1 or rng.random() >= prob:
        return value
    return _pick(rng, values if redraw else [other for other in values if other != value])
