"""Estimate the costs, duration and statistical power of a search in advance, without writing anything.

Costs are counted, not measured; minutes are estimated from a trial of a few real steps (`trial`).
"""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from glit_models import Spec
from glit_models.errors import SearchError
from glit_models.evaluate import smallest_difference

from ..methods.screening import rounds
from ..recipe import SearchRecipe
from ..spaces.budget import Budget, extremes, show_cost
from ..spaces.budget_sampler import BudgetSampler
from ..spaces.latency import Prepare
from ..spaces.space import SearchSpace
from ..supernets.starting import is_supernet
from .context import RunContext
from .stage import Stage
from .trial import NetworkSpeed, SupernetSpeed, time_network, time_supernet

__all__ = ["SearchPlan", "StagePlan", "plan_search"]

_NUM_RANDOM = 2000  # random networks for shares and medians
_FEWEST_STEPS = 100  # for each value; a rule of thumb
_FEWEST_CONTROLS = 19  # at random, a winner beats all of 19 in one of 20 searches
_LEAST_DIFFERENCE = 2.0  # points; the difference between the two levels of the ablation in docs/search-benchmarks.md
_ACCURACIES = (80, 90)


@final
@dataclass(frozen=True)
class StagePlan:
    """The plan of one stage.

    Attributes:
        name: name of its folder.
        num_networks: size of its space.
        costs: (minimum, median of random networks, maximum) by the cost's name.
        share: fraction of the random networks that are within the budget, from 0 to 1.
        minutes: minutes by part; None if unknown.
        is_example: whether the space depends on an earlier winner, which is replaced by a random network here.
    """

    name: str
    num_networks: int
    costs: Mapping[str, tuple[float, float, float]]
    share: float
    minutes: Mapping[str, float | None]
    is_example: bool


