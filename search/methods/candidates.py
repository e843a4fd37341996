"""The evaluated networks of a search, with their origin, costs and fitness.

This module orders and selects them; it proposes none.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, final

from glit_models import Spec, parse_spec
from glit_models.errors import SearchError

__all__ = ["Candidate", "Candidates", "pareto_front"]


_FIELDS_OF_0_1 = {"accuracy": "fitness"}


@final
@dataclass(frozen=True)
class Candidate:
    """A network that the search asked for.

    Attributes:
        spec: the network.
        generation: generation in which it was asked for, from 0.
        origin: how it was found: 'initial', 'random', 'mutation', 'crossover', or a method's name for it.
        costs: its costs, by the budgets' names.
        fitness: its fitness, None until it is told. Any finite number; larger is better.
    """

    spec: Spec
    generation: int
    origin: str
    costs: Mapping[str, float]
    fitness: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in JSON."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, "spec": self.spec.to_dict(), "costs": dict(self.costs)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Candidate:
        """The inverse of `to_dict`. Raises SpecError, KeyError or TypeError on anything else."""
        fields = {_FIELDS_OF_0_1.get(name, name): value for name, value in data.items()}
        return cls(**{**fields, "spec": parse_spec(data["spec"])})


@final
class Candidates:
    """Candidates in the order in which they were asked for, which also breaks ties: the earlier is better."""

    def __init__(self, candidates: Iterable[Candidate] = ()) -> None:
        self._all: list[Candidate] = []
        self._index: dict[Spec, int] = {}
        for candidate in candidates:
            self.add(candidate)

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self._all)

    def __contains__(self, spec: Spec) -> bool:
        return spec in self._index

    def add(self, candidate: Candidate) -> None:
        """Add a candidate whose network is new."""
        self._index[candidate.spec] = len(self._all)
        self._all.append(candidate)

    def tell(self, spec: Spec, fitness: float) -> Candidate:
        """Set the fitness of a network that was asked for, once.

        Raises:
            SearchError: if it was not asked for or its fitness is known, or the number is not finite.
        """
        if spec not in self._index:
            raise SearchError(f"tell takes a network that was asked about, got {spec.to_json(indent=None)}")
        index = self._index[spec]
        known = self._all[index].fitness
        if known is not None:
            raise SearchError(f"tell takes a network once, got {fitness} where {known} is known: candidate {index}")
        if isinstance(fitness, bool) or not isinstance(fitness, (int, float)) or not math.isfinite(fitness):
            raise SearchError(f"fitness must be a finite number, got {fitness!r} for candidate {index}")
        self._all[index] = dataclasses.replace(self._all[index], fitness=fitness)
        return self._all[index]

    def pending(self) -> list[Spec]:
        """The networks without a fitness so far."""
        return [candidate.spec for candidate in self._all if candidate.fitness is None]

    def ranked(self) -> list[Candidate]:
        """The candidates with a fitness, best first."""
        known = [candidate for candidate in self._all if candidate.fitness is not None]
        return sorted(known, key=_fitness, reverse=True)  # stable: the earlier of equals first

    def front(self, cost: str) -> list[Candidate]:
        """The Pareto front of fitness and a cost, from the cheapest (and worst) to the best.

        Raises:
            SearchError: if there is no budget of this name.
        """
        ranked = self.ranked()
        if ranked and cost not in ranked[0].costs:
            raise SearchError(f"no budget is named {cost!r}; there are {', '.join(ranked[0].costs) or 'none'}")
        return pareto_front(ranked, _fitness, lambda candidate: candidate.costs[cost])


T = TypeVar("T")


def pareto_front(items: Iterable[T], quality: Callable[[T], float], cost: Callable[[T], float]) -> list[T]:
    """The Pareto front of quality and cost, from the cheapest (and worst) to the best."""
    front: list[T] = []
    for item in sorted(items, key=lambda item: (-quality(item), cost(item))):
        if not front or cost(item) < cost(front[-1]):
            front.append(item)
    return front[::-1]


def _fitness(candidate: Candidate) -> float:
    assert candidate.fitness is not None
    return candidate.fitness
