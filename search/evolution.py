"""Which networks to evaluate next: evolution, and random search to compare it with, over any space.

How a search is asked, told, saved and taken up again is in `ask_tell`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import final

from glit_models.spec import GLiTSpec

from .ask_tell import DRAWS_PER_CANDIDATE, Search
from .candidates import Candidate, Origin
from .choices import draw_below

__all__ = ["SEARCHES", "Evolution", "RandomSearch"]


@final
class RandomSearch(Search):
    """Random networks within the budgets: what any other method must beat."""

    method = "random"

    def _propose(self, new: dict[GLiTSpec, Candidate]) -> None:
        if not len(self._candidates):
            self._add_initial(new)
        self._add_random(new)


@final
class Evolution(Search):
    """SPOS's evolution (arXiv 1904.00420, algorithm 1): mutations and crossovers of the best networks so far."""

    method = "evolution"

    def _propose(self, new: dict[GLiTSpec, Candidate]) -> None:
        if not len(self._candidates):
            self._add_initial(new)
        else:
            parents = [candidate.spec for candidate in self.top(self.config.num_parents)]
            self._add_children(new, "mutation", self.config.num_mutation, partial(self._mutate, parents))
            self._add_children(new, "crossover", self.config.num_crossover, partial(self._cross, parents))
        self._add_random(new)

    def _mutate(self, parents: Sequence[GLiTSpec]) -> GLiTSpec:
        parent = parents[draw_below(self._rng, len(parents))]
        return self.space.mutate(parent, self.config.mutation_prob, self._rng)

    def _cross(self, parents: Sequence[GLiTSpec]) -> GLiTSpec:
        a, b = (parents[draw_below(self._rng, len(parents))] for _ in range(2))
        return self.space.crossover(a, b, self._rng)

    def _add_children(
        self, new: dict[GLiTSpec, Candidate], origin: Origin, count: int, make: Callable[[], GLiTSpec]
    ) -> None:
        """Up to `count` children within the budgets that are not known yet, in a bounded number of draws."""
        wanted = len(new) + count
        for _ in range(DRAWS_PER_CANDIDATE * count):
            if len(new) == wanted:
                break
            spec = make()
            if self._is_new(spec, new) and (costs := self._sampler.within(spec)) is not None:
                self._add(new, spec, origin, costs)


SEARCHES: dict[str, type[Search]] = {search.method: search for search in (Evolution, RandomSearch)}
