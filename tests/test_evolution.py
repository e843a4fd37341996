"""Tests of search methods: no repeats, members only, termination, restored states, and better than random."""

import json
import math
import random
import statistics
from collections.abc import Callable

import numpy as np
import pytest
from glit_models.search import (
    METHODS,
    Budget,
    Evolution,
    EvolutionConfig,
    RandomSearch,
    Search,
    SearchSpace,
    glit,
    glit_released,
    global_only,
    macs_budget,
    params_budget,
)
from glit_models.search.methods.nsga2 import Nsga2, crowding_distances, front_ranks
from glit_models.search.methods.surrogate import Surrogate
from spaces import AUTOFORMER, PRODUCT, SMALL_SPACES, TIED, random_space

from glit_models import GLIT_TINY, GLiTSpec, count_macs, count_params
from glit_models.errors import SearchError

SMALL = {"population": 8, "generations": 4, "num_parents": 3, "num_mutation": 3, "num_crossover": 3}
MIDDLE = [macs_budget(1.3e9, 1.4e9), params_budget()]
# NSGA-II and transformations have tests of their own.
OTHERS = [method for method in METHODS.values() if not (method.seeks_front or method.needs_given)]
methods = pytest.mark.parametrize("method", OTHERS)


def separable(space: SearchSpace, seed: int) -> tuple[Callable[[GLiTSpec], float], float]:
    """An accuracy that is a sum of random numbers, one for each value of each gene, and the largest there is."""
    chances = [random.Random(1000 * seed + index) for index in range(space.depth)]
    tables = [{(field, value): rng.random() for field in range(6) for value in range(-1, 100)} for rng in chances]

    def score(index: int, block: object) -> float:
        values = list(vars(block).values())[:6]  # those that are numbers
        return sum(tables[index][field, -1 if v is None else int(2 * v)] for field, v in enumerate(values))

    def accuracy(spec: GLiTSpec) -> float:
        return sum(score(index, block) for index, block in enumerate(spec.blocks))

    return accuracy, sum(max(score(i, block) for block in space.options(i)) for i in range(space.depth))


def run(search: Search, accuracy: Callable[[GLiTSpec], float]) -> Search:
    while specs := search.ask():
        for spec in specs:
            search.tell(spec, accuracy(spec))
    return search


@pytest.mark.parametrize("seed", range(4))
def test_evolution_comes_within_a_hundredth_of_the_best_of_a_million_networks_and_chance_does_not(seed: int) -> None:
    space = glit_released(depth=4)
    accuracy, largest = separable(space, seed)
    evolved = run(Evolution(space, seed=seed), accuracy).best
    drawn = run(RandomSearch(space, seed=seed), accuracy)
    assert evolved.fitness > largest - 0.01
    assert evolved.generation < 15
    assert drawn.best.fitness < largest - 0.1
    assert len(drawn.candidates) == 1000


@pytest.mark.parametrize("seed", range(3))
def test_evolution_goes_further_than_chance_in_the_paper_s_space_within_a_budget(seed: int) -> None:
    accuracy, _ = separable(glit(), seed)
    settings = {"population": 20, "generations": 10, "num_parents": 5, "num_mutation": 10, "num_crossover": 10}
    searches = (search(glit(), MIDDLE, seed=seed, **settings) for search in (Evolution, RandomSearch))
    evolved, drawn = (run(search, accuracy) for search in searches)
    assert evolved.best.fitness > drawn.best.fitness + 1
    assert all(1.3e9 <= count_macs(c.spec) <= 1.4e9 for search in (evolved, drawn) for c in search.candidates)


def test_the_defaults_are_those_of_spos() -> None:
    search = run(Evolution(glit()), lambda spec: count_macs(spec) % 1009)
    assert search.outcome == "all 20 generations are evaluated, 1000 networks"
    for generation in range(20):
        origins = [c.origin for c in search.candidates if c.generation == generation]
        made = ["random"] * 50 if generation == 0 else ["mutation"] * 25 + ["crossover"] * 25
        assert origins == made


