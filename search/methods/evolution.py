"""Search methods, which choose the networks to evaluate: evolutions, and random search as a baseline.

`ask_tell` defines their interface and state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, final

from glit_models import Spec
from glit_models.errors import SearchError
from glit_models.extensions import Table

from ..spaces.choices import draw_below
from .ask_tell import Search

__all__ = ["METHODS", "AutoFormerEvolution", "Evolution", "HierarchicalEvolution", "RandomSearch", "SposEvolution"]

_TRIES = 50  # to find a pair of parents of equal depth


@final
class RandomSearch(Search):
    """Random networks within the budgets: the baseline for all other methods."""

    method = "random"
    stage_work = 2
    uses_surrogate = False
    description = "Random search: the whole space at once, each candidate drawn at random."

    def propose(self) -> None:
        """Propose random networks."""
        self.add_random()


class Evolution(Search):
    """SPOS's evolution (arXiv 1904.00420, algorithm 1): mutations and crossovers of the best networks so far."""

    method = "evolution"
    description = "Evolution in the whole space at once, from mutations and crossovers of the best networks."

    def propose(self) -> None:
        """Propose children of the best networks, and random networks."""
        if self.candidates:
            parents = self.parents()
            mutate, cross = self._mutation_of(parents), self._crossover_of(parents)
            self.add_children("mutation", self.config.num_mutation, mutate)
            missing = self.add_children("crossover", self.config.num_crossover, cross)
            self.add_children("mutation", missing, mutate)
        self.add_random()

    def parents(self) -> Sequence[Spec]:
        """The parents of the next networks."""
        return [candidate.spec for candidate in self.top(self.config.num_parents)]

    def pick(self, specs: Sequence[Spec]) -> Spec:
        """Pick one of these parents, at random."""
        return specs[draw_below(self.rng, len(specs))]

    def _mutation_of(self, parents: Sequence[Spec]) -> Callable[[], Spec]:
        num_blocks = self.config.mutated_blocks
        if num_blocks is None:
            return lambda: self.space.mutate(self.pick(parents), self.config.mutation_prob, self.rng)
        return lambda: self.space.redraw_blocks(self.pick(parents), num_blocks, self.rng)

    def _crossover_of(self, parents: Sequence[Spec]) -> Callable[[], Spec]:
        def make() -> Spec:
            a = self.pick(parents)
            others = [spec for spec in parents if spec.depth == a.depth and spec != a]
            return self.space.crossover(a, self.pick(others), self.rng) if others else a  # `a` is not new

        return make


@final
class SposEvolution(Evolution):
    """`Evolution` with the epochs, generations and retrained networks of both stages of `HierarchicalEvolution`."""

    stage_work: ClassVar[int] = 2
    description = "Single Path One-Shot: heads and sizes at once, by evolution."


@final
class HierarchicalEvolution(Evolution):
    """GLiT's search (arXiv 2107.02960, section 3.3): `Evolution` of the leading genes, then of all others."""

    stages: ClassVar[tuple[str, ...]] = ("stage1", "stage2")
    description = (
        "Hierarchical search, as GLiT's: stage 1 decides which heads are global and which local, stage 2 the sizes "
        "within the blocks."
    )


@final
class AutoFormerEvolution(Evolution):
    """AutoFormer's evolution (arXiv 2107.00651, section 3.3, and the authors' code).

    A mutation redraws the depth with probability `depth_prob`, then each gene of each block with `mutation_prob`, then
    the width with `width_prob`; a redrawn value may be unchanged. Parents of a crossover are drawn until their depths
    are equal, at most 50 times.
    """

    method = "autoformer"
    description = "AutoFormer's evolution: depth and width change with separate probabilities."

    def _mutation_of(self, parents: Sequence[Spec]) -> Callable[[], Spec]:
        config = self.config
        return lambda: self.space.mutate(
            self.pick(parents), config.mutation_prob, self.rng, config.depth_prob, config.width_prob, redraw=True
        )

    def _crossover_of(self, parents: Sequence[Spec]) -> Callable[[], Spec]:
        def make() -> Spec:
            a, b = self.pick(parents), self.pick(parents)
            for _ in range(_TRIES):
                if a.depth == b.depth:
                    break
                a, b = self.pick(parents), self.pick(parents)
            return self.space.crossover(a, b if a.depth == b.depth else a, self.rng)

        return make


METHODS: Table[type[Search]] = Table("search method", Search, SearchError)
"""The values of `method` in a search recipe, by name."""
for _name, _method in (
    ("hierarchical", HierarchicalEvolution),
    ("spos", SposEvolution),
    ("random", RandomSearch),
    ("evolution", Evolution),
    ("autoformer", AutoFormerEvolution),
):
    METHODS.register(_name, _method)
