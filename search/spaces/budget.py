"""Budgets of costs, and the smallest and largest cost of a space's members.

A cost is any function from a spec to a number. If it is additive over blocks, its extremes are computed exactly.
`budget_sampler` draws networks within a budget.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import final

from glit_models import Spec
from glit_models.cost import count_macs, count_params
from glit_models.errors import SearchError

from .choices import draw_below
from .definition import Stratum
from .space import SearchSpace

__all__ = ["Budget", "excess_costs", "extremes", "macs_budget", "params_budget", "show_cost"]

Cost = Callable[[Spec], float]


def show_cost(cost: float) -> str:
    """Format a cost for a message, with thousands separators and significant digits only."""
    return f"{cost:,.12g}"


@final
@dataclass(frozen=True)
class Budget:
    """A range of a cost, from `low` to `high` inclusive; without bounds the cost is only recorded.

    Attributes:
        name: name of the cost, in records and messages.
        cost: maps a spec to its cost: the same number every time, or a search cannot be repeated. It is called often,
            so it should cache measurements.
        low: minimum allowed cost.
        high: maximum allowed cost.
        additive: whether, among networks of one width and depth, the cost is a constant plus one number per block that
            depends only on that block. Random members within the budget are then drawn directly, not by rejection.

    Raises:
        SearchError: if `low` or `high` is not finite, or `low` is above `high`.
    """

    name: str
    cost: Cost
    low: float | None = None
    high: float | None = None
    additive: bool = False

    def __post_init__(self) -> None:
        for key, value in (("low", self.low), ("high", self.high)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and math.isfinite(value)):
                raise SearchError(f"budget {self.name}.{key} must be a finite number or null, got {value!r}")
        if self.low is not None and self.high is not None and self.low > self.high:
            low, high = show_cost(self.low), show_cost(self.high)
            raise SearchError(f"budget {self.name}.low must be at most high={high}, got {low}")

    @property
    def bounded(self) -> bool:
        """Whether it has a bound."""
        return self.low is not None or self.high is not None

    def admits(self, cost: float) -> bool:
        """Whether a cost is within the bounds."""
        return (self.low is None or cost >= self.low) and (self.high is None or cost <= self.high)

    def __str__(self) -> str:
        low, high = ("" if bound is None else show_cost(bound) for bound in (self.low, self.high))
        if low and high:
            return f"{self.name} from {low} to {high}"
        return f"{self.name} of at least {low}" if low else f"{self.name} of at most {high}" if high else self.name


def macs_budget(
    low: float | None = None,
    high: float | None = None,
    img_size: int | tuple[int, int] = 224,
    num_classes: int = 1000,
    in_chans: int = 3,
) -> Budget:
    """A budget of multiply-adds for one image, as counted by `count_macs`."""
    cost = partial(count_macs, img_size=img_size, num_classes=num_classes, in_chans=in_chans)
    return Budget("macs", cost, low, high, additive=True)


def params_budget(
    low: float | None = None,
    high: float | None = None,
    img_size: int | tuple[int, int] = 224,
    num_classes: int = 1000,
    in_chans: int = 3,
) -> Budget:
    """A budget of trainable parameters, as counted by `count_params`."""
    cost = partial(count_params, img_size=img_size, num_classes=num_classes, in_chans=in_chans)
    return Budget("params", cost, low, high, additive=True)


def extremes(space: SearchSpace, cost: Cost) -> tuple[Spec, Spec]:
    """The cheapest and the most expensive member under a cost that is additive over blocks, exactly.

    Raises:
        SearchError: if the cost is found not to be additive.
    """
    members = []
    for stratum in space.strata:
        excess = excess_costs(stratum, "cost", cost)
        members += [stratum.member_at(costs.index(choose(costs)) for costs in excess) for choose in (min, max)]
    return min(members, key=cost), max(members, key=cost)


def excess_costs(stratum: Stratum, name: str, cost: Cost) -> list[list[float]]:
    """For each option of each block, its extra cost over the block's cheapest, found by exchanging single blocks.

    Raises:
        SearchError: if the cost of a few members differs from the sum over their blocks.
    """
    first = stratum.member_at([0] * stratum.depth)
    base = cost(first)
    added: list[list[float]] = []
    for index, options in enumerate(stratum.options):
        before, after = first.blocks[:index], first.blocks[index + 1 :]
        added.append([cost(stratum.spec((*before, option, *after))) - base for option in options.blocks])
    rng = random.Random(0)
    for _ in range(8):
        indices = [draw_below(rng, len(costs)) for costs in added]
        expected = base + sum(costs[index] for costs, index in zip(added, indices, strict=True))
        if not math.isclose(cost(stratum.member_at(indices)), expected, rel_tol=1e-9):
            raise SearchError(f"{name} is not additive over blocks: a member costs something else than its blocks do")
    cheapest = map(min, added)
    return [[value - least for value in costs] for costs, least in zip(added, cheapest, strict=True)]