def test_a_mutation_changes_as_many_blocks_in_the_mean_as_the_recipe_says() -> None:
    space, rng = glit(), random.Random(0)
    parent = space.sample(rng)
    for num_blocks in (1.0, 2.0, 5.0):
        changed = []
        for _ in range(400):
            child = space.redraw_blocks(parent, num_blocks, rng)
            assert child in space
            changed.append(sum(a != b for a, b in zip(parent.blocks, child.blocks, strict=True)))
        assert sum(changed) / 400 == pytest.approx(num_blocks, rel=0.15)


def test_a_mutation_may_change_gene_by_gene_instead() -> None:
    origins = []
    for prob in (0.0, 0.2):
        settings = {**SMALL, "num_crossover": 0, "mutated_blocks": None, "mutation_prob": prob}
        search = run(Evolution(glit_released(depth=4), **settings), lambda spec: count_macs(spec) % 1009)
        origins.append({candidate.origin for candidate in search.candidates})
    assert origins == [{"random"}, {"random", "mutation"}]


def test_a_redrawn_network_of_a_space_of_widths_and_depths_is_a_member() -> None:
    rng = random.Random(0)
    parents = [AUTOFORMER.sample(rng) for _ in range(5)]
    children = [AUTOFORMER.redraw_blocks(parent, 2, rng) for parent in parents for _ in range(40)]
    assert all(child in AUTOFORMER for child in children)
    assert len({(child.embed_dim, child.depth) for child in children}) == 4


def test_parents_of_a_crossover_differ_and_one_that_finds_nothing_new_becomes_a_mutation() -> None:
    space = glit_released(depth=4)
    settings = {**SMALL, "num_parents": 1}  # one parent alone has nobody to cross with
    search = run(Evolution(space, seed=0, **settings), lambda spec: count_macs(spec) % 1009)
    later = [candidate.origin for candidate in search.candidates if candidate.generation]
    assert later == (["mutation"] * 6 + ["random"] * 2) * 3


@methods
@pytest.mark.parametrize("seed", range(6))
def test_no_network_is_proposed_twice_or_from_outside(method: type[Search], seed: int) -> None:
    space = random_space(random.Random(seed))
    rng = random.Random(seed)
    search = run(method(space, [Budget("params", count_params)], seed=seed, **SMALL), lambda spec: rng.random())
    specs = [candidate.spec for candidate in search.candidates]
    assert len(set(specs)) == len(specs) == min(32, space.size)
    assert all(spec in space for spec in specs)
    assert [c.costs for c in search.candidates] == [{"params": count_params(spec)} for spec in specs]


