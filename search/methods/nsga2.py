"""NSGA-II: evolve a whole front, from cheap to accurate networks, instead of a single network.

K. Deb et al., A fast and elitist multiobjective genetic algorithm: NSGA-II, IEEE Transactions on Evolutionary
Computation 6 (2), 2002, section III.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, final

import numpy as np
from numpy.typing import NDArray

from glit_models import Spec
from glit_models.errors import SearchError

from ..spaces.choices import draw_below
from .candidates import Candidate
from .evolution import METHODS, Evolution

__all__ = ["Nsga2", "crowding_distances", "front_ranks"]

Points = NDArray[np.float64]  # [n, objectives], each to be minimised


def front_ranks(points: Points) -> NDArray[np.int64]:
    """Rank of each point [n]: 0 if no other one dominates it, 1 if only points of rank 0 do, and so on.

    points: [n, objectives], each to be minimised. A point dominates another if it is better in some objective and
        worse in none.
    """
    ranks, left, rank = np.zeros(len(points), dtype=np.int64), np.arange(len(points)), 0
    while len(left):
        values = points[left]
        no_worse = np.all(values[:, None] <= values[None], axis=-1)
        better = np.any(values[:, None] < values[None], axis=-1)
        is_dominated = np.any(no_worse & better, axis=0)
        ranks[left[~is_dominated]] = rank
        left, rank = left[is_dominated], rank + 1
    return ranks


def crowding_distances(points: Points) -> NDArray[np.float64]:
    """The distance between each point's neighbours in a front [n], summed over objectives scaled to their ranges.

    Points at the ends of an objective have an infinite distance.
    """
    distances = np.zeros(len(points))
    for values in points.T:
        order = np.argsort(values, kind="stable")
        spread = values[order[-1]] - values[order[0]]
        distances[order[[0, -1]]] = np.inf
        if spread > 0:
            distances[order[1:-1]] += (values[order[2:]] - values[order[:-2]]) / spread
    return distances


@final
class Nsga2(Evolution):
    """Evolution towards the Pareto front of fitness against one or more costs, `objectives`.

    The survivors are the best of all networks so far, as many as a generation has: by rank of their front, then by
    crowding distance. Parents are drawn from them by binary tournaments. Children, duplicates and budgets are as in
    `Evolution`.
    """

    method = "nsga2"
    seeks_front: ClassVar[bool] = True
    uses_surrogate: ClassVar[bool] = False
    description = "NSGA-II: one evolution of a whole front, from cheap networks to accurate ones."

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        costs = [budget.name for budget in self._sampler.budgets]
        for name in self.config.objectives:
            if name not in costs:
                raise SearchError(f"objectives must be among {', '.join(costs) or 'the budgets'}, got {name!r}")
        self._survivors: list[Spec] = []
        self._quality: dict[Spec, tuple[int, float]] = {}

    def propose(self) -> None:
        """Propose children of the survivors, and random networks."""
        self._select()
        super().propose()

    def _points(self, candidates: Sequence[Candidate]) -> Points:
        rows = [[-(c.fitness or 0.0), *(c.costs[name] for name in self.config.objectives)] for c in candidates]
        return np.array(rows, dtype=np.float64).reshape(len(rows), 1 + len(self.config.objectives))

    def _select(self) -> None:
        """Compute the survivors and their order; smaller is better."""
        scored = [candidate for candidate in self.candidates if candidate.fitness is not None]
        points = self._points(scored)
        ranks, crowding = front_ranks(points), np.zeros(len(points))
        for rank in np.unique(ranks):
            crowding[ranks == rank] = crowding_distances(points[ranks == rank])
        keys = sorted(zip(ranks.tolist(), (-crowding).tolist(), range(len(scored)), strict=True))
        self._quality = {scored[i].spec: (rank, distance) for rank, distance, i in keys[: self.config.population]}
        self._survivors = list(self._quality)

    def parents(self) -> Sequence[Spec]:
        """The survivors, which are the parents."""
        return self._survivors

    def pick(self, specs: Sequence[Spec]) -> Spec:
        """Pick the better of two random parents."""
        a, b = (specs[draw_below(self.rng, len(specs))] for _ in range(2))
        return min(a, b, key=self._quality.__getitem__)

    def finalists(self, candidates: Sequence[Candidate], count: int) -> list[Candidate]:
        """Networks of the front, evenly spaced along it from the most accurate to the cheapest."""
        front = [c for c, rank in zip(candidates, front_ranks(self._points(candidates)), strict=True) if not rank]
        front.sort(key=lambda candidate: candidate.fitness or 0.0, reverse=True)
        places = np.linspace(0, len(front) - 1, min(count, len(front))).round().astype(int)
        return [front[place] for place in places]


METHODS.register("nsga2", Nsga2)
