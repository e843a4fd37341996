"""Draw random members of a space within budgets, exactly, even if very few members are.

Most costs are additive over blocks; then, for each width and depth, a dynamic programme over the blocks counts the
members at each cost, and draws among those within the budget. `budget` defines costs.
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
from .definition import Stratum
from .space import SearchSpace

__all__ = ["BudgetSampler"]

_NUM_CELLS = 1 << 18  # of all grids, over all their axes: 2 MB per block


@final
class _Axis:
    """An additive cost relative to the cheapest member's, in whole cells."""

    def __init__(self, excess: Sequence[Sequence[float]], low: float, high: float, num_cells: int) -> None:
        largest = math.fsum(map(max, excess))
        low, high = max(low, 0), min(high, largest)
        values = [value for costs in excess for value in costs]
        unit = math.gcd(*map(int, values)) if all(float(value).is_integer() for value in values) else 0
        if unit and high // unit < num_cells:  # every sum is a whole number of cells
            self._width: float = unit
            self.first, self.size = math.ceil(low / unit), int(high // unit) + 1
        else:
            # Each block's cost is rounded down by less than a cell. One more cell at either end is for float sums.
            self._width = (high / (num_cells - 2)) or 1
            self.first = max(math.floor(low / self._width) - len(excess) - 1, 0)
            self.size = math.floor(high / self._width) + 2
        self.cells = [[int(value // self._width) for value in costs] for costs in excess]


@final
class _Range:
    """The minimum and maximum cost of the members of one width and depth, for one budget."""

    def __init__(self, budget: Budget, stratum: Stratum) -> None:
        self._excess = excess_costs(stratum, budget.name, budget.cost)
        self.least = budget.cost(stratum.member_at(costs.index(min(costs)) for costs in self._excess))
        self.largest = budget.cost(stratum.member_at(costs.index(max(costs)) for costs in self._excess))
        self._low = self.least if budget.low is None else budget.low
        self._high = self.largest if budget.high is None else budget.high

    @property
    def overlaps(self) -> bool:
        """Whether part of this range is within the budget."""
        return self._low <= self.largest and self._high >= self.least

    def axis(self, num_cells: int) -> _Axis:
        """The costs within the budget, in cells."""
        return _Axis(self._excess, self._low - self.least, self._high - self.least, num_cells)


@final
class _Group:
    """Options of one block in the same cells, by these cells: one row per group."""

    def __init__(self, options: Sequence[Any], weights: Sequence[float], cells: Sequence[Sequence[int]]) -> None:
        groups: dict[tuple[int, ...], list[int]] = {}
        for index in range(len(options)):
            groups.setdefault(tuple(axis[index] for axis in cells), []).append(index)
        self.cells = np.array(list(groups), dtype=np.int64).reshape(len(groups), len(cells))
        self.members = [[options[index] for index in indices] for indices in groups.values()]
        self.cumulative = [np.cumsum([float(weights[index]) for index in indices]) for indices in groups.values()]
        self.weights = np.array([cumulative[-1] for cumulative in self.cumulative])


def _draw(rng: random.Random, cumulative: NDArray[np.float64]) -> int:
    """Draw an index with probabilities given by cumulative weights; zero weights are never drawn."""
    index = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
    return int(min(index, np.searchsorted(cumulative, cumulative[-1])))


@final
class _Grid:
    """All members of one width and depth by the cells of their costs: their number, and draws within the limits.

    Counts are float64, which adds them up to about 1e-13 of their value: too little to affect any number of draws.
    """

    def __init__(self, stratum: Stratum, axes: Sequence[_Axis], uniform_over: UniformOver) -> None:
        self._stratum = stratum
        self._first = tuple(axis.first for axis in axes)
        self._shape = tuple(axis.size for axis in axes)
        self._groups = []
        for place, options in enumerate(stratum.options):
            weights = options.weights(uniform_over)
            self._groups.append(_Group(options.blocks, weights, [axis.cells[place] for axis in axes]))
        self._ways = self._count_ways()
        self._cumulative = np.cumsum(self._ways[0][tuple(slice(first, None) for first in self._first)])
        within = float(self._cumulative[-1]) if self._cumulative.size else 0.0
        # Except with 'members', all widths and depths have the same probability before the budget, whatever their size.
        whole = 1 if uniform_over == "members" else math.prod(sum(o.weights(uniform_over)) for o in stratum.options)
        self.weight = within / float(whole)

    def _count_ways(self) -> list[NDArray[np.float64]]:
        """For each block and each cell, the number of ways in which the blocks from it on cost this much."""
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
        """Draw a member in these cells, with probability proportional to its weight."""
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
    """Draws random members of a space within all of some budgets: exactly uniform, with at most `max_draws` tries each.

    Tries are drawn uniformly from a set of all members within the additive budgets and few others; those outside, or
    outside a budget that is not additive, are rejected. Without a budget it is `SearchSpace.sample`.

    Raises:
        SearchError: if no member meets an additive budget, or all of these together; names the smallest and the
            largest reachable cost.
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
        # Cheap and exact costs first: a measured one is only evaluated for networks that meet all others.
        self._order = sorted(self.budgets, key=lambda budget: not budget.additive)
        self._reachable: dict[str, tuple[float, float]] = {}
        self._grids = self._make_grids([budget for budget in self.budgets if budget.additive and budget.bounded])
        self._cumulative = list(itertools.accumulate(grid.weight for grid in self._grids))

    def _make_grids(self, budgets: Sequence[Budget]) -> list[_Grid]:
        """One grid for each width and depth that has members within the budgets; none without budgets."""
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
        """Draw a member that may be within the budgets; all members within them are equally likely."""
        if not self._grids:
            return self.space.sample(rng, self._uniform_over)
        if len(self._grids) == 1:
            return self._grids[0].draw(rng)
        return self._grids[_draw(rng, np.array(self._cumulative))].draw(rng)

    @property
    def exact(self) -> bool:
        """Whether all budgets with bounds are additive, so that no member has to be found by rejection only."""
        return all(budget.additive for budget in self.budgets if budget.bounded)

    def describe(self, budgets: Iterable[Budget] | None = None) -> str:
        """Describe the budgets, by default all, each with the reachable costs if they are known."""
        texts = []
        for budget in (budget for budget in budgets or self.budgets if budget.bounded):
            texts.append(str(budget))
            if budget.name in self._reachable:
                least, largest = map(show_cost, self._reachable[budget.name])
                texts[-1] += f" ({least} to {largest} {'is' if budget.additive else 'was seen to be'} reachable)"
        return " and ".join(texts)

    def within(self, spec: Spec) -> dict[str, float] | None:
        """The costs of a spec by name, in the order of the budgets, or None at the first one outside its budget."""
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
        """Draw a random member within the budgets; returns it with its costs.

        Raises:
            SearchError: if `max_draws` draws found none; names each budget and the reachable costs.
        """
        for _ in range(self.max_draws):
            spec = self._draw(rng)
            if (costs := self.within(spec)) is not None:
                return spec, costs
        raise SearchError(f"{self.max_draws} draws found no member of the space that has {self.describe()}")