@methods
@pytest.mark.parametrize("space", SMALL_SPACES.values(), ids=SMALL_SPACES)
def test_a_search_that_has_seen_every_network_within_its_budget_says_so_and_ends(
    method: type[Search], space: SearchSpace
) -> None:
    costs = sorted(map(count_params, space))
    high = costs[len(costs) // 2]
    within = sum(cost <= high for cost in costs)
    search = run(method(space, [params_budget(high=high)], generations=1000), lambda spec: 0)
    assert len(search.candidates) == within
    assert search.outcome == f"every network within the budgets is evaluated: {within} of the space's {space.size}"
    assert search.ask() == []


@methods
def test_a_search_that_finds_no_new_network_in_a_large_space_ends_too(method: type[Search]) -> None:
    budget = macs_budget(high=546_374_400)  # the least in the whole space
    search = run(method(glit(), [budget], population=5, num_mutation=2, num_crossover=2), lambda spec: 0)
    assert 1 <= len(search.candidates) < 100
    assert search.outcome == (f"no new network within the budgets was found; {len(search.candidates)} are evaluated")


@methods
def test_an_impossible_budget_is_one_line_with_what_can_be_reached(method: type[Search]) -> None:
    with pytest.raises(SearchError) as error:
        method(glit(), [macs_budget(3e9, 4e9), params_budget()])
    assert str(error.value) == (
        "no member of the space has macs from 3,000,000,000 to 4,000,000,000 "
        "(546,374,400 to 2,202,309,120 is reachable)"
    )


@methods
@pytest.mark.parametrize("space", [glit(), TIED], ids=["large", "small"])
def test_an_impossible_measured_budget_ends_at_the_first_question_and_at_every_later_one(
    method: type[Search], space: SearchSpace
) -> None:
    search = method(space, [Budget("ms", count_params, high=1)], max_draws=20, **SMALL)
    for _ in range(2):
        with pytest.raises(SearchError, match=r"^20 draws found no member of the space that has ms of at most 1 \("):
            search.ask()


@methods
def test_a_measured_budget_is_met_by_trying(method: type[Search]) -> None:
    costs = sorted(map(count_params, TIED))
    low, high = costs[len(costs) // 3], costs[2 * len(costs) // 3]
    search = run(method(TIED, [Budget("ms", count_params, low, high)], **SMALL), lambda spec: count_macs(spec))
    assert len(search.candidates) == 32
    assert all(low <= candidate.costs["ms"] <= high for candidate in search.candidates)


@methods
def test_asking_again_gives_what_was_not_told_yet(method: type[Search]) -> None:
    search = method(PRODUCT, **SMALL)
    first = search.ask()
    assert search.ask() == first
    assert search.outcome is None
    for spec in first[::2]:
        search.tell(spec, 0.5)
    assert search.ask() == first[1::2]
    assert search.generation == 0


@methods
def test_the_order_of_telling_makes_no_difference(method: type[Search]) -> None:
    accuracy, _ = separable(TIED, 0)
    forth, back = method(TIED, **SMALL), method(TIED, **SMALL)
    while specs := forth.ask():
        assert back.ask() == specs
        for spec, other in zip(specs, reversed(specs), strict=True):
            forth.tell(spec, round(accuracy(spec)))  # many are equal
            back.tell(other, round(accuracy(other)))
    assert forth.state_dict() == back.state_dict()
    assert forth.top(10) == back.top(10)


def test_a_surrogate_picks_better_children_than_none_and_chance_stays_chance() -> None:
    accuracy, _ = separable(glit(), 0)
    settings = {"population": 20, "generations": 6, "num_parents": 5, "num_mutation": 10, "num_crossover": 10}
    plain, picked = (run(Evolution(glit(), MIDDLE, seed=0, proposals=k, **settings), accuracy) for k in (1, 6))
    assert len(picked.candidates) == len(plain.candidates) == 120
    assert picked.candidates[:40] == plain.candidates[:40]  # nothing is predicted from so few
    assert picked.best.fitness > plain.best.fitness + 0.5
    assert all(MIDDLE[0].admits(candidate.costs["macs"]) for candidate in picked.candidates)
    drawn = (RandomSearch(glit(), MIDDLE, seed=0, proposals=k, **settings) for k in (1, 6))
    assert len({str([c.spec for c in run(search, accuracy).candidates]) for search in drawn}) == 1


def test_a_surrogate_looks_at_every_network_of_a_small_space_and_no_more_are_evaluated() -> None:
    accuracy, _ = separable(TIED, 1)
    budget = params_budget(high=sorted(map(count_params, TIED))[TIED.size // 2])
    within = [spec for spec in TIED if budget.admits(count_params(spec))]
    settings = {"population": 20, "generations": 3, "num_parents": 5, "num_mutation": 10, "num_crossover": 10}
    search = run(Evolution(TIED, [budget], proposals=2, **settings), accuracy)
    assert len(search.candidates) == 60 < len(within)
    assert {candidate.origin for candidate in search.candidates[40:]} == {"surrogate"}
    scored = search.candidates[:40]
    surrogate = Surrogate(TIED, [c.spec for c in scored], [c.fitness for c in scored])
    left = [spec for spec in within if spec not in {c.spec for c in scored}]
    best = sorted(surrogate.predict(left))[-20:]
    assert sorted(surrogate.predict([c.spec for c in search.candidates[40:]])) == pytest.approx(best)
    everything = run(Evolution(TIED, [budget], proposals=2, **{**settings, "generations": 1000}), accuracy)
    assert len(everything.candidates) == len(within)
    assert everything.outcome.startswith("every network within the budgets is evaluated")


@pytest.mark.parametrize("method", [method for method in OTHERS if method.uses_surrogate])
def test_a_search_with_a_surrogate_goes_on_from_its_state(method: type[Search]) -> None:
    accuracy, _ = separable(glit_released(depth=4), 0)
    space, settings = glit_released(depth=4), {**SMALL, "generations": 8, "proposals": 3}
    whole = run(method(space, seed=7, **settings), accuracy)
    search = method(space, seed=7, **settings)
    while specs := search.ask():
        search.tell(specs[0], accuracy(specs[0]))
        search = method.from_state(json.loads(json.dumps(search.state_dict())), space)
    assert search.candidates == whole.candidates


@methods
def test_a_search_goes_on_from_its_state_as_if_it_had_never_stopped(method: type[Search]) -> None:
    accuracy, _ = separable(TIED, 0)
    budgets, initial = [params_budget(high=160_000), macs_budget()], [next(iter(TIED))]
    whole = run(method(TIED, budgets, seed=7, initial=initial, **SMALL), accuracy)

    def interrupted(search: Search) -> Search:
        return method.from_state(json.loads(json.dumps(search.state_dict())), TIED, budgets)

    search = interrupted(method(TIED, budgets, seed=7, initial=initial, **SMALL))
    while search.ask():
        search = interrupted(search)  # after each question and each answer
        spec = search.ask()[0]
        search.tell(spec, accuracy(spec))
        search = interrupted(search)
    assert json.dumps(search.state_dict()) == json.dumps(whole.state_dict())
    assert search.best == whole.best
    assert search.outcome == whole.outcome


@methods
def test_a_search_that_is_over_stays_so_when_it_is_restored(method: type[Search]) -> None:
    search = run(method(PRODUCT, generations=100), lambda spec: 0)
    assert method.from_state(search.state_dict(), PRODUCT).outcome == search.outcome


def test_the_same_seed_gives_the_same_search_and_another_one_another() -> None:
    accuracy, _ = separable(glit(), 0)
    a, b, c = (run(Evolution(glit(), seed=seed, **SMALL), accuracy).candidates for seed in (1, 1, 2))
    assert a == b != c


def test_a_state_of_another_search_is_refused_with_what_differs() -> None:
    state = Evolution(PRODUCT, [params_budget()]).state_dict()
    for match, call in {
        "another method": lambda: RandomSearch.from_state(state, PRODUCT, [params_budget()]),
        "another space": lambda: Evolution.from_state(state, TIED, [params_budget()]),
        "another budgets": lambda: Evolution.from_state(state, PRODUCT, [params_budget(high=1e9)]),
        "another space and another budgets": lambda: Evolution.from_state(state, TIED),
    }.items():
        with pytest.raises(SearchError, match=f"^the state of the search was taken with {match}$"):
            call()


@pytest.mark.parametrize(
    "change",
    [
        {"rng": [3, [1, 2], None]},
        {"rng": [3, [-1] * 625, None]},
        {"candidates": [{}]},
        {"candidates": 3},
        {"initial": [3]},
        {"candidates": [{"spec": {}, "generation": 0, "origin": "random", "costs": {}}]},
    ],
)
def test_a_damaged_state_is_one_line(change: dict[str, object]) -> None:
    state = Evolution(PRODUCT).state_dict()
    with pytest.raises(SearchError, match=r"^the state of the search is damaged: [^\n]*$"):
        Evolution.from_state({**state, **change}, PRODUCT)
    for key in state:
        with pytest.raises(SearchError, match=f"^the state of the search is damaged: KeyError: '{key}'$"):
            Evolution.from_state({k: value for k, value in state.items() if k != key}, PRODUCT)


@methods
def test_a_stage_starts_from_the_winner_of_the_one_before(method: type[Search]) -> None:
    space = glit_released()
    winner = run(method(space.stage_one(), MIDDLE, **SMALL), count_macs).best.spec
    search = method(space.stage_two(winner), MIDDLE, initial=[winner, winner], **SMALL)
    assert search.ask()[0] == winner
    assert [candidate.origin for candidate in search.candidates] == ["initial"] + ["random"] * 7


@methods
def test_every_method_searches_networks_of_several_widths_and_depths(method: type[Search]) -> None:
    costs = sorted(map(count_params, AUTOFORMER))
    budget = params_budget(costs[10], costs[-10])
    search = run(method(AUTOFORMER, [budget], seed=3, **SMALL), count_params)
    specs = [candidate.spec for candidate in search.candidates]
    assert len(set(specs)) == len(specs) == 32
    assert all(spec in AUTOFORMER and budget.admits(count_params(spec)) for spec in specs)
    assert len({(spec.embed_dim, spec.depth) for spec in specs}) == 4
    assert method.from_state(json.loads(json.dumps(search.state_dict())), AUTOFORMER, [budget]).best == search.best


def test_a_method_of_ones_own_is_a_module_and_a_name() -> None:
    assert METHODS.find(f"{__name__}:Climb") is Climb
    search = run(METHODS.find(f"{__name__}:Climb")(TIED, **SMALL), count_macs)
    assert {candidate.origin for candidate in search.candidates} == {"random", "step"}
    for name, message in (
        (
            "climb",
            "unknown search method 'climb'; known: autoformer, evolution, hierarchical, nsga2, random, spos, ",
        ),
        (f"{__name__}:Idle", f"search method '{__name__}:Idle' lacks propose"),
        (f"{__name__}:SMALL", f"search method '{__name__}:SMALL' must be a Search, got dict"),
        (f"{__name__}:Nothing", f"search method '{__name__}:Nothing': {__name__} has no 'Nothing'"),
        ("no_module:Climb", "search method 'no_module:Climb': there is no module 'no_module'"),
    ):
        with pytest.raises(SearchError) as error:
            METHODS.find(name)
        assert str(error.value).startswith(message)


class Climb(Search):
    """Changes the best network a little."""

    def propose(self) -> None:
        if self.best is not None:
            best = self.best.spec
            self.add_children("step", self.config.num_mutation, lambda: self.space.mutate(best, 0.2, self.rng))
        self.add_random()


class Idle(Search):
    """Has no `propose`."""


def test_an_initial_network_must_be_a_member_within_the_budgets() -> None:
    with pytest.raises(SearchError, match=r"^blocks\[1\] must be one of the space's options"):
        Evolution(global_only(), initial=[GLIT_TINY])
    with pytest.raises(SearchError) as error:
        Evolution(glit(), MIDDLE, initial=[GLIT_TINY])
    assert str(error.value) == (
        "initial[0] must have macs from 1,300,000,000 to 1,400,000,000 (546,374,400 to 2,202,309,120 is reachable), "
        "got macs 1,472,873,280, params 7,264,456"
    )
    with pytest.raises(SearchError, match=r"^initial must be at most population=3 networks, got 4$"):
        Evolution(PRODUCT, initial=list(PRODUCT)[:4], population=3, num_mutation=1, num_crossover=1)


def test_results_are_ordered_and_the_earlier_of_equals_is_first() -> None:
    search = RandomSearch(PRODUCT, [params_budget()], **SMALL, seed=1)
    assert search.best is None
    assert search.front("params") == []
    specs = search.ask()
    for index, spec in enumerate(specs):
        search.tell(spec, [0.5, 0.7, 0.7, 0.2][index % 4])
    assert [candidate.spec for candidate in search.top(5)] == [specs[i] for i in (1, 2, 5, 6, 0)]
    assert search.best == search.top(1)[0]


def test_the_front_holds_what_nothing_beats() -> None:
    accuracy, _ = separable(TIED, 3)
    search = RandomSearch(TIED, [params_budget(), macs_budget(img_size=64)], population=200, generations=1)
    run(search, lambda spec: round(2 * accuracy(spec)) / 2)  # many are equal
    for name in ("params", "macs"):
        points = {(c.costs[name], c.fitness) for c in search.candidates}
        best = {
            point for point in points
            if not any(other != point and other[0] <= point[0] and other[1] >= point[1] for other in points)
        }  # fmt: skip
        front = [(c.costs[name], c.fitness) for c in search.front(name)]
        assert front == sorted(best)
        assert len(front) > 2
    with pytest.raises(SearchError, match=r"^no budget is named 'ms'; there are params, macs$"):
        search.front("ms")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"populaton": 3}, "unknown key populaton; did you mean population?"),
        ({"population": 0}, "population must be an integer of at least 1, got 0"),
        ({"generations": 2.5}, "generations must be an integer of at least 1, got 2.5"),
        ({"num_parents": 0}, "num_parents must be an integer of at least 1, got 0"),
        ({"mutation_prob": 1.5}, "mutation_prob must be from 0 to 1, got 1.5"),
        ({"mutation_prob": "often"}, "mutation_prob must be from 0 to 1, got 'often'"),
        ({"mutated_blocks": 0}, "mutated_blocks must be positive, or null, got 0"),
        ({"mutated_blocks": float("inf")}, "mutated_blocks must be positive, or null, got inf"),
        ({"num_mutation": -1}, "num_mutation must be an integer of at least 0, got -1"),
        ({"population": 40}, "num_mutation + num_crossover must be at most population=40, got 25 + 25"),
        ({"uniform_over": "paths"}, "uniform_over must be one of choices, members, kinds, got 'paths'"),
        ({"proposals": 0}, "proposals must be an integer of at least 1, got 0"),
        ({"max_draws": 0}, "max_draws must be an integer of at least 1, got 0"),
        ({"seed": "0"}, "seed must be an integer, got '0'"),
    ],
)
@methods
def test_a_setting_that_cannot_be_is_named(method: type[Search], settings: dict, message: str) -> None:
    with pytest.raises(SearchError) as error:
        method(PRODUCT, **settings)
    assert str(error.value) == message