@final
@dataclass(frozen=True)
class SearchPlan:
    """The plan of a whole search.

    Attributes:
        budgets: description of each budget.
        stages: stages in order.
        minutes: minutes by part, for the parts after the stages.
        search_images: number of images of the search set.
        differences: (standard error, smallest significant difference at 95 %) in points, by accuracy in percent.
        warnings: one line each.
    """

    budgets: tuple[str, ...]
    stages: tuple[StagePlan, ...]
    minutes: Mapping[str, float]
    search_images: int
    differences: Mapping[int, tuple[float, float]]
    warnings: tuple[str, ...]

    @property
    def total_minutes(self) -> float:
        """The sum of all known minutes."""
        return sum(
            value or 0.0 for minutes in (*(s.minutes for s in self.stages), self.minutes) for value in minutes.values()
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in JSON."""
        return {**dataclasses.asdict(self), "total_minutes": self.total_minutes}

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"budget: {'; '.join(self.budgets) or 'none'}"
        for stage in self.stages:
            size = f"{stage.num_networks:,}" if stage.num_networks < 1e6 else f"10^{math.log10(stage.num_networks):.1f}"
            example = ", after a random network in place of the first winner" if stage.is_example else ""
            yield f"{stage.name}: {size} networks{example}; {_percent(stage.share)} of random ones within the budget"
            for name, (least, median, largest) in stage.costs.items():
                yield f"    {name} from {show_cost(least)} to {show_cost(largest)}, median {show_cost(median)}"
            yield f"    minutes: {_show_minutes(stage.minutes)}"
        yield f"then minutes: {_show_minutes(self.minutes)}"
        yield f"in all about {self.total_minutes:.3g} minutes in one process like this one, estimated from {_TRIAL}"
        for accuracy, (error, difference) in self.differences.items():
            yield (
                f"at {accuracy} % accuracy, {self.search_images:,} search images give a standard error of {error:.2f} "
                f"points; two networks must differ by {difference:.2f} to be told apart at 95 %"
            )
        yield from (f"warning: {warning}" for warning in self.warnings)


_TRIAL = "a trial of a few steps"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %" if share else f"fewer than {100 / _NUM_RANDOM:g} %"


def _show_minutes(minutes: Mapping[str, float | None]) -> str:
    shown = (f"{part} {'not known' if value is None else format(value, '.3g')}" for part, value in minutes.items())
    return ", ".join(shown) or "none"


def plan_search(
    recipe: SearchRecipe,
    device: str | torch.device | None = None,
    runtimes: Mapping[str, Prepare] | None = None,
) -> SearchPlan:
    """Estimate the costs, duration and statistical power of a search. Trains for a few steps and writes nothing.

    Args:
        recipe: recipe of the search.
        device, runtimes: as in `SearchRun`.

    Raises:
        DataError, RecipeError, SearchError: as in `SearchRun`; a budget that admits no network only gives a warning.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = RunContext(recipe, Path(folder), device, None, runtimes=runtimes)
        return _Planner(context).plan()


@final
class _Planner:
    def __init__(self, context: RunContext) -> None:
        self.context, self.recipe = context, context.recipe
        self.budgets = [budget for budget in context.budgets if budget.additive]
        self.warnings: list[str] = []
        self.impossible: set[str] = set()  # stages without a network within the budget
        self.rng = random.Random(f"{self.recipe.seed} plan")

    def plan(self) -> SearchPlan:
        """Make the whole plan."""
        recipe, context = self.recipe, self.context
        names, space = recipe.method_class.stages, context.searched_space()
        spaces = [space.stage_one(**recipe.fixed) if len(names) > 1 else space]
        network = self._draw(names[0], spaces[0])
        if len(names) > 1:
            spaces.append(space.stage_two(network))
            network = self._draw(names[1], spaces[1])
        if recipe.fitness_class.needs_supernet:
            context.check_memory(space)
        speed = time_network(context, network)
        stages = [
            self._plan_stage(*pair, speed, index > 0) for index, pair in enumerate(zip(names, spaces, strict=True))
        ]
        count = len(context.splits.validation)
        self._warn_of_few()
        return SearchPlan(
            tuple(self._budget_texts()), tuple(stages), self._minutes_after(speed), count,
            {p: (100 * math.sqrt(p / 100 * (1 - p / 100) / count), smallest_difference(p, count)) for p in _ACCURACIES},
            tuple(self.warnings),
        )  # fmt: skip

    def _budget_texts(self) -> Iterator[str]:
        for budget in self.context.budgets:
            if budget.bounded:
                reference = self.context.references.get(budget.name)
                text = f"{budget.name} {reference}" if reference else str(budget)
                yield text if budget.additive else f"{text} (measured, and not counted below)"

    def _draw(self, name: str, space: SearchSpace) -> Spec:
        """Draw a random network, within the budget if there are any."""
        try:
            return BudgetSampler(space, self.budgets, self.recipe.evolution.uniform_over).sample(self.rng)[0]
        except SearchError as error:
            self.impossible.add(name)
            self.warnings.append(f"{name}: {error}; the search would end there")
            return space.sample(self.rng)

    # ---- a stage ----

    def _plan_stage(self, name: str, space: SearchSpace, network: NetworkSpeed, is_example: bool) -> StagePlan:
        specs = [space.sample(self.rng, self.recipe.evolution.uniform_over) for _ in range(_NUM_RANDOM)]
        costs = {budget.name: [budget.cost(spec) for spec in specs] for budget in self.budgets}
        within = [all(budget.admits(cost) for budget, cost in zip(self.budgets, row, strict=True))
                  for row in zip(*costs.values(), strict=True)]  # fmt: skip
        share = sum(within) / len(within)
        ranges = {budget.name: _range(space, budget, costs[budget.name]) for budget in self.budgets}
        stage = Stage(name, space, self.context)
        supernet = time_supernet(stage) if stage.fitness_class.needs_supernet else None
        self._warn_of_stage(stage, share)
        minutes: dict[str, float | None] = {}
        if supernet is not None:
            minutes["supernet"] = self._num_supernet_steps() * supernet.step / 60
        minutes["scoring"] = self._scoring_minutes(space, supernet, network)
        minutes["retraining"] = self._retraining_minutes(network)
        return StagePlan(name, space.size, ranges, share, minutes, is_example)

    def _num_supernet_steps(self) -> int:
        optim = self.context.supernet_recipe.optim
        return len(self.context.splits.train) // optim.batch_size * optim.epochs

    def _num_scored(self, space: SearchSpace) -> int:
        config = self.recipe.evolution_config()
        return min(config.population * config.generations, space.size)

    def _scoring_minutes(
        self, space: SearchSpace, supernet: SupernetSpeed | None, network: NetworkSpeed
    ) -> float | None:
        """Minutes of scoring in the evolution, if no networks share work; None for a custom fitness."""
        context, recipe = self.context, self.recipe
        count, num_images = self._num_scored(space), len(context.splits.validation)
        if recipe.fitness == "standalone":
            return count * self._training_minutes(network, recipe.standalone.epochs)
        if supernet is None:
            return {"macs": 0.0}.get(recipe.fitness)
        size, screen = context.supernet_recipe.eval_batch_size, recipe.evaluation.screen_images
        scored = count * num_images
        if screen is not None:
            batches = math.ceil(screen / size)
            more = rounds(count, batches, context.num_batches, recipe.evaluation.confirm)
            scored = count * min(batches * size, num_images)
            scored += sum(number * (of * size if of else num_images) for number, of in more)
        times_read = 1 if context.keeps_images(space) else recipe.evolution_config().generations
        seconds = count * supernet.calibration + scored * supernet.image + times_read * num_images * supernet.reading
        return seconds / 60

    def _training_minutes(self, speed: NetworkSpeed, epochs: int | None = None, all_data: bool = False) -> float:
        """Minutes of a stand-alone training; when it also trains on the search images, it is not scored on them."""
        recipe, splits = self.recipe.retrain_recipe(None, epochs), self.context.splits
        images = len(splits.train) + all_data * len(splits.validation)
        seconds = images // recipe.optim.batch_size * recipe.optim.epochs * speed.step
        if not all_data:
            seconds += math.ceil(recipe.optim.epochs / recipe.eval_every) * len(splits.validation) * speed.image
        return seconds / 60

    def _retraining_minutes(self, speed: NetworkSpeed) -> float:
        retrain = self.recipe.retrain_config()
        rungs = sum(count * self._training_minutes(speed, epochs) for count, epochs in retrain.rungs.items())
        return rungs + retrain.top * self._training_minutes(speed)

    # ---- after the stages ----

    def _minutes_after(self, speed: NetworkSpeed) -> dict[str, float]:
        test, final = self.context.splits.test, self.recipe.final_recipe(next(iter(self.recipe.load_space())))
        scored = 0.0 if test is None else len(test) * speed.image / 60
        training = 0.0 if final is None else self._training_minutes(speed, all_data=True)
        networks = self.recipe.control.networks
        if networks:  # and what `SearchRun` adds to them if the search starts from weights
            source = self.recipe.supernet.from_
            networks += (self.recipe.retrain.start == "inherited") + (source is not None and not is_supernet(source))
        control = networks * (self._training_minutes(speed) + scored)
        return {"final": training + scored, "control": control}

    # ---- warnings ----

    def _warn_of_stage(self, stage: Stage, share: float) -> None:
        recipe, space, add = self.recipe, stage.space, self.warnings.append
        needs_supernet = stage.fitness_class.needs_supernet
        of_all = needs_supernet and recipe.supernet.sampling not in ("budget", "identity")
        if share < 0.01 and of_all and stage.name not in self.impossible:
            add(
                f"{stage.name}: {_percent(share)} of random networks are within the budget, and the supernet is "
                "trained on all; supernet.sampling=budget trains it on these alone"
            )
        if needs_supernet:
            steps = self._num_supernet_steps() * recipe.supernet.paths
            if recipe.supernet.sampling == "identity":
                steps = int(steps * (1 - stage.identity_prob))
            place, value_share = _rarest_value(space)
            if value_share * steps < _FEWEST_STEPS:
                add(
                    f"{stage.name}: {place} is trained in about {value_share * steps:.0f} steps; with fewer than "
                    f"{_FEWEST_STEPS} its weights have hardly left their random start"
                )
            if not self.context.keeps_images(space):
                add(
                    f"{stage.name}: the search set takes more than a third of evaluation.memory_mb, so that every "
                    "generation reads it again"
                )
        config = recipe.evolution_config()
        if config.population * config.generations >= share * space.size > 0:
            add(
                f"{stage.name}: about {math.ceil(share * space.size):,} networks are within the budget, no more than "
                "the search evaluates, so the method hardly matters"
            )

    def _warn_of_few(self) -> None:
        count, control = len(self.context.splits.validation), self.recipe.control.networks
        if (difference := smallest_difference(_ACCURACIES[0], count)) > _LEAST_DIFFERENCE:
            self.warnings.append(
                f"the search set cannot tell networks apart that differ by less than {difference:.1f} points at "
                f"{_ACCURACIES[0]} %, and the best of a search are often closer; hold out more images"
            )
        if not control:
            self.warnings.append("no control: nothing will say whether the search beats random networks")
        elif control < _FEWEST_CONTROLS:
            self.warnings.append(
                f"a control of {control}: by chance alone a winner beats all of them in one of {control + 1} searches; "
                f"{_FEWEST_CONTROLS} make it one of {_FEWEST_CONTROLS + 1}"
            )
        self.warnings.append(
            "one seed: whole searches with other seeds end elsewhere; docs/search-benchmarks.md shows by how much"
        )


def _range(space: SearchSpace, budget: Budget, costs: list[float]) -> tuple[float, float, float]:
    least, largest = (budget.cost(spec) for spec in extremes(space, budget.cost))
    return least, statistics.median(costs), largest


def _rarest_value(space: SearchSpace) -> tuple[str, float]:
    """The value of a gene that the fewest random networks have, and their share."""
    shares: dict[tuple[int, str, Any], float] = {}
    for index, options in enumerate(space.block_options):
        identity = space.identity_of(options)  # has no weights
        deep = sum(depth > index for depth in space.depths) / len(space.depths)
        for block, count in zip(options.blocks, options.counts, strict=True):
            for gene, value in space.spec_class.genes_of(block).items():
                if value is not None and block != identity:
                    key = index, gene, value
                    shares[key] = shares.get(key, 0.0) + deep * count / options.total
    (index, gene, value), share = min(shares.items(), key=lambda item: item[1])
    return f"{gene} {value} in block {index}", share
