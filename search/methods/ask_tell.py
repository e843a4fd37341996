"""The base class of search methods: an ask-and-tell interface that proposes networks, generation by generation.

The caller computes the fitness, in any order; the method, a subclass of `Search`, chooses the next networks.
The whole state is always plain JSON, and determines all later choices.
"""

from __future__ import annotations

import dataclasses
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

from glit_models import Spec, parse_spec
from glit_models.errors import SearchError

from ..spaces.budget import Budget, show_cost
from ..spaces.budget_sampler import BudgetSampler
from ..spaces.choices import check_keys, draw_below
from ..spaces.space import SearchSpace
from .candidates import Candidate, Candidates
from .config import EvolutionConfig
from .surrogate import Surrogate

__all__ = ["Search"]

_DRAWS_PER_CANDIDATE = 20  # per missing network, before the next way of finding some is tried
_SCORED_FOR_SURROGATE = 40  # number of scored networks from which on it picks among proposals
_SMALL_SPACE = 10_000  # members; a space of this size is enumerated when draws find nothing new


class Search(ABC):
    """A search method: proposes networks, generation by generation. Abstract.

    A subclass defines `propose` and the class attributes; see `evolution` for examples. A recipe names a custom method
    as `method: my_module:MyMethod`.

    Attributes:
        method: name in saved states (class attribute).
        stages: names of a search's stages, and of their folders (class attribute).
        stage_work: multiplier of the recipe's epochs, generations and retrained networks (class attribute).
        uses_surrogate: whether `proposals` applies to the method (class attribute).
        seeks_front: whether cheap networks count as well as accurate ones, so that a comparison by fitness alone must
            not drop them (class attribute).
        needs_given: whether it searches among transformations of a given network, see `narrow` (class attribute).
        description: a sentence about the method for the report (class attribute).
        space: the space of the networks.
        config: the settings.
        rng: the method's only source of randomness.

    Args:
        space: the space of the networks.
        budgets: the bounds on costs; costs without bounds are only recorded.
        seed: seed of everything random.
        initial: members of the first generation, for example the winner of an earlier stage.
        settings: fields of `EvolutionConfig`.

    Raises:
        SearchError: if a budget cannot be met (names the smallest and the largest reachable cost), an initial network
            is not a member or outside a budget, or a setting is unknown or invalid.
    """

    method: ClassVar[str] = "own"
    stages: ClassVar[tuple[str, ...]] = ("joint",)
    stage_work: ClassVar[int] = 1
    uses_surrogate: ClassVar[bool] = True
    seeks_front: ClassVar[bool] = False
    needs_given: ClassVar[bool] = False
    description: ClassVar[str] = ""

    def __init__(
        self,
        space: SearchSpace,
        budgets: Sequence[Budget] = (),
        *,
        seed: int = 0,
        initial: Sequence[Spec] = (),
        **settings: Any,
    ) -> None:
        if type(seed) is not int:
            raise SearchError(f"seed must be an integer, got {seed!r}")
        check_keys("", settings, [field.name for field in dataclasses.fields(EvolutionConfig)])
        self.config = EvolutionConfig(**settings)
        self.space, self.seed = space, seed
        self._sampler = BudgetSampler(space, budgets, self.config.uniform_over, self.config.max_draws)
        self._initial = list(dict.fromkeys(map(space.canonical, initial)))
        if len(self._initial) > self.config.population:
            raise SearchError(
                f"initial must be at most population={self.config.population} networks, got {len(self._initial)}"
            )
        for index, spec in enumerate(self._initial):
            if self._sampler.within(spec) is None:
                costs = ", ".join(f"{budget.name} {show_cost(budget.cost(spec))}" for budget in budgets)
                raise SearchError(f"initial[{index}] must have {self._sampler.describe()}, got {costs}")
        self.rng = random.Random(seed)
        self._candidates = Candidates()
        self._new: dict[Spec, Candidate] = {}  # of the current generation
        self._wanted = self.config.population  # target size of the current generation
        self._generation = -1
        self._exhausted: str | None = None

    def ask(self) -> list[Spec]:
        """The next networks to evaluate: a generation, or the rest of it; none when the search is over.

        No network is proposed twice, and no two proposed networks compute the same function.

        Raises:
            SearchError: if the first generation finds no network within the budgets.
        """
        pending = self._candidates.pending()
        if pending or self.outcome:
            return pending
        self._new = {}
        if not len(self._candidates):
            for spec in self._initial:
                self._add(spec, "initial", self._sampler.within(spec) or {})
        self._wanted = self.config.population
        if self.config.proposals > 1 and self.uses_surrogate and len(self._candidates) >= _SCORED_FOR_SURROGATE:
            self._propose_plenty()
        else:
            self.propose()
        for candidate in self._new.values():
            self._candidates.add(candidate)
        self._generation += bool(self._new)
        return list(self._new)

    def _propose_plenty(self) -> None:
        """Propose more networks than a generation has, and keep those with the best surrogate predictions.

        A small space is enumerated, so that its best network is missed only if the surrogate misjudges it. Not all of
        it is evaluated, so that methods stay comparable by their number of evaluations; if these suffice for the whole
        space, every method finishes on its own.
        """
        if self._is_small():
            self._wanted = self.space.size
            self._add_remaining()
            if not self._new:
                self._exhausted = self._explain()
        else:
            for _ in range(self.config.proposals):
                self.propose()
                self._wanted += self.config.population
        if len(self._new) > self.config.population:
            scored = self._candidates.ranked()
            surrogate = Surrogate(self.space, [c.spec for c in scored], [c.fitness or 0.0 for c in scored])
            predicted = dict(zip(self._new, surrogate.predict(list(self._new)), strict=True))
            best = set(sorted(predicted, key=lambda spec: -predicted[spec])[: self.config.population])
            self._new = {spec: self._new[spec] for spec in self._new if spec in best}
            if self._is_small():  # all were proposed, and the surrogate alone has picked
                self._new = {
                    spec: dataclasses.replace(candidate, origin="surrogate") for spec, candidate in self._new.items()
                }

    def tell(self, spec: Spec, fitness: float) -> None:
        """Set the fitness of a network that was asked for. The order within a generation makes no difference.

        Raises:
            SearchError: if it was not asked for or was told before, or the fitness is not finite.
        """
        self._candidates.tell(spec, fitness)

    @property
    def outcome(self) -> str | None:
        """Why the search is over, in one line; None while it continues."""
        if self._candidates.pending():
            return None
        if self._exhausted is None and self._generation + 1 >= self.config.generations:
            return f"all {self.config.generations} generations are evaluated, {len(self._candidates)} networks"
        return self._exhausted

    @property
    def generation(self) -> int:
        """The number of the last generation that was asked for, from 0; -1 before the first."""
        return self._generation

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """All networks that were asked for, in order."""
        return tuple(self._candidates)

    @property
    def best(self) -> Candidate | None:
        """The best network so far, the earlier of equals; None before the first is told."""
        return next(iter(self.top(1)), None)

    def top(self, k: int) -> list[Candidate]:
        """The `k` best networks so far, best first, the earlier of equals first."""
        return self._candidates.ranked()[:k]

    def front(self, cost: str) -> list[Candidate]:
        """The Pareto front of fitness against a budget's cost, cheapest first. Raises SearchError if unknown."""
        return self._candidates.front(cost)

    @classmethod
    def narrow(cls, space: SearchSpace, given: Spec, cost: Callable[[Spec], float]) -> SearchSpace:
        """Restrict a space to the part to search, given an initial network; for methods that need one.

        Args:
            cost: maps a network to its multiply-adds, additive over its blocks.
        """
        return space

    def finalists(self, candidates: Sequence[Candidate], count: int) -> list[Candidate]:
        """The `count` networks to train stand-alone at the end.

        Args:
            candidates: candidates with a fitness, best first.
        """
        return list(candidates[:count])

    @abstractmethod
    def propose(self) -> None:
        """Fill the new generation, with `add_children` and `add_random`.

        `candidates`, `top` and `best` give the networks of earlier generations and their fitness.
        """

    def add_children(self, origin: str, count: int, make: Callable[[], Spec]) -> int:
        """Add up to `count` new networks within the budgets, created by `make`.

        Returns how many are missing.

        Args:
            origin: how these networks are found, for the records: 'mutation', 'crossover', ...
            count: maximum number of networks; there may be fewer, as the number of calls of `make` is limited.
            make: creates a member of the space.
        """
        wanted = len(self._new) + count
        for _ in range(_DRAWS_PER_CANDIDATE * count):
            if len(self._new) == wanted:
                break
            spec = make()
            if self._is_new(spec) and (costs := self._sampler.within(spec)) is not None:
                self._add(spec, origin, costs)
        return wanted - len(self._new)

    def add_random(self) -> None:
        """Fill the generation with random members within the budgets; the search ends if there are no more."""
        failure = None
        for _ in range(_DRAWS_PER_CANDIDATE * self.config.population):
            if len(self._new) >= self._wanted:
                break
            try:
                spec, costs = self._sampler.sample(self.rng)
            except SearchError as error:
                failure = error
                break
            if self._is_new(spec):
                self._add(spec, "random", costs)
        if len(self._new) < self._wanted and self._is_small():
            self._add_remaining()
        if not self._new and failure and not len(self._candidates):
            raise failure
        if not self._new:
            self._exhausted = self._explain()

    def _is_new(self, spec: Spec) -> bool:
        return spec not in self._candidates and spec not in self._new

    def _add(self, spec: Spec, origin: str, costs: Mapping[str, float]) -> None:
        self._new[spec] = Candidate(spec, self._generation + 1, origin, costs)

    def _is_small(self) -> bool:
        """Whether all members can be enumerated; a measured cost may take long for each."""
        return self.space.size <= (_SMALL_SPACE if self._sampler.exact else self.config.max_draws)

    def _add_remaining(self) -> None:
        """Like `add_random`, but enumerates all members in random order."""
        left = [spec for spec in self.space if self._is_new(spec)]
        while left and len(self._new) < self._wanted:
            spec = left.pop(draw_below(self.rng, len(left)))
            if (costs := self._sampler.within(spec)) is not None:
                self._add(spec, "random", costs)

    def _explain(self) -> str:
        if self._is_small():
            return (
                f"every network within the budgets is evaluated: {len(self._candidates)} of the space's "
                f"{self.space.size}"
            )
        return f"no new network within the budgets was found; {len(self._candidates)} are evaluated"

    def state_dict(self) -> dict[str, Any]:
        """The state that determines all later choices, as plain JSON values."""
        version, words, gauss = self.rng.getstate()
        return {
            "method": self.method,
            "seed": self.seed,
            "settings": dataclasses.asdict(self.config),
            "space": self.space.to_dict(),
            "budgets": _bounds(self._sampler.budgets),
            "initial": [spec.to_dict() for spec in self._initial],
            "rng": [version, list(words), gauss],
            "generation": self._generation,
            "exhausted": self._exhausted,
            "candidates": [candidate.to_dict() for candidate in self._candidates],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], space: SearchSpace, budgets: Sequence[Budget] = ()) -> Self:
        """Restore a search from `state_dict`, in the same space with the same budgets.

        Raises:
            SearchError: if the state is of another method, space or budgets, or is damaged.
        """
        ours = {"method": cls.method, "space": space.to_dict(), "budgets": _bounds(budgets)}
        try:
            differing = [key for key, value in ours.items() if state[key] != value]
            initial = [parse_spec(spec) for spec in state["initial"]]
            candidates = Candidates(map(Candidate.from_dict, state["candidates"]))
            seed, settings, generation, exhausted = (state[k] for k in ("seed", "settings", "generation", "exhausted"))
            version, words, gauss = state["rng"]
            rng = random.Random()
            rng.setstate((version, tuple(words), gauss))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise SearchError(f"the state of the search is damaged: {type(error).__name__}: {error}") from None
        if differing:
            raise SearchError(f"the state of the search was taken with another {' and another '.join(differing)}")
        search = cls(space, budgets, seed=seed, initial=initial, **settings)
        search.rng, search._candidates = rng, candidates
        search._generation, search._exhausted = generation, exhausted
        return search


def _bounds(budgets: Sequence[Budget]) -> list[dict[str, Any]]:
    return [{"name": budget.name, "low": budget.low, "high": budget.high} for budget in budgets]