def test_an_answer_that_makes_no_sense_is_refused_and_changes_nothing() -> None:
    search = Evolution(PRODUCT, **SMALL)
    spec = search.ask()[0]
    before = json.dumps(search.state_dict())
    for value in (float("nan"), float("inf"), None, True, "0.5"):
        with pytest.raises(SearchError, match=r"^fitness must be a finite number, got .* for candidate 0$"):
            search.tell(spec, value)
    with pytest.raises(SearchError, match=r"^tell takes a network that was asked about, got {"):
        search.tell(GLIT_TINY, 0.5)
    assert json.dumps(search.state_dict()) == before
    search.tell(spec, 0.5)
    with pytest.raises(SearchError, match=r"^tell takes a network once, got 0.7 where 0.5 is known: candidate 0$"):
        search.tell(spec, 0.7)


def test_settings_are_a_value_with_the_defaults_of_the_paper() -> None:
    config = Evolution(PRODUCT).config
    assert config == EvolutionConfig(50, 20, 10, 0.1, 25, 25, mutated_blocks=2.0)


# ---- NSGA-II ----

# 24 points; ranks, distances and hypervolume below are pymoo 0.6.2's, its distances times the number of objectives.
POINTS = np.array(
    [[37, 29], [27, 46], [23, 45], [33, 16], [2, 41], [11, 56], [36, 5], [19, 49], [5, 58], [4, 45], [32, 20], [13, 32],
     [28, 20], [39, 20], [19, 37], [23, 36], [20, 55], [32, 39], [28, 34], [13, 60], [18, 25], [33, 13], [34, 30],
     [4, 28]], dtype=float,
)  # fmt: skip
RANKS = [2, 4, 3, 1, 0, 2, 0, 3, 2, 1, 1, 1, 0, 2, 2, 2, 4, 3, 2, 3, 0, 0, 2, 0]
DISTANCES = [
    0.4102, np.inf, 1.1604, np.inf, np.inf, 0.9644, np.inf, 1.2406, np.inf, np.inf, 1.2414, 1.8276, 0.7745, np.inf,
    0.8793, 0.3437, np.inf, np.inf, 0.4814, np.inf, 0.9281, 0.6520, 0.3963, 0.9150,
]  # fmt: skip
FRONT = {"population": 20, "generations": 12, "num_mutation": 10, "num_crossover": 10}


