"""What a search knows of the networks that it asked about: where they came from, what they cost, how good they are.

It orders and selects them; it proposes none.
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
    """A network that the search asked about.

    Attributes:
        spec: the network.
        generation: in which it was asked about, from 0.
        origin: how it was found: 'initial', 'random', 'mutation', 'crossover', or what a method calls it.
        costs: what it costs, by the budgets' names.
        fitness: what was told of it, None until then. Larger is better; any finite number will do.
    """

    spec: Spec
    generation: int
    origin: str
    costs: Mapping[str, float]
    fitness: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in JSON."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, "spec": self.spec.to_dict(), "costs": dict(self.costs)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Candidate:
        """The inverse of `to_dict`. Raises SpecError, KeyError or TypeError on anything else."""
        fields = {_FIELDS_OF_0_1.get(name, name): value for name, value in data.items()}
        return cls(**{**fields, "spec": parse_spec(data["spec"])})


@final
class Candidates:
    """Candidates in the order in which they were asked about, which also breaks every tie: the earlier is better."""

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
        """Take in a candidate whose network is not there yet."""
        self._index[candidate.spec] = len(self._all)
        self._all.append(candidate)

    def tell(self, spec: Spec, fitness: float) -> Candidate:
        """Enter the fitness of a network that was asked about, once.

        Raises:
            SearchError: if it was not asked about or its fitness is known, or the number is not finite.
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
        """The networks whose fitness is not known yet."""
        return [candidate.spec for candidate in self._all if candidate.fitness is None]

    def ranked(self) -> list[Candidate]:
        """Those with a fitness, the best first."""
        known = [candidate for candidate in self._all if candidate.fitness is not None]
        return sorted(known, key=_fitness, reverse=True)  # stable: the earlier first where they are equal

    def front(self, cost: str) -> list[Candidate]:
        """Those that no other one beats in fitness without costing more: cheapest, and worst, first.

        Raises:
            SearchError: if no budget is named so.
        """
        ranked = self.ranked()
        if ranked and cost not in ranked[0].costs:
            raise SearchError(f"no budget is named {cost!r}; there are {', '.join(ranked[0].costs) or 'none'}")
        return pareto_front(ranked, _fitness, lambda candidate: candidate.costs[cost])


T = TypeVar("T")


def pareto_front(items: Iterable[T], quality: Callable[[T], float], cost: Callable[[T], float]) -> list[T]:
    """Those that no other one beats in quality without costing more: cheapest, and worst, first."""
    front: list[T] = []
    for item in sorted(items, key=lambda item: (-quality(item), cost(item))):
        if not front or cost(item) < cost(front[-1]):
            front.append(item)
    return front[::-1]


def _fitness(candidate: Candidate) -> float:
    assert candidate.fitness is not None
    return candidate.fitness
