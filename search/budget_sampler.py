"""Random members of a space within budgets, exactly, however few of its members that are.

Costs are additive over blocks more often than not; then, for each width and depth, a dynamic programme over the blocks
counts the members at each cost, and draws among those within the budget. `budget` defines costs.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Sequence
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from glit_models import Spec
from glit_models.errors import SearchError

from .budget import Budget, excess_costs, show_cost
from .choices import UniformOver
from .space import SearchSpace
from .space_definition import Stratum

__all__ = ["BudgetSampler"]

_NUM_CELLS = 1 << 18  # of all grids, over all their axes: 2 MB for each block


@final
class _Axis:
    """One additive cost above the cheapest member's, in whole cells."""

    def __init__(self, excess: Sequence[Sequence[float]], low: float, high: float, num_cells: int) -> None:
        largest = math.fsum(map(max, excess))
        low, high = max(low, 0), min(high, largest)
        values = [value for costs in excess for value in costs]
        unit = math.gcd(*map(int, values)) if all(float(value).is_integer() for value in values) else 0
        if unit and high // unit < num_cells:  # every sum is a whole number of cells
            self._width: float = unit
            self.first, self.size = math.ceil(low / unit), int(high // unit) + 1
        else:
            # Each block's cost is rounded down by less than a cell. One cell more at either end is for float sums.
            self._width = (high / (num_cells - 2)) or 1
            self.first = max(math.floor(low / self._width) - len(excess) - 1, 0)
            self.size = math.floor(high / self._width) + 2
        self.cells = [[int(value // self._width) for value in costs] for costs in excess]


@final
class _Range:
    """What the members of one width and depth cost at least and at most, of one budget."""

    def __init__(self, budget: Budget, stratum: Stratum) -> None:
        self._excess = excess_costs(stratum, budget.name, budget.cost)
        self.least = budget.cost(stratum.member_at(costs.index(min(costs)) for costs in self._excess))
        self.largest = budget.cost(stratum.member_at(costs.index(max(costs)) for costs in self._excess))
        self._low = self.least if budget.low is None else budget.low
        self._high = self.largest if budget.high is None else budget.high

    @property
    def overlaps(self) -> bool:
        """Whether some of this range lies within the budget."""
        return self._low <= self.largest and self._high >= self.least

    def axis(self, num_cells: int) -> _Axis:
        """The costs within the budget, in cells."""
        return _Axis(self._excess, self._low - self.least, self._high - self.least, num_cells)


@final
class _Group:
    """Options of one block that lie in the same cells, by these cells: one row a group."""

    def __init__(self, options: Sequence[Any], weights: Sequence[int], cells: Sequence[Sequence[int]]) -> None:
        groups: dict[tuple[int, ...], list[int]] = {}
        for index in range(len(options)):
            groups.setdefault(tuple(axis[index] for axis in cells), []).append(index)
        self.cells = np.array(list(groups), dtype=np.int64).reshape(len(groups), len(cells))
        self.members = [[options[index] for index in indices] for indices in groups.values()]
        self.cumulative = [np.cumsum([float(weights[index]) for index in indices]) for indices in groups.values()]
        self.weights = np.array([cumulative[-1] for cumulative in self.cumulative])


def _draw(rng: random.Random, cumulative: NDArray[np.float64]) -> int:
    """An index with chances by cumulative weights, of which those that are 0 are never drawn."""
    index = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
    return int(min(index, np.searchsorted(cumulative, cumulative[-1])))


@final
class _Grid:
    """All members of one width and depth by the cells of their costs: how many, and draws within the limits.

    Counts are float64, which adds them up to about 1e-13 of their value: far below what any number of draws shows.
    """

    def __init__(self, stratum: Stratum, axes: Sequence[_Axis], uniform_over: UniformOver) -> None:
        self._stratum = stratum
        self._first = tuple(axis.first for axis in axes)
        self._shape = tuple(axis.size for axis in axes)
        self._groups = []
        for place, options in enumerate(stratum.options):
            weights = options.counts if uniform_over == "choices" else [1] * len(options.blocks)
            self._groups.append(_Group(options.blocks, weights, [axis.cells[place] for axis in axes]))
        self._ways = self._count_ways()
        self._cumulative = np.cumsum(self._ways[0][tuple(slice(first, None) for first in self._first)])
        within = float(self._cumulative[-1]) if self._cumulative.size else 0.0
        # Of choices, each width and depth is as likely as any other before the budget, however many members it has.
        self.weight = within / float(stratum.raw_size) if uniform_over == "choices" else within

    def _count_ways(self) -> list[NDArray[np.float64]]:
        """For each block and each cell, in how many ways the blocks from it on cost so much."""
        last = np.zeros(self._shape)
        last[(0,) * len(self._shape)] = 1
        ways = [last]
        for group in reversed(self._groups):
            total = np.zeros(self._shape)
            for cells, weight in zip(group.cells.tolist(), group.weights, strict=True):
                if all(cell < size for cell, size in zip(cells, self._shape, strict=True)):
                    to = tuple(slice(cell, None) for cell in cells)
                    total[to] += weight * ways[-1][tuple(slice(None, -cell or None) for cell in cells)]
            ways.append(total)
        return ways[::-1]

    def draw(self, rng: random.Random) -> Spec:
        """A member in these cells, each as likely as its weight says."""
        window = tuple(size - first for size, first in zip(self._shape, self._first, strict=True))
        left = np.array(np.unravel_index(_draw(rng, self._cumulative), window)) + self._first
        blocks = []
        for group, ways in zip(self._groups, self._ways[1:], strict=True):
            rest = left - group.cells
            fits = np.all(rest >= 0, axis=1)
            counts = ways[tuple(np.where(fits[:, None], rest, 0).T)]
            index = _draw(rng, np.cumsum(np.where(fits, group.weights * counts, 0)))
            blocks.append(group.members[index][_draw(rng, group.cumulative[index])])
            left = rest[index]
        return self._stratum.spec(blocks)


@final
class BudgetSampler:
    """Random members of a space within all of some budgets: exactly uniform, and at most `max_draws` tries for each.

    Tries are drawn uniformly from a set that holds every member within the additive budgets and few others; those
    outside, or outside a budget that is not additive, are thrown away. Without a budget it is `SearchSpace.sample`.

    Raises:
        SearchError: if no member meets an additive budget, or all of these together; names the smallest and the
            largest cost that can be reached.
    """

    def __init__(
        self,
        space: SearchSpace,
        budgets: Sequence[Budget] = (),
        uniform_over: UniformOver = "choices",
        max_draws: int = 1000,
    ) -> None:
        self.space, self.budgets, self.max_draws = space, tuple(budgets), max_draws
        self._uniform_over = uniform_over
        names = [budget.name for budget in self.budgets]
        if len(set(names)) < len(names):
            raise SearchError(f"budgets must have names of their own, got {', '.join(names)}")
        # Cheap and sure costs first: a measured one is asked only about networks that meet all others.
        self._order = sorted(self.budgets, key=lambda budget: not budget.additive)
        self._reachable: dict[str, tuple[float, float]] = {}
        self._grids = self._make_grids([budget for budget in self.budgets if budget.additive and budget.bounded])
        self._cumulative = list(itertools.accumulate(grid.weight for grid in self._grids))

    def _make_grids(self, budgets: Sequence[Budget]) -> list[_Grid]:
        """One for each width and depth that has members within the budgets; none without budgets."""
        if not budgets:
            return []
        ranges = {stratum: [_Range(budget, stratum) for budget in budgets] for stratum in self.space.strata}
        for place, budget in enumerate(budgets):
            least = min(of_budget[place].least for of_budget in ranges.values())
            largest = max(of_budget[place].largest for of_budget in ranges.values())
            self._reachable[budget.name] = (least, largest)
            if (budget.low is not None and budget.low > largest) or (budget.high is not None and budget.high < least):
                raise SearchError(f"no member of the space has {self.describe([budget])}")
        num_cells = round((_NUM_CELLS / len(ranges)) ** (1 / len(budgets)))
        grids = [
            _Grid(stratum, [one.axis(num_cells) for one in of_budget], self._uniform_over)
            for stratum, of_budget in ranges.items()
            if all(one.overlaps for one in of_budget)
        ]
        grids = [grid for grid in grids if grid.weight > 0]
        if not grids:
            raise SearchError(f"no member of the space has {self.describe(budgets)}")
        return grids

    def _draw(self, rng: random.Random) -> Spec:
        """A member that may lie within the budgets, each of those that do as likely as any other."""
        if not self._grids:
            return self.space.sample(rng, self._uniform_over)
        if len(self._grids) == 1:
            return self._grids[0].draw(rng)
        return self._grids[_draw(rng, np.array(self._cumulative))].draw(rng)

    @property
    def exact(self) -> bool:
        """Whether every budget that keeps networks out is additive, so that none is found by mere trying."""
        return all(budget.additive for budget in self.budgets if budget.bounded)

    def describe(self, budgets: Iterable[Budget] | None = None) -> str:
        """The budgets, all unless some are given, each with what can be reached, as far as that is known."""
        texts = []
        for budget in (budget for budget in budgets or self.budgets if budget.bounded):
            texts.append(str(budget))
            if budget.name in self._reachable:
                least, largest = map(show_cost, self._reachable[budget.name])
                texts[-1] += f" ({least} to {largest} {'is' if budget.additive else 'was seen to be'} reachable)"
        return " and ".join(texts)

    def within(self, spec: Spec) -> dict[str, float] | None:
        """The costs of a spec by name, in the order of the budgets, or None as soon as one is outside its budget."""
        costs = {}
        for budget in self._order:
            cost = costs[budget.name] = budget.cost(spec)
            if not budget.additive:
                least, largest = self._reachable.get(budget.name, (cost, cost))
                self._reachable[budget.name] = (min(least, cost), max(largest, cost))
            if not budget.admits(cost):
                return None
        return {budget.name: costs[budget.name] for budget in self.budgets}

    def sample(self, rng: random.Random) -> tuple[Spec, dict[str, float]]:
        """A random member within the budgets, and its costs.

        Raises:
            SearchError: if `max_draws` draws found none; names each budget and what can be reached.
        """
        for _ in range(self.max_draws):
            spec = self._draw(rng)
            if (costs := self.within(spec)) is not None:
                return spec, costs
        raise SearchError(f"{self.max_draws} draws found no member of the space that has {self.describe()}")