def hypervolume(points: np.ndarray, reference: tuple[float, float]) -> float:
    """The area that points [n, 2], both values to be minimised, dominate up to a reference point."""
    area, height = 0.0, reference[1]
    for x, y in sorted(map(tuple, points.tolist())):
        if x < reference[0] and y < height:
            area, height = area + (reference[0] - x) * (height - y), y
    return area


def test_fronts_and_distances_are_those_of_pymoo() -> None:
    ranks = front_ranks(POINTS)
    assert ranks.tolist() == RANKS
    distances = np.zeros(len(POINTS))
    for rank in set(RANKS):
        distances[ranks == rank] = crowding_distances(POINTS[ranks == rank])
    np.testing.assert_allclose(distances, DISTANCES, atol=1e-4)
    assert hypervolume(POINTS, (41, 71)) == 1881


def test_fronts_and_distances_are_those_of_the_pymoo_that_is_installed() -> None:
    sorting = pytest.importorskip("pymoo.util.nds.non_dominated_sorting").NonDominatedSorting()
    metrics = pytest.importorskip("pymoo.operators.survival.rank_and_crowding.metrics")
    for seed in range(20):
        points = np.random.default_rng(seed).random((40, 2 + seed % 2))
        fronts, ranks = sorting.do(points, return_rank=True)
        assert front_ranks(points).tolist() == ranks.tolist()
        for front in (front for front in fronts if len(front) > 2):  # smaller ones are all ends
            theirs = points.shape[1] * metrics.calc_crowding_distance(points[front])
            np.testing.assert_allclose(crowding_distances(points[front]), theirs)


