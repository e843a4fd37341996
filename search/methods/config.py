"""The settings of a search method: the keys of a recipe's section `evolution`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final, get_args

from glit_models.errors import SearchError

from ..spaces.choices import UniformOver

__all__ = ["EvolutionConfig"]


@final
@dataclass(frozen=True)
class EvolutionConfig:
    """Settings of a search method. The defaults are SPOS's (arXiv 1904.00420, section 3.4): 1000 networks in all.

    Attributes:
        population: networks per generation; fewer if no more new ones are found.
        generations: number of generations, including the random first one.
        num_parents: number of best networks so far that are parents of the next ones.
        mutated_blocks: average number of blocks that a mutation changes; see `SearchSpace.redraw_blocks`. SPOS changes
            2 of 20. None: each gene changes with `mutation_prob` instead.
        mutation_prob: for each gene, if `mutated_blocks` is None and for `autoformer`; see `SearchSpace.mutate`.
        depth_prob: probability for the depth, for `autoformer`.
        width_prob: probability for the embedding width, for `autoformer`.
        num_mutation: networks of a generation that are made by mutation.
        num_crossover: networks of a generation that are made by crossover of two different parents. If crossover finds
            too few new ones, mutation fills the gap; the rest is random.
        proposals: networks that are proposed for each one of a generation, once some are scored. A linear surrogate,
            fitted to all scores so far, picks among them. For a small space, all remaining networks are proposed,
            because predictions are cheap. 1: all proposed networks are evaluated.
        objectives: for `nsga2`, the costs to minimise while maximising fitness: macs, params, latency_ms.
        policy_rate: for `transform_policy`, the step size of logits per generation.
        uniform_over: distribution of random networks; see `SearchSpace.sample`.
        max_draws: maximum number of draws for one random network within budgets.

    A method ignores settings that it does not use: `random` uses population, generations, uniform_over and max_draws.

    Raises:
        SearchError: on an invalid value; names the key, the value and the bound.
    """

    population: int = 50
    generations: int = 20
    num_parents: int = 10
    mutation_prob: float = 0.1
    num_mutation: int = 25
    num_crossover: int = 25
    uniform_over: UniformOver = "choices"
    max_draws: int = 1000
    depth_prob: float = 0.4
    width_prob: float = 0.4
    mutated_blocks: float | None = 2.0
    proposals: int = 1
    objectives: tuple[str, ...] = ("macs",)
    policy_rate: float = 20.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "objectives", tuple(self.objectives))  # JSON has lists
        if not self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise SearchError(f"objectives must be one cost or several different ones, got {list(self.objectives)}")
        numbers = (
            "population",
            "generations",
            "num_parents",
            "max_draws",
            "proposals",
            "num_mutation",
            "num_crossover",
        )
        for key in numbers:
            value, minimum = getattr(self, key), 0 if key in ("num_mutation", "num_crossover") else 1
            if type(value) is not int or value < minimum:
                raise SearchError(f"{key} must be an integer of at least {minimum}, got {value!r}")
        for key in ("mutation_prob", "depth_prob", "width_prob"):
            value = getattr(self, key)
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise SearchError(f"{key} must be from 0 to 1, got {value!r}")
        blocks = self.mutated_blocks
        if blocks is not None and (not isinstance(blocks, (int, float)) or not 0 < blocks < math.inf):
            raise SearchError(f"mutated_blocks must be positive, or null, got {blocks!r}")
        if not isinstance(self.policy_rate, (int, float)) or not 0 < self.policy_rate < math.inf:
            raise SearchError(f"policy_rate must be positive, got {self.policy_rate!r}")
        if self.num_mutation + self.num_crossover > self.population:
            raise SearchError(
                f"num_mutation + num_crossover must be at most population={self.population}, "
                f"got {self.num_mutation} + {self.num_crossover}"
            )
        if self.uniform_over not in get_args(UniformOver):
            raise SearchError(
                f"uniform_over must be one of {', '.join(get_args(UniformOver))}, got {self.uniform_over!r}"
            )
