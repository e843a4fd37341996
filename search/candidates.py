"""What a search knows of the networks that it asked about: where they came from, what they cost, how good they are.

It orders and selects them; it proposes none.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

from glit_models.errors import SearchError
from glit_models.spec import GLiTSpec

__all__ = ["Candidate", "Candidates", "Origin"]

Origin = Literal["initial", "random", "mutation", "crossover"]


@final
@dataclass(frozen=True)
class Candidate:
    """A network that the search asked about.

    Attributes:
        spec: the network.
        generation: in which it was asked about, from 0.
        origin: how it was found.
        costs: what it costs, by the budgets' names.
        accuracy: what was told of it, None until then. Larger is better; any finite number will do.
    """

    spec: GLiTSpec
    generation: int
    origin: Origin
    costs: Mapping[str, float]
    accuracy: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in JSON."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, "spec": self.spec.to_dict(), "costs": dict(self.costs)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Candidate:
        """The inverse of `to_dict`. Raises SpecError, KeyError or TypeError on anything else."""
        return cls(**{**data, "spec": GLiTSpec.from_dict(data["spec"])})


@final
class Candidates:
    """Candidates in the order in which they were asked about, which also breaks every tie: the earlier is better."""

    def __init__(self, candidates: Iterable[Candidate] = ()) -> None:
        self._all: list[Candidate] = []
        self._index: dict[GLiTSpec, int] = {}
        for candidate in candidates:
            self.add(candidate)

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self._all)

    def __contains__(self, spec: GLiTSpec) -> bool:
        return spec in self._index

    def add(self, candidate: Candidate) -> None:
        """Take in a candidate whose network is not there yet."""
        self._index[candidate.spec] = len(self._all)
        self._all.append(candidate)

    def tell(self, spec: GLiTSpec, accuracy: float) -> Candidate:
        """Enter the accuracy of a network that was asked about, once.

        Raises:
            SearchError: if it was not asked about or its accuracy is known, or the number is not finite.
        """
        if spec not in self._index:
            raise SearchError(f"tell takes a network that was asked about, got {spec.to_json(indent=None)}")
        index = self._index[spec]
        known = self._all[index].accuracy
        if known is not None:
            raise SearchError(f"tell takes a network once, got {accuracy} where {known} is known: candidate {index}")
        if isinstance(accuracy, bool) or not isinstance(accuracy, (int, float)) or not math.isfinite(accuracy):
            raise SearchError(f"accuracy must be a finite number, got {accuracy!r} for candidate {index}")
        self._all[index] = dataclasses.replace(self._all[index], accuracy=accuracy)
        return self._all[index]

    def pending(self) -> list[GLiTSpec]:
        """The networks whose accuracy is not known yet."""
        return [candidate.spec for candidate in self._all if candidate.accuracy is None]

    def ranked(self) -> list[Candidate]:
        """Those with an accuracy, the best first."""
        known = [candidate for candidate in self._all if candidate.accuracy is not None]
        return sorted(known, key=_accuracy, reverse=True)  # stable: the earlier first where they are equal

    def front(self, cost: str) -> list[Candidate]:
        """Those that no other one beats in accuracy without costing more: cheapest, and worst, first.

        Raises:
            SearchError: if no budget is named so.
        """
        front: list[Candidate] = []
        ranked = self.ranked()
        if ranked and cost not in ranked[0].costs:
            raise SearchError(f"no budget is named {cost!r}; there are {', '.join(ranked[0].costs) or 'none'}")
        for candidate in sorted(ranked, key=lambda candidate: (-_accuracy(candidate), candidate.costs[cost])):
            if not front or candidate.costs[cost] < front[-1].costs[cost]:
                front.append(candidate)
        return front[::-1]


def _accuracy(candidate: Candidate) -> float:
    assert candidate.accuracy is not None
    return candidate.accuracy