def test_what_dominates_nothing_and_equals_is_of_one_front() -> None:
    assert front_ranks(np.array([[1.0, 1.0], [1.0, 1.0], [2.0, 1.0]])).tolist() == [0, 0, 1]
    assert front_ranks(np.zeros((0, 2))).tolist() == []
    assert hypervolume(np.array([[1.0, 1.0], [3.0, 0.5]]), (2, 2)) == 1  # the second is beyond the reference


@pytest.mark.parametrize("seed", range(3))
def test_nsga_2_covers_more_of_the_front_than_evolution_and_chance_do(seed: int) -> None:
    quality, _ = separable(glit(), seed)

    def accuracy(spec: GLiTSpec) -> float:  # size helps, too, as it does in truth
        return quality(spec) + 20 * math.log(count_macs(spec) / 1e9)

    rng = random.Random(seed)
    drawn = [glit().sample(rng) for _ in range(50)]
    reference = (-statistics.mean(map(accuracy, drawn)), max(map(count_macs, drawn)))

    def volume(method: type[Search]) -> float:
        search = run(method(glit(), [macs_budget()], seed=seed, num_parents=5, **FRONT), accuracy)
        return hypervolume(np.array([[-c.fitness, c.costs["macs"]] for c in search.candidates]), reference)

    found = volume(Nsga2)
    assert found > 1.05 * volume(Evolution)
    assert found > 1.05 * volume(RandomSearch)


