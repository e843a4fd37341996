"""What a network may cost, and what the members of a space do cost at least and at most.

A cost is any function from a spec to a number. Of one that is additive over blocks everything can be known without
trying. Drawing networks within a budget is done by `budget_sampler`.
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
from .space import SearchSpace
from .space_definition import Stratum

__all__ = ["Budget", "excess_costs", "extremes", "macs_budget", "params_budget", "show_cost"]

Cost = Callable[[Spec], float]


def show_cost(cost: float) -> str:
    """A cost for a message: digits in threes, as many as matter."""
    return f"{cost:,.12g}"


@final
@dataclass(frozen=True)
class Budget:
    """What a network may cost, from `low` to `high`, both included; without either it is only recorded.

    Attributes:
        name: of the cost, in records and messages.
        cost: a spec's cost: the same number every time, or a search cannot be repeated. It is called often, so a
            measured one should remember what it measured.
        low: least cost allowed.
        high: largest cost allowed.
        additive: among networks of one width and depth, the cost is one number plus one for each block, which depends
            on that block alone. Then random members are drawn within the budget at once instead of by trying.

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
        """Whether it keeps any network out."""
        return self.low is not None or self.high is not None

    def admits(self, cost: float) -> bool:
        """Whether a network may cost this."""
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
    """A budget of multiply-adds for one image, as `count_macs` counts them."""
    cost = partial(count_macs, img_size=img_size, num_classes=num_classes, in_chans=in_chans)
    return Budget("macs", cost, low, high, additive=True)


def params_budget(
    low: float | None = None,
    high: float | None = None,
    img_size: int | tuple[int, int] = 224,
    num_classes: int = 1000,
    in_chans: int = 3,
) -> Budget:
    """A budget of trainable parameters, as `count_params` counts them."""
    cost = partial(count_params, img_size=img_size, num_classes=num_classes, in_chans=in_chans)
    return Budget("params", cost, low, high, additive=True)


def extremes(space: SearchSpace, cost: Cost) -> tuple[Spec, Spec]:
    """The cheapest and the most expensive member under a cost that is additive over blocks, exactly.

    Raises:
        SearchError: if the cost is seen not to be additive.
    """
    members = []
    for stratum in space.strata:
        excess = excess_costs(stratum, "cost", cost)
        members += [stratum.member_at(costs.index(choose(costs)) for costs in excess) for choose in (min, max)]
    return min(members, key=cost), max(members, key=cost)


def excess_costs(stratum: Stratum, name: str, cost: Cost) -> list[list[float]]:
    """For each option of each block, what it costs more than the block's cheapest: found by exchanging single blocks.

    Raises:
        SearchError: if a few members cost something else than their blocks together.
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