def test_the_networks_that_nsga_2_leaves_to_be_trained_lie_along_its_front() -> None:
    accuracy, _ = separable(glit(), 0)
    search = run(Nsga2(glit(), [macs_budget(), params_budget()], objectives=["macs"], **FRONT), accuracy)
    front = search.front("macs")
    finalists = search.finalists(search.top(len(search.candidates)), 4)
    assert [finalists[0], finalists[-1]] == [front[-1], front[0]]
    assert len(finalists) == 4
    assert all(candidate in front for candidate in finalists)
    assert search.finalists(search.top(1), 4) == search.top(1)


def test_nsga_2_goes_on_from_its_state_as_if_it_had_never_stopped() -> None:
    accuracy, _ = separable(glit(), 0)
    whole = run(Nsga2(glit(), MIDDLE, **SMALL), accuracy)
    parts = Nsga2(glit(), MIDDLE, **SMALL)
    while specs := parts.ask():
        for spec in specs:
            parts.tell(spec, accuracy(spec))
        parts = Nsga2.from_state(json.loads(json.dumps(parts.state_dict())), glit(), MIDDLE)
    assert parts.candidates == whole.candidates


def test_an_objective_that_is_no_cost_of_the_search_is_refused() -> None:
    with pytest.raises(SearchError, match="objectives must be among macs, params, got 'latency_ms'"):
        Nsga2(glit(), MIDDLE, objectives=["latency_ms"])
    with pytest.raises(SearchError, match="objectives must be one cost or several different ones"):
        Nsga2(glit(), MIDDLE, objectives=["macs", "macs"])
